"""bench/export.py: rows are kept, replaced and ordered; scores are those that `zsq evaluate` gives the same file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "bench"))
import export as bench
import export_subjects

ORDER = ["a W8A8", "b W8A8", "a W4A4"]


def row(network: str, bits: str, target: str, value: int = 0) -> dict[str, object]:
    return {"network": network, "bits": bits, "target": target, "value": value}


def test_rows_are_ordered_and_replaced() -> None:
    before = [
        row("b", "W8A8", "ort"),
        row("a", "W4A4", "openvino"),
        row("a", "W4A4", "ort"),
        row("gone", "W4A4", "ort"),
    ]
    made = bench.merged(before, [row("a", "W8A8", "ort"), row("a", "W4A4", "ort", 1)], ORDER)
    assert made == [
        row("a", "W8A8", "ort"), row("a", "W4A4", "ort", 1), row("a", "W4A4", "openvino"), row("b", "W8A8", "ort"),
    ]  # fmt: skip
    assert bench.merged(made, [], ORDER) == made


def test_what_is_missing_or_asked_for_is_measured() -> None:
    rows = [row("a", "W8A8", "ort")]
    assert [text for text in ORDER if bench.wanted(text, [], rows)] == ["b W8A8", "a W4A4"]
    assert [text for text in ORDER if bench.wanted(text, ["a "], rows)] == ["a W8A8", "a W4A4"]


@pytest.mark.slow
def test_scores_are_those_of_the_file(tmp_path: Path) -> None:
    from zsq.data import load_data
    from zsq.finished import evaluate_onnx
    from zsq.teachers import load_teacher

    teacher = load_teacher("digits")
    images = torch.randn(16, *teacher.image, generator=torch.Generator().manual_seed(0))
    student = export_subjects.student_of(teacher, images, (4, 8))
    made = export_subjects.Made(student, teacher, images, load_data("digits", teacher))
    subject = export_subjects.Subject("digits", "calibrated", (4, 8), lambda: made)
    for found in bench.file_rows(subject, tmp_path):
        assert found["bits"] == "W4A8" and found["failure"] is None and found["max_lsb"] <= 1
        path = tmp_path / f"{found['target']}.onnx"
        again = evaluate_onnx(path, {}, data="digits", runtime=found["target"])
        assert found["file_score"] == again["student_score"] and found["count"] == again["eval_count"] == 599
        assert abs(found["student_score"] - found["file_score"]) < 0.01 and found["labelled_agreement"] > 0.98


def test_students_whose_weights_were_not_trained_are_called_calibrated(tmp_path: Path) -> None:
    if not export_subjects.SHARED.exists():
        pytest.skip("no shared data")
    kinds = {(s.network, s.width): s.students for s in export_subjects.subjects(tmp_path)}
    assert kinds["shapes-segment", "W4A4"] == kinds["resnet20-cifar10", "W3A3"] == "trained"
    assert kinds["camvid_cgnet", "W8A8"] == kinds["shapes-detect", "W8A8"] == "calibrated"
    assert not any(tmp_path.iterdir())  # nothing is made before it is asked for
