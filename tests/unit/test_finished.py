"""Reading a finished run back. (What damaged ones give is in test_bad_input.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq import finished, pipeline
from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.evaluation import agreement, score


def test_teacher_student_and_summary(finished_run: Path) -> None:
    teacher, student, summary = finished.open_run(finished_run)
    assert teacher.name == summary["teacher"] == "mine.py:net" and teacher.image == (1, 8, 8)
    saved = load_tree(finished_run / "student.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in student.state_dict().items())
    assert not student.training
    images = load_tree(finished_run / "images.safetensors")["images"]
    assert agreement(student, teacher, images).share == summary["agreement"]


def test_the_student_is_the_quantized_one(finished_run: Path) -> None:
    teacher, student, _ = finished.open_run(finished_run)
    images = load_tree(finished_run / "images.safetensors")["images"][:8]
    with torch.no_grad():
        assert not torch.equal(student(images), teacher.net(images))


def test_evaluating_measures_what_it_writes(run_copy: Path) -> None:
    result = finished.evaluate(run_copy, data="digits:train")
    teacher, student, summary = finished.open_run(run_copy)
    data = pipeline.open_data("digits:train", teacher)
    assert result["student_score"] == score(student, data).value == summary["student_score"]
    assert result["teacher_score"] == score(teacher.net, data).value
    assert summary["eval_count"] == 1198 and summary["eval_data"]["name"] == "digits:train"
    # a second set replaces the first; the agreement stays
    finished.evaluate(str(run_copy), data="digits")
    again = json.loads((run_copy / "summary.json").read_text())
    assert again["eval_count"] == 599 and again["agreement"] == summary["agreement"]


def test_agreement_is_measured_again(run_copy: Path) -> None:
    before = json.loads((run_copy / "summary.json").read_text())
    (run_copy / "summary.json").write_text(json.dumps(before | {"agreement": 0.0, "probe_agreement": 0.0, "mine": 1}))
    finished.evaluate(run_copy)
    assert json.loads((run_copy / "summary.json").read_text()) == before | {"mine": 1}


def test_images_of_the_run_are_not_scored_on(run_copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    np.savez(file, images=np.zeros((40, 8, 8, 1), dtype=np.uint8), labels=np.arange(40) % 10)
    record = json.loads((run_copy / "config.json").read_text())
    record["config"]["images"] = f"npz:{file}[:20]"
    (run_copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="expected images apart from those of --eval"):
        finished.evaluate(run_copy, data=f"npz:{file}")
    assert finished.evaluate(run_copy, data=f"npz:{file}[20:]")["eval_count"] == 20
    assert "agreement" in finished.evaluate(run_copy)


def test_a_teacher_alone() -> None:
    result = finished.evaluate_teacher("digits", {}, data="digits")
    assert result["teacher"] == "digits" and result["teacher_score"] > 0.98 and result["eval_count"] == 599
    low, high = result["teacher_interval"]
    assert low < result["teacher_score"] < high
