"""Flip ratios: no step, scaling, exactly k flips, oscillation; and on a run, against its stored codes."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zsq.analysis.flips import Codes, flip_ratios, flips
from zsq.analysis.subject import open_subject
from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.grid import encode
from zsq.quantizer import LiveMinMax


def codes_of(weight: Tensor) -> Codes:
    grid = LiveMinMax(4, axis=0).grid(weight)
    return Codes(encode(weight, grid).to(torch.int8), weight, grid)


def ramp() -> Tensor:
    """Two channels that hold every level 0 to 15 twice: a step of 1 inside the range changes one code."""
    return torch.arange(16.0).repeat(2, 2)


def test_no_step_no_flip() -> None:
    weight = torch.randn(8, 20)
    layer = flip_ratios([codes_of(weight), codes_of(weight.clone())])
    assert layer.own_grid == layer.fixed_grid == layer.moved_zeros == layer.step_flips == [0.0]
    assert layer.ever == 0 and layer.oscillation is None


def test_scaling_changes_no_code_but_crosses_thresholds() -> None:
    weight = torch.randn(8, 20)
    layer = flip_ratios([codes_of(weight), codes_of(2 * weight)])
    assert layer.own_grid == [0.0] and layer.fixed_grid[0] > 0.3 and layer.moved_zeros == [0.0]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_k_flips_are_k_over_n_in_all_variants(k: int) -> None:
    weight = ramp()
    moved = weight.clone()
    moved[0, 1 : 1 + k] += 1
    layer = flip_ratios([codes_of(weight), codes_of(moved)])
    assert layer.own_grid == layer.fixed_grid == layer.step_flips == [k / 64] and layer.ever == k / 64


def test_a_moving_maximum_shifts_codes_and_zero_points() -> None:
    weight = ramp() - 7.4
    moved = weight.clone()
    moved[0, [15, 31]] += 6  # the range of the first channel grows
    layer = flip_ratios([codes_of(weight), codes_of(moved)])
    assert layer.moved_zeros == [0.5]
    assert layer.fixed_grid == [0.0]  # beyond the last level the clamp holds it
    assert layer.own_grid[0] > 0.2


def test_one_weight_of_each_channel_moves_a_twentieth_of_the_codes() -> None:
    """The largest weight of each channel by 1 %: 4.3 % of the codes of a 32x16x3x3 layer, though none was crossed."""
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = weight.clone().flatten(1)
    moved[torch.arange(32), moved.argmax(1)] *= 1.01
    layer = flip_ratios([codes_of(weight), codes_of(moved.view_as(weight))])
    assert layer.own_grid[0] == pytest.approx(0.043, abs=0.0005) and layer.fixed_grid == [0.0]


def test_oscillation_is_seen() -> None:
    weight = ramp()
    there = weight.clone()
    there[1, 2:6] += 1
    stay = there.clone()
    stay[1, 3:6] -= 1
    back = flip_ratios([codes_of(w) for w in (weight, there, weight)])
    assert back.own_grid == [4 / 64, 4 / 64] and back.ever == 4 / 64 and back.oscillation is None
    partly = flip_ratios([codes_of(w) for w in (weight, there, stay)])
    assert partly.own_grid == [4 / 64, 3 / 64] and partly.oscillation == 7.0


def test_a_run_against_its_stored_codes(finished_run: Path) -> None:
    subject = open_subject(finished_run, count=4)
    result = flips(subject)
    assert result.steps == [0, 1, 2, 3] and result.complete
    stored = [load_tree(finished_run / "history" / f"{step:06d}.safetensors") for step in result.steps]
    for layer in result.layers:
        trail = [tree[f"{layer.name}.codes"] for tree in stored]
        want = [float((a != b).double().mean()) for a, b in pairwise(trail)]
        assert layer.own_grid == layer.step_flips == want and layer.size == trail[0].numel()
    assert max(max(layer.own_grid) for layer in result.layers) > 0  # gradient inundation sees to it
    whole = sum(x.size * x.own_grid[0] for x in result.layers) / sum(x.size for x in result.layers)
    assert result.ratio("own_grid", 0) == whole
    assert list(result.table())[:2] == ["steps 0 to 1", "steps 2 to 3"]


def test_step_flips_need_every_step(run_copy: Path) -> None:
    (run_copy / "history" / "000001.safetensors").unlink()
    result = flips(open_subject(run_copy, count=4))
    assert result.steps == [0, 2, 3] and all(layer.step_flips is None for layer in result.layers)


def test_without_history(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "history")
    with pytest.raises(BadInput, match="expected a history of at least two snapshots .*, got 0. Quantize again"):
        flips(open_subject(run_copy, count=4))
