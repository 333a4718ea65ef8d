"""Our own recipe: what it learns, its controls, networks of other shapes, and a kill between any two steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny import settled, tiny_teacher
from zsq import pipeline, recipes
from zsq.errors import BadInput
from zsq.grid import encode
from zsq.insert import QuantSpec, activation_quantizers, quantize, quantized_weights
from zsq.insert.access import weight_paths
from zsq.quantizer import MseRange
from zsq.recipes import zsq
from zsq.run import Run
from zsq.sources.harder import HarderSource
from zsq.teachers import Teacher

SHORT: dict[str, Any] = {"steps": 4, "warmup": 2, "lead": 2, "batch": 8, "count": 32, "shown": 8}
LEARNED: dict[str, Any] = {"weight_ranges": "learned", "ranges": "learned"}


def outcome(
    teacher: Teacher | None = None, spec: QuantSpec | None = None, path: Path | None = None, **options: Any
) -> Any:
    with Run(path, progress=False) as run:
        return zsq(teacher or tiny_teacher(), run, spec=spec or QuantSpec(), **{**SHORT, **options})


class Mobile(nn.Module):
    """Depthwise convolutions, squeeze-excitation and hardswish, no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depth = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        )
        self.point = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depth(self.stem(x))
        x = self.point(x * self.squeeze(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("bits", [2, 8])
def test_depthwise_and_gates(placement: str, bits: int) -> None:
    teacher = Teacher(settled(Mobile()), "mobile", "classify", 10, (1, 8, 8))
    student = outcome(teacher, QuantSpec(weight_bits=bits, act_bits=bits, placement=placement)).student
    assert student(torch.randn(3, 1, 8, 8)).isfinite().all()
    assert all(isinstance(q, MseRange) and not q.observing for q in activation_quantizers(student).values())


def test_calibration_only_trains_nothing() -> None:
    teacher = tiny_teacher()
    found = outcome(teacher, steps=0)
    assert found.plan["steps"] == found.plan["rounding"] == 0
    own = teacher.net.state_dict()
    assert all(torch.equal(own[f"{w.name}.weight"], w.parameter) for w in quantized_weights(found.student))


def test_steps_have_their_own_learning_rate() -> None:
    def state(rate: float) -> dict[str, torch.Tensor]:
        return dict(outcome(**LEARNED, step_lr=rate).student.named_parameters())

    still, moved = state(0.0), state(1e-2)
    started = dict(outcome(**LEARNED, steps=0).student.named_parameters())
    steps = [name for name in still if name.endswith(".step")]
    assert steps and all(torch.equal(still[name], started[name]) for name in steps)
    assert not all(torch.equal(moved[name], started[name]) for name in steps)
    assert not torch.equal(still["0.weight"], started["0.weight"])


def test_with_a_flip_rate_every_layer_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    real = Run.log

    def log(run: Run, **terms: Any) -> None:
        if "kl" in terms:
            seen.append({weight.name: weight.parameter.detach().clone() for weight in layers})
        real(run, **terms)

    student_of = quantize
    layers: list[Any] = []

    def watched(*given: Any, **named: Any) -> Any:
        student, report = student_of(*given, **named)
        layers.extend(quantized_weights(student))
        return student, report

    monkeypatch.setattr(Run, "log", log)
    monkeypatch.setattr(recipes.module("zsq"), "quantize", watched)
    outcome(flip_rate=0.05, steps=3)
    assert len(seen) == 3 and len(layers) == 3
    for before, after in itertools.pairwise(seen):
        for weight in layers:
            grid = weight.grid(before[weight.name])
            moved = encode(before[weight.name], grid) != encode(after[weight.name], grid)
            assert moved.any()


def test_images_are_made_harder_unless_told_not_to() -> None:
    found = outcome()
    assert isinstance(found.source, HarderSource) and found.plan["epsilon"] == 0.2 and found.plan["temperature"] == 4.0
    assert not isinstance(outcome(epsilon=0.0).source, HarderSource)


def test_the_temperature_follows_the_number_of_classes() -> None:
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    hundred = Teacher(settled(nn.Sequential(*layers, nn.Linear(8, 100))), "hundred", "classify", 100, (1, 8, 8))
    assert outcome(hundred, steps=0).plan["temperature"] == 20.0
    assert outcome(steps=0).plan["temperature"] == 4.0
    assert outcome(hundred, steps=0, temperature=2.0).plan["temperature"] == 2.0


def test_ranges_of_weights_stay_and_those_of_activations_weigh_the_cube() -> None:
    student = outcome(steps=2).student
    assert all(isinstance(w.path.quantizer, MseRange) for w in weight_paths(student).values())
    assert {q.power for q in activation_quantizers(student).values()} == {3.0}


def test_reconstruction_needs_ranges_that_stay() -> None:
    with pytest.raises(BadInput, match="weight"):
        outcome(rounding=2, weight_ranges="live")
    assert outcome(rounding=2, weight_ranges="learned").plan["rounding"] == 2


def test_images_are_made_once_and_drawn_often(tmp_path: Path) -> None:
    outcome(path=tmp_path / "first", steps=6)
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "record"][-1] == 2 + 5  # 36 images of 8 a step
    pool = pipeline.load_pool(str(tmp_path / "first" / "pool.safetensors"), tiny_teacher())
    again = outcome(images=pool, path=tmp_path / "second")
    assert again.source.name == "saved images (pool.safetensors)"
    stages = {json.loads(line)["stage"] for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"calibrate", "fit"}


def test_pure_noise_is_a_control_by_name() -> None:
    teacher = tiny_teacher()
    pool = pipeline.load_pool("noise", teacher)
    assert pool is not None and pool.name == "pure noise" and not pipeline.is_real("noise")
    with Run(None, progress=False) as run:
        summary = pipeline.produce(teacher, run, recipe="zsq", images=pool, options=SHORT)
    assert (summary["recipe"], summary["base"]) == ("zsq", "pure noise")
    pixels = pool.pick(1000, torch.Generator()).images
    assert abs(float(pixels.mean())) < 0.02 and abs(float(pixels.std()) - 1) < 0.02


def test_without_batchnorm_it_names_the_way_out(bn_free_net: nn.Module) -> None:
    teacher = Teacher(bn_free_net, "flat", "classify", 10, (3, 8, 8))
    with pytest.raises(BadInput, match=r"BatchNorm.*--images"):
        outcome(teacher)
    assert outcome(teacher, images=pipeline.load_pool("noise", teacher)).plan["steps"] == 4


def test_fidelity_to_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="--fidelity: expected one of best, got 'paper'"):
        outcome(fidelity="paper")


class Killed(BaseException):
    """Stands for the end of the process."""


# in the images, in the ranges, in the reconstruction, in the distillation
@pytest.mark.parametrize("at", [2, 8, 11, 14])
def test_a_killed_run_ends_with_the_same_bits(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SHORT, "weight_ranges": "learned", "rounding": 2}
    whole = outcome(path=tmp_path / "whole", **options).student.state_dict()
    count, real = 0, Run.log

    def log(run: Run, **terms: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        real(run, **terms)

    def killed(folder: Path, *, resume: bool) -> Any:
        with Run(folder, progress=False, checkpoint_every=1, log_every=1, resume=resume) as run:
            return zsq(tiny_teacher(), run, spec=QuantSpec(), **options)

    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(Killed):
        killed(tmp_path / "killed", resume=False)
    monkeypatch.setattr(Run, "log", real)
    again = killed(tmp_path / "killed", resume=True).student.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
