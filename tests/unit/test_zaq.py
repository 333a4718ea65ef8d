"""ZAQ as a whole: what is trained, what is left alone, and that it works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiny import tiny_teacher
from zsq import pipeline, recipes
from zsq.errors import BadInput
from zsq.evaluation import agreement
from zsq.health import Health
from zsq.insert import QuantSpec, activation_quantizers
from zsq.presets import Outcome
from zsq.quantizer import MseRange, WideningMinMax
from zsq.run import Run
from zsq.teachers import Teacher, load_teacher

SHORT: dict[str, Any] = {"steps": 6, "warmup": 3, "batch": 8, "width": 4}


def short_run(teacher: Teacher, path: Path | None = None, *, bits: int = 4, **options: Any) -> Outcome:
    with Run(path, log_every=1, progress=False) as run:
        spec = QuantSpec(weight_bits=bits, act_bits=bits)
        few = {} if "fidelity" in options else {"leaves": 32}
        return pipeline.run_recipe(teacher, run, recipe="zaq", spec=spec, options={**SHORT, **few, **options})


def noise(count: int, *image: int) -> Tensor:
    return torch.randn(count, *image, generator=torch.Generator().manual_seed(8))


# ---- it works


@pytest.mark.parametrize("options", [
    {"leaves": 0, "correction": "off", "lr": 1e-3}, {"leaves": 0, "correction": "off", "lr": 1e-3, "optimizer": "sgd"},
    {"bits": 3, "lr": 3e-4},
])  # fmt: skip
def test_agreement_rises_above_calibration_within_200_updates(options: dict[str, Any]) -> None:
    teacher = tiny_teacher()
    options = {"warmup": 30, "batch": 16, "width": 8, **options}
    calibrated = short_run(teacher, steps=0, **options)
    trained = short_run(teacher, steps=200, **options)
    for source in (calibrated.source, trained.source):  # before and after it looked for the student's mistakes
        x = source.sample(1024, torch.Generator().manual_seed(7)).images
        before, after = (agreement(outcome.student, teacher, x) for outcome in (calibrated, trained))
        assert after.share > before.share and after.sqnr > before.sqnr


def test_without_batchnorm_and_without_labels(bn_free_net: nn.Module) -> None:
    teacher = Teacher(bn_free_net, "flat", "classify", 10, (3, 8, 8))
    outcome = short_run(teacher)
    assert outcome.source.draw(torch.Generator().manual_seed(0)).labels is None
    with pytest.raises(BadInput, match="BatchNorm"):  # only where the statistics were asked for
        short_run(teacher, bns_weight=0.1)


def test_outputs_for_every_position() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    teacher = Teacher(net.eval().requires_grad_(False), "dense", "segment", 4, (3, 16, 16))
    outcome = short_run(teacher, size="24x32")
    assert outcome.source.sample(2, torch.Generator()).images.shape == (2, 3, 24, 32)


# ---- what it leaves alone


def test_the_teacher_gets_no_gradient() -> None:
    teacher = tiny_teacher()
    teacher.net.requires_grad_(True)  # as someone may hand it over
    short_run(teacher)
    assert all(parameter.grad is None for parameter in teacher.net.parameters())


@pytest.mark.parametrize("fidelity", ["best", "official"])
def test_evaluating_changes_no_buffer(fidelity: str) -> None:
    student = short_run(tiny_teacher(), fidelity=fidelity).student
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with torch.no_grad():
        first, second = student(100 * noise(8, 1, 8, 8)), student(100 * noise(8, 1, 8, 8))
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


# ---- the three fidelities


def test_official_lets_ranges_and_statistics_move() -> None:
    teacher = tiny_teacher()
    start, end = (short_run(teacher, fidelity="official", lr=1e-3, steps=n).student for n in (0, 6))
    still = short_run(teacher, fidelity="official", lr=1e-3, frozen="on").student
    for name, site in activation_quantizers(end).items():
        assert isinstance(site, WideningMinMax) and not site.symmetric
        assert site.hi >= activation_quantizers(start)[name].hi  # type: ignore[operator]
    key = "1.running_mean"
    assert not torch.equal(end.state_dict()[key], start.state_dict()[key])
    assert torch.equal(still.state_dict()[key], teacher.net.state_dict()[key])


def test_paper_is_symmetric() -> None:
    student = short_run(tiny_teacher(), fidelity="paper").student
    assert all(site.symmetric for site in activation_quantizers(student).values())
    codes = torch.cat([w.flatten() for w in _weights(student)])
    assert codes.min() >= -7 and codes.max() <= 7
    best = activation_quantizers(short_run(tiny_teacher()).student).values()
    assert all(isinstance(site, MseRange) and site.power == 3 and not site.symmetric for site in best)


@pytest.mark.parametrize(("bits", "ranges"), [(4, "cubed"), (6, "widening")])
def test_ranges_suit_their_bits(bits: int, ranges: str) -> None:
    assert short_run(tiny_teacher(), bits=bits, steps=0).plan["ranges"] == ranges
    assert short_run(tiny_teacher(), bits=bits, steps=0, ranges="ema").plan["ranges"] == "ema"


def test_images_of_the_first_batches_and_of_the_others() -> None:
    made = {name: short_run(tiny_teacher(), steps=0, **options).source.name for name, options in {
        "best": {}, "drawn": {"share": 0.0}, "attacked": {"share": 1.0}, "made": {"leaves": 0},
        "official": {"fidelity": "official"}}.items()}  # fmt: skip
    assert made == {"best": "zaq+leaves", "drawn": "leaves", "attacked": "zaq", "made": "zaq", "official": "zaq"}


def _weights(student: nn.Module) -> list[Tensor]:
    from zsq.insert import codes_and_latents

    return [value for key, value in codes_and_latents(student).items() if key.endswith(".codes")]


def test_published_numbers() -> None:
    plans = {
        row: short_run(tiny_teacher(), fidelity=row, steps=0, width=None).plan for row in recipes.module("zaq").FIDELITY
    }
    assert [(plan["alpha"], plan["beta"]) for plan in plans.values()] == [(1.0, 0.05), (0.1, 0.05), (1.0, 0.1)]
    assert [plan["features"] for plan in plans.values()] == ["crm", "crm", "feature_l1"]
    assert plans["official"]["width"] == 64 and plans["official"]["damping"] == "off"


def test_stage_weights_matter_where_there_are_stages() -> None:
    teacher = load_teacher("digits")
    students = [short_run(teacher, stage_weights=kind).student for kind in ("adaptive", "uniform", "softmax")]
    weights = [student.get_parameter("output.weight") for student in students]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("option", [
    {"features": "off"}, {"features": "feature_l1"}, {"damping": "off"}, {"replay": 0.0},
    {"restart": "off"}, {"frozen": "off"}, {"correction": "off"}, {"correction": "means"}, {"leaves": 0},
    {"share": 0.0}, {"share": 1.0}, {"optimizer": "sgd"},
    {"symmetric": "on"}, {"decay": "steps"}, {"clip": 1e-3, "optimizer": "sgd"},
    {"loss": "kl"}, {"bns_weight": 1.0}, {"turns": 1}, {"beta": 0.0}, {"ranges": "ema"},
])  # fmt: skip
def test_every_switch_changes_the_student(option: dict[str, Any]) -> None:
    long = {"steps": 21, "lr": 0.05, "turns": 2, "batch": 32}  # ten turns and a look for a collapse
    usual, other = (short_run(tiny_teacher(), **{**long, **extra}).student.state_dict() for extra in ({}, option))
    same = all(torch.equal(usual[key], other[key]) for key in usual if "zsq_sites" not in key)
    assert same == (option == {"restart": "off"})  # nothing collapses here


# ---- interrupted


def test_a_killed_run_with_a_restart_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Run, "note", lambda _, text: notes.append(text))
    monkeypatch.setattr("zsq.sources.adversary.ALIVE", 10.0)  # every look finds a collapse
    options = {**SHORT, "steps": 45}

    def run_it(path: Path, *, resume: bool = False) -> dict[str, Tensor]:
        with Run(path, log_every=7, checkpoint_every=10, progress=False, resume=resume) as run:
            outcome = pipeline.run_recipe(tiny_teacher(), run, recipe="zaq", spec=QuantSpec(), options=options)
            return dict(outcome.student.state_dict())

    whole = run_it(tmp_path / "whole")
    assert any("generator restarted" in note for note in notes)
    real, calls = Health.step, [0]

    def stop(health: Health) -> None:
        calls[0] += 1
        if calls[0] == 37:
            raise ValueError("killed")
        real(health)

    with monkeypatch.context() as patch:
        patch.setattr(Health, "step", stop)
        with pytest.raises(ValueError, match="killed"):
            run_it(tmp_path / "killed")
    resumed = run_it(tmp_path / "killed", resume=True)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    texts = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text] for text in texts]
    assert lines[0] == lines[1] and any(line.get("g_restarts", 0) > 0 for line in lines[0])


@pytest.mark.parametrize(("size", "message"), [("24", "--size: expected HxW"), ("0x8", "--size: expected HxW")])
def test_sizes_that_cannot_be_meant(size: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        short_run(tiny_teacher(), size=size)


class Largest(TorchDispatchMode):
    """Number of values in the largest tensor that any operation gave."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.found = max(self.found, value.numel())
        return out


@pytest.mark.parametrize("features", ["crm", "feature_l1"])
def test_no_map_of_positions_against_positions(features: str) -> None:
    """A step on 64x64 images, whose positions would make maps of 64^4 numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    teacher = Teacher(net.eval().requires_grad_(False), "dense", "segment", 4, (3, 64, 64))
    with Largest() as largest:
        short_run(teacher, batch=4, warmup=1, steps=3, turns=2, features=features, replay=0.0)
    assert 4 * 6 * 64**2 <= largest.found < 64**4 / 16  # the generator has half a million weights
