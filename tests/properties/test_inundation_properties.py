"""Gradient inundation: the exact factor is the order statistic it claims to be, whatever the weights and the step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zsq.grid import Grid, affine_grid
from zsq.inundation import GradientInundation, crossing_times, flip_count


class Weight:
    """Per-channel minimum and maximum, affine; with `mirrored`, odd channels have a negative inverse step."""

    def __init__(self, parameter: nn.Parameter, bits: int, mirrored: bool) -> None:
        self.parameter, self.bits, self.mirrored = parameter, bits, mirrored

    def grid(self, values: Tensor | None = None) -> Grid:
        values = (self.parameter if values is None else values).detach()
        sign = torch.ones(len(values), *[1] * (values.dim() - 1), dtype=values.dtype)
        if self.mirrored:
            sign[1::2] = -1
        dims = tuple(range(1, values.dim()))
        grid = affine_grid(
            (sign * values).amin(dims, keepdim=True), (sign * values).amax(dims, keepdim=True), self.bits
        )
        return grid._replace(inv_step=grid.inv_step * sign)


def codes(values: Tensor, grid: Grid) -> Tensor:
    return (values * grid.inv_step - grid.zero).round().clamp(grid.qmin, grid.qmax)


layers = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "shape": st.sampled_from([(1, 3), (3, 7), (10, 64), (8, 4, 3, 3), (16, 1, 3, 3)]),
        "bits": st.integers(2, 8),
        "mirrored": st.booleans(),
        "sparse": st.booleans(),
        "offset": st.sampled_from([0.0, 0.5]),
        "flip_rate": st.sampled_from([1e-7, 1e-3, 1e-2, 0.1, 0.5, 1.0]),
        "lr": st.sampled_from([1e-9, 1e-7, 1e-4, 1e-2, 1.0]),
    }
)


def layer(case: dict, dtype: torch.dtype = torch.float32) -> tuple[Weight, GradientInundation, torch.optim.SGD]:
    rng = torch.Generator().manual_seed(case["seed"])
    parameter = nn.Parameter(torch.randn(case["shape"], generator=rng, dtype=dtype) * 0.1 + case["offset"] * 0.1)
    parameter.grad = torch.randn(case["shape"], generator=rng, dtype=dtype)
    if case["sparse"]:
        parameter.grad *= torch.rand(case["shape"], generator=rng) < 0.2
    weight = Weight(parameter, case["bits"], case["mirrored"])
    optimizer = torch.optim.SGD([parameter], lr=case["lr"])
    return weight, GradientInundation(optimizer, [weight], flip_rate=case["flip_rate"]), optimizer


@given(layers)
def test_enough_codes_flip_or_it_is_impossible(case: dict) -> None:
    weight, inundation, optimizer = layer(case)
    grid, start = weight.grid(), weight.parameter.detach().clone()
    optimizer.step()
    now, factor = weight.parameter.detach(), inundation.factors.item()
    needed = flip_count(case["flip_rate"], start.numel())
    flips = (codes(now, grid) != codes(start, grid)).sum()
    outwards = torch.where(weight.parameter.grad * grid.inv_step > 0, grid.qmin, grid.qmax)
    movable = ((codes(start, grid) != outwards) & (weight.parameter.grad != 0)).sum()
    assert torch.isfinite(now).all()
    assert factor >= 1
    assert flips >= needed or (factor == 1 and movable < needed)


@given(layers)
def test_the_factor_is_the_smallest_that_is_enough(case: dict) -> None:
    weight, inundation, optimizer = layer(case, torch.float64)
    grid, start, gradient = weight.grid(), weight.parameter.detach().clone(), weight.parameter.grad
    optimizer.step()
    factor = inundation.factors.item()
    needed = flip_count(case["flip_rate"], start.numel())
    for side, enough in ((1 - 1e-9, False), (1 + 1e-9, True)):
        at = factor / (1 + 1e-3) * side  # without the overshoot, a little less and a little more
        flips = codes(start - case["lr"] * at * gradient, grid) != codes(start, grid)
        assert factor == 1 or (flips.sum() >= needed) == enough


@given(layers, st.sampled_from([0.5, 1e-3, 1e-6]))
def test_the_learning_rate_does_not_matter_to_an_inundated_layer(case: dict, scale: float) -> None:
    weight, inundation, optimizer = layer(case)
    scaled, scaled_inundation, scaled_optimizer = layer(case | {"lr": case["lr"] * scale})
    optimizer.step()
    scaled_optimizer.step()
    if inundation.factors.item() > 1:
        assert scaled_inundation.factors.item() == pytest.approx(inundation.factors.item() / scale, rel=1e-4)
        torch.testing.assert_close(scaled.parameter, weight.parameter, rtol=1e-5, atol=1e-6)


@given(layers, st.sampled_from(["zero", "none", "no learning rate"]))
def test_without_a_step_nothing_moves(case: dict, kind: str) -> None:
    weight, inundation, optimizer = layer(case | {"lr": 0.0} if kind == "no learning rate" else case)
    if kind != "no learning rate":
        weight.parameter.grad = None if kind == "none" else torch.zeros_like(weight.parameter)
    start = weight.parameter.detach().clone()
    optimizer.step()
    assert inundation.factors.tolist() == [1.0]
    assert torch.equal(weight.parameter, start)


@given(st.lists(st.tuples(st.floats(-12, 12), st.floats(-3, 3)), min_size=1, max_size=20), st.integers(2, 4))
def test_crossing_times_against_a_scan(pairs: list[tuple[float, float]], bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    position, rate = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    rate = torch.where(rate.abs() < 1e-3, 0.0, rate)
    times = crossing_times(position, rate, low, high)
    # Also from a boundary itself the code after any tiny motion counts, not what half-to-even made of the tie.
    start = position.round().clamp(low, high)
    for factor in torch.logspace(-6, 6, 200, dtype=torch.float64):
        changed = (position + factor * rate).round().clamp(low, high) != start
        clear = (times - factor).abs() > 1e-9 * factor + 1e-9
        assert torch.equal(changed[clear], (times < factor)[clear])
