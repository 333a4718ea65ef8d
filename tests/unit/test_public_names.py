"""The public names are what they say, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys
import zsq

names = sys.argv[1].split(",")
before = {name: getattr(zsq, name) for name in names} if sys.argv[2] == "names first" else {}
for name in names:
    importlib.import_module(zsq._HOME[name])
import zsq.fit, zsq.export.words
from zsq.fit import calibrate
from zsq.export import TARGETS, words
for name in names:
    found = getattr(zsq, name)
    assert callable(found), f"{name} is a {type(found).__name__}"
    assert found is getattr(sys.modules[zsq._HOME[name]], name) is before.get(name, found), name
assert calibrate is zsq.calibrate and words.in_words and "ort" in TARGETS
assert "recipes" in dir(zsq) and callable(zsq.recipes.ait)
"""


@pytest.mark.parametrize("order", ["names first", "modules first"])
def test_a_submodule_does_not_hide_a_function(order: str) -> None:
    """In a process of its own: which modules are imported already depends on the tests before."""
    import zsq

    names = ",".join(zsq._HOME)
    command = [sys.executable, "-c", PROGRAM, names, order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_functions_have_the_names_of_the_commands() -> None:
    import zsq

    for command in ("quantize", "evaluate", "analyse", "report", "export"):
        assert callable(getattr(zsq, command))
    with pytest.raises(AttributeError, match="no attribute 'exports'"):
        zsq.exports  # noqa: B018
