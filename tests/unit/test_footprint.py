"""Costs known before a run: counts against hand-made ones, and refusals that name the option to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny import tiny_teacher
from zsq import footprint as costs
from zsq.errors import BadInput
from zsq.footprint import available_memory, footprint
from zsq.recipes import ait, autorecon, qimera
from zsq.run import Run


def test_counts_by_hand() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 5))
        made = footprint(net, torch.zeros(2, 3, 8, 8))
    assert made.macs == 64 * 9 * 3 * 4 + 256 * 5
    assert made.parameters == 108 + 1285
    # the convolution keeps its input; the sigmoid its output, which the linear layer reads
    assert made.kept == 4 * (3 * 64 + 4 * 64)


def test_memory_of_this_machine() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is None or free > 2**20


@pytest.mark.parametrize("recipe", [qimera, autorecon])
def test_what_does_not_fit_is_refused_before_it_starts(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(free: int | None, **options: Any) -> None:
        monkeypatch.setattr(costs, "available_memory", lambda device: free)
        with Run(None, progress=False) as run:
            recipe(tiny_teacher(), run, **{"steps": 1, "warmup": 1, "batch": 4, **options})

    run(None)
    run(200 * 2**20)
    with pytest.raises(BadInput, match=r"--micro-batch 100000: .* GiB for a student .* or less"):
        run(200 * 2**20, batch=100_000)
    with pytest.raises(BadInput, match=r"--batch 100000: .* a generator of .* Use --batch \d+ or less"):
        run(200 * 2**20, batch=100_000, micro_batch=4)
    with pytest.raises(BadInput, match="no batch fits"):
        run(2**20)


@pytest.mark.parametrize("base", ["qimera", "autorecon"])
def test_as_a_base_too(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "available_memory", lambda device: 2**20)
    with Run(None, progress=False) as run, pytest.raises(BadInput, match="--batch"):
        ait(tiny_teacher(), run, base=base, steps=1, warmup=1, batch=4)


def test_the_cost_is_said_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Run(None) as run:
        autorecon(tiny_teacher(), run, steps=1, warmup=1, batch=4)
    said = capsys.readouterr().err
    assert "GMAC per image; a step on 4 images takes about" in said
    assert said.index("GMAC") < said.index("calibrate")
