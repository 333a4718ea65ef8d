"""What is IntraQ's own: class centres, margins by number of classes, soft targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_teacher
from zsq.errors import BadInput
from zsq.presets import Outcome
from zsq.recipes import intraq
from zsq.recipes.intraq import margins
from zsq.run import Run
from zsq.sources.pool import PoolSource
from zsq.units import class_centres
from zsq.view import look

SHORT: dict[str, Any] = {"count": 16, "group": 9, "iterations": 3, "steps": 2, "warmup": 3, "batch": 8}


def short_run(path: Path | None = None, size: int = 8, **options: Any) -> Outcome:
    with Run(path, progress=False, log_every=1) as run:
        return intraq(tiny_teacher(size), run, **{**SHORT, **options})


def test_class_centres_are_means_of_finished_images() -> None:
    teacher, images = tiny_teacher(), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 3, 7, 3, 7])
    centres, known = class_centres(teacher.net, "8:input", images, labels, 10)
    features = look(teacher.net, images, features=["7"]).features["7"]
    assert torch.allclose(centres[3], features[[0, 1, 3]].mean(0), atol=1e-5)
    assert torch.allclose(centres[7], features[[2, 4]].mean(0), atol=1e-5)
    assert known.nonzero().flatten().tolist() == [3, 7] and centres[0].abs().sum() == 0


def test_the_first_group_has_no_centres(tmp_path: Path) -> None:
    short_run(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    made = [line for line in lines if line["stage"] == "synthesise"]
    assert ["i_margin" in line for line in made] == [False] * 3 + [True] * 3
    assert all({"i_bns", "i_class"} <= line.keys() for line in made)
    assert all({"kl", "ce"} <= line.keys() for line in lines if line["stage"] == "fit")


def test_margins_off_leave_the_features_alone(tmp_path: Path) -> None:
    short_run(tmp_path / "run", low=0.0, high=2.0)
    assert "i_margin" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_published_numbers() -> None:
    assert margins("cifar10", "official") == {"target": 0.95, "low": 0.05, "high": 0.8}
    assert margins("cifar100", "paper") == {"target": 0.6, "low": 0.02, "high": 1.0} == margins("imagenet", "paper")
    assert margins("imagenet", "official") == {"target": 1.0, "low": 0.0, "high": 2.0}
    plan = short_run(fidelity="official", steps=0).plan
    assert (plan["lr"], plan["image_lr"], plan["ranges"], plan["ranges_from"]) == (1e-4, 0.5, "official", "generator")
    assert plan["decay_at"] == [16 / 147, 36 / 147, 56 / 147]
    assert short_run(size=68, fidelity="official", steps=0, batch=2).plan["lr"] == pytest.approx(1e-6)
    assert short_run(steps=0).plan["lr"] == pytest.approx(1e-5)
    assert short_run(size=68, steps=0, batch=2).plan["lr"] == pytest.approx(1e-6)


def test_images_without_labels_are_refused() -> None:
    pool = PoolSource(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), None, name="pool")
    with pytest.raises(BadInput, match="label"):
        short_run(images=pool)
