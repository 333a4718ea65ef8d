"""The health numbers, on students where the answer is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny import tiny_teacher
from zsq.discrepancy import output_gap
from zsq.health import Health
from zsq.insert import QuantSpec, activation_quantizers, freeze_ranges, quantize, quantized_weights
from zsq.run import Run
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher


def student_of(teacher: Teacher) -> nn.Module:
    student, _ = quantize(teacher.net, QuantSpec())
    with torch.no_grad():
        student.eval()(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3)))
    freeze_ranges(student)
    return student


def health_of(teacher: Teacher, student: nn.Module, run: Run, **options: Any) -> Health:
    rng = torch.Generator().manual_seed(4)
    pool = PoolSource(torch.randn(64, 1, 8, 8, generator=rng), None, name="pool", held_out=16)
    noise = torch.randn(16, 1, 8, 8, generator=rng)
    return Health(student, teacher.net, pool, run, gap=output_gap, noise=noise, every=2, **options)


def steps(path: Path, change: Any = None) -> list[dict[str, Any]]:
    """Four steps, `change` before the third; the logged lines."""
    teacher = tiny_teacher()
    student = student_of(teacher)
    with Run(path, log_every=1, progress=False) as run:
        health = health_of(teacher, student, run)
        for step in run.steps("fit", 4, health=health):
            if step == 2 and change is not None:
                with torch.no_grad():
                    change(student)
            health.step()
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_it_looks_every_second_step_at_every_site(tmp_path: Path) -> None:
    lines = steps(tmp_path / "run")
    assert ["noise_gap" in line for line in lines] == [False, True, False, True]
    sites = activation_quantizers(student_of(tiny_teacher()))
    assert {key for key in lines[1] if key.startswith("saturation.")} == {f"saturation.{name}" for name in sites}
    assert lines[1]["noise_gap"] == lines[3]["noise_gap"] > 0 and lines[1]["image_gap"] > 0
    assert lines[3]["flips"] == 0 and 0 <= lines[1]["saturation"] < 0.1


def test_flips_are_the_share_of_changed_codes(tmp_path: Path) -> None:
    def change(student: nn.Module) -> None:
        weight = quantized_weights(student)[0]
        weight.parameter[0, 0, 1, 1] += (weight.parameter.max() - weight.parameter.min()) / 2

    teacher = tiny_teacher()
    before, after = student_of(teacher), student_of(teacher)
    with torch.no_grad():
        change(after)
    changed = total = 0
    for old, new in zip(quantized_weights(before), quantized_weights(after), strict=True):
        grids = [(w.parameter * w.grid().inv_step - w.grid().zero).round().clamp(-8, 7) for w in (old, new)]
        changed, total = changed + int((grids[0] != grids[1]).sum()), total + old.parameter.numel()
    line = steps(tmp_path / "run", change)[3]
    assert changed > 0 and line["flips"] == pytest.approx(changed / total)


def test_saturation_is_the_share_outside_the_range(tmp_path: Path) -> None:
    def change(student: nn.Module) -> None:
        site = next(iter(activation_quantizers(student).values()))
        site.hi /= 2  # type: ignore[union-attr, operator]
        site._refresh()  # type: ignore[operator]

    lines = steps(tmp_path / "run", change)
    first = next(key for key in lines[3] if key.startswith("saturation."))
    assert lines[3][first] > lines[1][first] + 0.01
    student = student_of(tiny_teacher())
    change(student)
    images = PoolSource(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(4)), None, name="pool",
                        held_out=16).sample(16, Run(None, progress=False).rng("health", 4)).images  # fmt: skip
    site = next(iter(activation_quantizers(student).values()))
    with torch.no_grad():
        values = tiny_teacher_prefix(student, images)
    top = float(site.hi) + 0.5 * float(site.hi) / 15  # type: ignore[arg-type]
    assert lines[3][first] == pytest.approx(float((values > top).float().mean()), abs=2e-3)


def tiny_teacher_prefix(student: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the first activation quantizer of the student is given."""
    seen: list[torch.Tensor] = []
    site = next(iter(activation_quantizers(student).values()))
    with site.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        student(images)
    return seen[0]


def test_it_changes_nothing_and_goes_on_from_its_state() -> None:
    teacher = tiny_teacher()
    student = student_of(teacher)
    before = copy.deepcopy(student.state_dict())
    with Run(None, progress=False) as run:
        health, other = health_of(teacher, student, run), health_of(teacher, student, run)
        for _ in run.steps("fit", 3):
            health.step()
        other.load_state_dict(health.state_dict())
        assert other.state_dict()["count"] == 3
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert not any(site._forward_pre_hooks for site in activation_quantizers(student).values())
