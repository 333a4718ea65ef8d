"""What is ZeroQ's own: nothing is trained, statistics of groups or of single images, extremes of one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_teacher
from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.insert import activation_quantizers
from zsq.losses import bn_gap, statistics_gap
from zsq.presets import Outcome
from zsq.recipes import zeroq
from zsq.recipes.zeroq import BUDGETS, FIDELITY
from zsq.run import Run
from zsq.view import look

SHORT: dict[str, Any] = {"count": 16, "iterations": 30, "warmup": 2, "batch": 8}


def short_run(path: Path | None = None, **options: Any) -> Outcome:
    with Run(path, progress=False) as run:
        return zeroq(tiny_teacher(), run, **{**SHORT, **options})


def test_the_weights_are_the_teachers() -> None:
    outcome, teacher = short_run(), tiny_teacher()
    state = outcome.student.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in teacher.net.state_dict().items())
    assert not any(quantizer.observing for quantizer in activation_quantizers(outcome.student).values())
    assert outcome.plan["steps"] == 0


@pytest.mark.parametrize("statistics", ["batch", "image"])
def test_images_approach_the_statistics(statistics: str, tmp_path: Path) -> None:
    short_run(tmp_path / "run", statistics=statistics)
    images = load_tree(tmp_path / "run" / "pool.safetensors")["images"]
    net = tiny_teacher().net

    def gap(x: torch.Tensor) -> torch.Tensor:
        if statistics == "batch":
            return bn_gap(look(net, x, norms=True).norms)
        found = look(net, x, features=["1:input", "4:input"]).features
        layers = [(found[f"{i}:input"], net[i].running_mean, (net[i].running_var + 1e-6).sqrt()) for i in (1, 4)]
        return statistics_gap([*layers, (x, torch.zeros(1), torch.ones(1))])

    start = 2 * torch.rand(18, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert gap(images) < 0.5 * gap(start)
    assert "labels" not in load_tree(tmp_path / "run" / "pool.safetensors")


def test_published_numbers() -> None:
    assert BUDGETS["paper"]["iterations"] == 500 and BUDGETS["paper"]["warmup"] == 1
    assert FIDELITY["official"]["start"] == pytest.approx(0.0136, abs=1e-4)
    plan = short_run(fidelity="official").plan
    assert (plan["image_lr"], plan["statistics"], plan["ranges"]) == (0.5, "image", "ema")


def test_extremes_of_the_only_batch() -> None:
    outcome = short_run(fidelity="official", warmup=1)
    quantizer = next(iter(activation_quantizers(outcome.student).values()))
    x = outcome.source.draw(torch.Generator().manual_seed(0)).images
    with Run(None, progress=False) as run:
        x = outcome.source.draw(run.rng("calibrate", 0)).images
    top = tiny_teacher().net[:3](x).max()
    grid = quantizer.grid(x)
    highest = (grid.qmax + grid.zero) / grid.inv_step
    # Weights are quantized before the ranges are taken, so the maximum is only close.
    assert highest.item() == pytest.approx(top.item(), rel=0.25)


def test_unknown_statistics() -> None:
    with pytest.raises(BadInput, match="--statistics"):
        short_run(statistics="pixel")
