"""The fidelity tables: every recipe has one, every row names a test that exists, and the page is current."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import render_fidelity

ROOT = Path(__file__).resolve().parents[2]


def missing(test_id: str) -> str:
    """Why `test_id` (``path`` or ``path::test``) names no test; empty if it does."""
    path, _, function = test_id.partition("::")
    if not (ROOT / path).is_file() or not path.startswith("tests/"):
        return f"{path} is not a test file"
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if not any(name.startswith("test_") for name in names):
        return f"{path} holds no test"
    return f"{path} has no {function}" if function and function.partition("[")[0] not in names else ""


@pytest.mark.parametrize("name", render_fidelity.recipes())
def test_every_row_names_a_test_that_exists(name: str) -> None:
    _, rows = render_fidelity.recipes()[name]
    assert rows, f"recipe {name} has no table {' | '.join(render_fidelity.COLUMNS)}"
    gaps = [f"{row[0]}: {missing(test_id)}" for row in rows for test_id in row[-1].split() or [""] if missing(test_id)]
    assert not gaps, "\n".join(gaps)


def test_page_is_current() -> None:
    assert render_fidelity.PAGE.read_text(encoding="utf-8") == render_fidelity.render(), "run `make docs`"


def test_invented_ids_and_ragged_rows_are_found() -> None:
    assert missing("tests/docs/test_fidelity.py::test_no_such_thing")
    assert missing("tests/no_such_file.py")
    assert not missing("tests/docs/test_fidelity.py::test_page_is_current")
    head = "| what | paper | official code | here | why | test |\n|---|---|---|---|---|---|\n"
    assert render_fidelity.table(head + "| a | b | c | d | e | f |") == [["a", "b", "c", "d", "e", "f"]]
    with pytest.raises(ValueError, match="expected 6 cells, got 5"):
        render_fidelity.table(head + "| a | b | c | d | e |")
