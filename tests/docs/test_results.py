"""The tables of README and findings are those of the committed results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import render_results

ROOT = Path(__file__).resolve().parent.parent.parent
ROW = {"teacher": "t", "method": "m", "bits": "W4A4", "seeds": 1, "deviation": None, "student_score": 0.9,
       "teacher_score": 0.95}  # fmt: skip
BLOCK = "<!-- results: one wide -->\n{}<!-- end -->\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "one.json").write_text(json.dumps({"table": [ROW]}))
    return tmp_path


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, "scripts/render_results.py", "--check"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("before", ["", "\n", "| old |\n", "| old |\n|---|\n\n| second table |\n"])
def test_only_what_stands_in_a_block_is_replaced(before: str, results: Path) -> None:
    page = f"above\n{BLOCK.format(before)}between\n{BLOCK.format('| old |' + chr(10))}below <!-- end -->\n"
    made = render_results.rendered(page, results)
    assert made.count("| m | 1 | 90.00 |") == 2 and "old" not in made and "second" not in made
    assert made.startswith("above\n<!-- results: one wide -->\n| method")
    assert "|\n<!-- end -->\nbetween\n<!-- results: one wide -->\n|" in made
    assert made.endswith("|\n<!-- end -->\nbelow <!-- end -->\n")
    assert render_results.rendered(made, results) == made


def test_a_block_without_its_end_is_refused(results: Path) -> None:
    page = f"<!-- results: two long -->\ntext that must stay\n{BLOCK.format('')}"
    with pytest.raises(ValueError, match="results: two long -->: expected a line <!-- end -->"):
        render_results.rendered(page, results)
    with pytest.raises(ValueError, match="expected one of wide, .* got 'tall'"):
        render_results.rendered("<!-- results: one tall -->\n<!-- end -->\n", results)


def test_several_teachers_stand_side_by_side() -> None:
    rows = [ROW, ROW | {"teacher": "other", "teacher_score": 0.5, "student_score": 0.4}]
    lines = render_results.wide(rows)
    bits = ROW["bits"]
    assert lines[0] == f"| method | seeds | t {bits} | other {bits} |" and lines[2].endswith("| 50.00 |")
    assert lines[3] == "| m | 1 | 90.00 | 40.00 |"


def test_both_runtimes_share_a_cell_where_they_agree(results: Path) -> None:
    shared = {"network": "net", "students": "trained", "bits": "W4A4", "max_lsb": 0, "convolutions": 4,
              "size_ratio": 6.54, "metric": "top1", "student_score": 0.9, "agreement": 1.0,
              "integer_conv_share": 1.0}  # fmt: skip
    files = [shared | {"target": "ort", "file_score": 0.9, "labelled_agreement": 1.0},
             shared | {"target": "openvino", "file_score": 0.89, "labelled_agreement": 0.995}]  # fmt: skip
    speed = [{"network": "net", "bits": "W4A4", "target": "ort", "speedup_cpu_batch1": 3.26}]
    (results / "two.json").write_text(json.dumps({"files": files, "speed": speed}))
    made = render_results.rendered("<!-- results: two exported -->\n<!-- end -->\n", results)
    assert "| net | W4A4 | 100 | 100.00 / 99.50 | 90.00 | 90.00 / 89.00 | 6.5 | 3.3 |  |" in made
    made = render_results.rendered("<!-- results: two files -->\n<!-- end -->\n", results)
    assert "| net | trained | W4A4 | 4/4 | 0 | 100.00 | 100.00 / 99.50 | 90.00 | 90.00 / 89.00 | 6.5 |" in made
