"""What `zsq list` shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zsq import catalogue, recipes
from zsq.data import READERS
from zsq.teachers import EMBEDDED


def test_every_recipe_with_paper_parts_and_a_line() -> None:
    rows = catalogue.recipes()
    assert [row["recipe"] for row in rows] == recipes.names()
    for row in rows:
        module = recipes.module(row["recipe"])
        assert (row["paper"], row["parts"]) == (module.PAPER, module.PARTS)
        assert 10 < len(row["what it does"]) < 100 and "\n" not in row["what it does"]
        assert row["what it does"] in (module.__doc__ or "")


def test_every_teacher() -> None:
    names = [row["teacher"] for row in catalogue.teachers()]
    assert names[: len(EMBEDDED)] == list(EMBEDDED)
    assert {"torchvision:NAME", "timm:NAME", "pytorchcv:NAME", "FILE.py:CALLABLE"} <= set(names)
    assert all(row["what it is"] for row in catalogue.teachers())


def test_every_form_of_data() -> None:
    text = " ".join(row["data"] for row in catalogue.data())
    assert all(kind in text for kind in READERS)


def test_a_recipe_without_a_docstring_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("PAPER = 'ours'\n")
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "__init__.py"))
    assert [row["recipe"] for row in catalogue.recipes()] == ["mine"]
    assert catalogue.recipes()[0]["paper"] == "ours"


def test_listing_recipes_imports_neither_torch_nor_a_recipe() -> None:
    code = (
        "import sys; from zsq import catalogue; catalogue.recipes(); catalogue.data();"
        "sys.exit('torch' in sys.modules or 'zsq.recipes.ait' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
