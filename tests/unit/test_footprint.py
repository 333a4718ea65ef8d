"""Costs known before a run: counts against hand-made ones, and refusals that name the option to change."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tiny import tiny_teacher
from zsq import footprint as costs
from zsq.errors import BadInput
from zsq.footprint import StepCost, available_memory, footprint, require_student_memory
from zsq.recipes import ait, autorecon, gdfq, qimera
from zsq.run import Run
from zsq.sources.pool import PoolSource


def test_counts_by_hand() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 5))
        made = footprint(net, torch.zeros(2, 3, 8, 8))
    assert made.macs == 64 * 9 * 3 * 4 + 256 * 5
    assert made.parameters == 108 + 1285
    # the convolution keeps its input; the sigmoid its output, which the linear layer reads
    assert made.kept == 4 * (3 * 64 + 4 * 64)


def test_maps_and_gradients_are_not_there_at_the_same_time() -> None:
    cost = StepCost("student", 0, 10, fixed=1000, gradients=400, each=100, images=2)
    assert cost.needed == cost.least  # 200 bytes of maps make room for 400 of gradients
    assert cost._replace(images=7).needed == cost.least + 300
    for images in (4, 7, 50):
        free = cost._replace(images=images).needed
        assert cost.fitting(free) == images and cost.fitting(free - 1) == (images - 1 if images > 4 else 0)
    assert cost.fitting(cost.least - 1) == 0


def test_memory_of_this_machine() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is None or free > 2**20


@pytest.mark.parametrize("recipe", [gdfq, qimera, autorecon])
def test_what_does_not_fit_is_refused_before_it_starts(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(free: int | None, **options: Any) -> None:
        monkeypatch.setattr(costs, "available_memory", lambda device: free)
        with Run(None, progress=False) as run:
            recipe(tiny_teacher(), run, **{"steps": 1, "warmup": 1, "batch": 4, **options})

    run(None)
    run(200 * 2**20)
    with pytest.raises(BadInput, match=r"--batch 100000: .* GiB for a generator of .* Use --batch \d+ or less"):
        run(200 * 2**20, batch=100_000)
    pool = PoolSource(torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), name="zeros")
    with pytest.raises(BadInput, match=r"--micro-batch 100000: .* for a student of .* Use --micro-batch \d+ or less"):
        run(200 * 2**20, batch=100_000, images=pool)
    with pytest.raises(BadInput, match="no batch fits"):
        run(2**20)


@pytest.mark.parametrize("base", ["gdfq", "qimera", "autorecon"])
def test_as_a_base_too(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "available_memory", lambda device: 2**20)
    with Run(None, progress=False) as run, pytest.raises(BadInput, match="--batch"):
        ait(tiny_teacher(), run, base=base, steps=1, warmup=1, batch=4)


def test_a_generator_that_could_be_smaller_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "available_memory", lambda device: 2**20)
    with Run(None, progress=False) as run, pytest.raises(BadInput, match="Use --disentangle, free memory, or use"):
        qimera(tiny_teacher(), run, steps=1, warmup=1, batch=4, disentangle=False)
    with Run(None, progress=False) as run, pytest.raises(BadInput, match=r"\. Free memory, or use another device"):
        qimera(tiny_teacher(), run, steps=1, warmup=1, batch=4, disentangle=True)


def test_a_student_beside_a_generator_counts_both(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    source = SimpleNamespace(cost=StepCost("generator", 0, 10**6, 18 * 10**6, 4 * 10**6, 0, 1))
    alone = require_student_memory(teacher, batch=4, micro_batch=None)
    assert alone.images == 4 and require_student_memory(teacher, batch=4, micro_batch=3).images == 3
    monkeypatch.setattr(costs, "available_memory", lambda device: alone.needed + 9 * 10**6)
    assert require_student_memory(teacher, batch=4, micro_batch=None) == alone
    with pytest.raises(BadInput, match="for a student"):  # 10 of its 18 bytes per parameter are still to come, and stay
        require_student_memory(teacher, batch=4, micro_batch=None, beside=source)


@pytest.mark.parametrize("recipe", [gdfq, qimera, autorecon, ait])
def test_the_cost_is_said_before_the_first_step(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(None) as run:
        recipe(tiny_teacher(), run, steps=1, warmup=1, batch=4)
    said = " ".join(capsys.readouterr().err.split())
    for what in ("generator", "student"):
        words = rf"a {what} of [\d.]+ M parameters, [\d.]+ GMAC per image; a step on 4 images takes about"
        cost = re.search(words, said)
        assert cost is not None and cost.start() < said.index("calibrate")
