"""What is AIT's own: the labels do not matter, and inundation moves integer weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_teacher
from zsq.errors import BadInput
from zsq.insert import codes_and_latents
from zsq.presets import Outcome
from zsq.recipes import ait
from zsq.run import Run
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher


def short_run(teacher: Teacher | None = None, **options: Any) -> Outcome:
    with Run(None, progress=False) as run:
        return ait(teacher or tiny_teacher(), run, **{"steps": 4, "warmup": 3, "batch": 8, "lr": 1e-4, **options})


def codes(student: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in codes_and_latents(student).items() if key.endswith(".codes")}


def changed(a: Outcome, b: Outcome) -> float:
    """Share of integer weights that differ."""
    pairs = [(x, codes(b.student)[key]) for key, x in codes(a.student).items()]
    return sum(int((x != y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


@pytest.mark.parametrize("mode", ["exact", "search"])
def test_inundation_moves_more_than_the_loss_alone(mode: str) -> None:
    start, alone = short_run(steps=0), short_run(inundation="off")
    flooded = short_run(inundation=mode, flip_rate=0.05, flip_decay=1.0)
    least = 0.03 if mode == "exact" else 0.02  # the published search may miss its target
    assert changed(start, alone) < 0.01 < least < changed(start, flooded)
    assert changed(alone, flooded) > least


def test_exact_and_search_are_different_steps() -> None:
    exact, search = (short_run(inundation=mode, flip_rate=0.05) for mode in ("exact", "search"))
    pairs = zip(exact.student.parameters(), search.student.parameters(), strict=True)
    assert not all(torch.equal(x, y) for x, y in pairs)


def test_the_flip_rate_is_per_step() -> None:
    start = short_run(steps=0)
    little, much = (changed(start, short_run(flip_rate=rate, steps=2)) for rate in (0.01, 0.2))
    assert little < much


def test_labels_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=rng)
    students = [
        short_run(images=PoolSource(images, labels, name="pool")).student
        for labels in (None, torch.zeros(64, dtype=torch.int64), torch.arange(64) % 10)
    ]
    states = [list(student.state_dict().values()) for student in students]
    assert all(torch.equal(x, y) for other in states[1:] for x, y in zip(states[0], other, strict=True))


@pytest.mark.parametrize(("size", "rate"), [(8, 1e-3), (64, 1e-3), (68, 1e-4)])
def test_flip_rate_by_image_size(size: int, rate: float) -> None:
    assert short_run(tiny_teacher(size), steps=0, warmup=1, batch=2).plan["flip_rate"] == rate


def test_official_is_what_the_released_code_executes() -> None:
    plan = short_run(fidelity="official", steps=1).plan
    assert (plan["inundation"], plan["cap"], plan["ranges"], plan["observe_last"]) == ("search", 100, "official", None)
    assert short_run(fidelity="official", inundation="off", steps=1).plan["inundation"] == "off"


def test_calibration_only() -> None:
    outcome = short_run(steps=0)
    teacher = tiny_teacher()
    state = outcome.student.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in teacher.net.state_dict().items())


def test_a_pool_that_is_made_first_has_a_size_and_steps() -> None:
    outcome = short_run(base="zeroq", count=16, iterations=2)
    assert (outcome.plan["count"], outcome.plan["iterations"]) == (16, 2)
    assert len(outcome.source.pick(100, torch.Generator()).images) == 16  # type: ignore[attr-defined]
    assert "count" not in short_run().plan  # what was measured before stays comparable
    with pytest.raises(BadInput, match="--iterations: expected --base hast or intraq or zeroq"):
        short_run(base="gdfq", iterations=2)
