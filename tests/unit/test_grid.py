"""The integer grid: golden codes, ties, gradients, graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from zsq.grid import (
    Grid,
    affine_grid,
    decode,
    encode,
    fake_quantize,
    learned_fake_quantize,
    learned_grid,
    symmetric_grid,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "quantizer.json").read_text(encoding="utf-8"))


def rows() -> Tensor:
    return torch.tensor([GOLDEN["rows"]["A"], GOLDEN["rows"]["B"]])


def column(entry: dict[str, float]) -> Tensor:
    return torch.tensor([[entry["A"]], [entry["B"]]])


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_golden_table(bits: int) -> None:
    x, want = rows(), GOLDEN["bits"][str(bits)]
    grid = affine_grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits)
    torch.testing.assert_close(grid.inv_step, column(want["inv_step"]), rtol=1e-6, atol=0)
    assert torch.equal(grid.zero, column(want["zero"]).float())
    assert encode(x, grid).tolist() == [want["codes"]["A"], want["codes"]["B"]]
    values = torch.tensor([want["values"]["A"], want["values"]["B"]])
    torch.testing.assert_close(fake_quantize(x, grid), values, rtol=0, atol=5.1e-7)


def test_golden_activation() -> None:
    want = GOLDEN["activation"]
    grid = affine_grid(*torch.tensor(want["range"]), want["bits"])
    torch.testing.assert_close(
        fake_quantize(torch.tensor(want["x"]), grid), torch.tensor(want["values"]), rtol=0, atol=5.1e-7
    )


def test_ties_go_to_even_codes() -> None:
    tie = GOLDEN["tie"]
    grid = Grid(torch.tensor(tie["inv_step"]), torch.tensor(float(tie["zero"])), -8, 7)
    assert torch.tensor(tie["x"]) * grid.inv_step - grid.zero == tie["position"]
    assert encode(torch.tensor(tie["x"]), grid) == tie["code"]
    unit = Grid(torch.tensor(1.0), torch.tensor(0.0), -8, 7)
    assert encode(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), unit).tolist() == [-2, 0, 0, 2, 2]


def test_order_of_operations_shows_in_the_bits() -> None:
    # Dividing by the inverse step and multiplying by the step differ in the last bit: the former is the contract.
    x = torch.rand(10_000)
    grid = affine_grid(torch.tensor(0.0), torch.tensor(0.9371), 4)
    by_hand = (torch.clamp(torch.round(x * grid.inv_step - grid.zero), -8, 7) + grid.zero) / grid.inv_step
    assert torch.equal(fake_quantize(x, grid), by_hand)
    assert torch.equal(decode(encode(x, grid), grid), by_hand)
    assert not torch.equal(torch.round(x * grid.inv_step) * (1 / grid.inv_step), by_hand)


def test_zero_is_exact_after_a_relu() -> None:
    grid = affine_grid(torch.tensor(0.0), torch.tensor(3.7), 4)
    assert grid.zero == 8
    assert fake_quantize(torch.zeros(1), grid) == 0


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_grid_is_narrow(bits: int) -> None:
    grid = symmetric_grid(torch.tensor(2.0), bits)
    top = 2 ** (bits - 1) - 1
    assert (grid.qmin, grid.qmax, grid.zero.item()) == (-top, top, 0.0)
    assert encode(torch.tensor([-9.0, -2.0, 0.0, 2.0, 9.0]), grid).tolist() == [-top, -top, 0, top, top]


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e4, 1e20])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_channel_is_kept(value: float, bits: int) -> None:
    x = torch.full((7,), value)
    out = fake_quantize(x, affine_grid(x.min(), x.max(), bits))
    # The zero is not integral to the last bit there: up to half the levels of a 1e-8 wide range are lost.
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-8)


# ---- straight-through gradients


def test_gradient_passes_unchanged_also_where_clipped() -> None:
    x = torch.linspace(-5, 5, 101, requires_grad=True)
    upstream = torch.randn(101)
    fake_quantize(x, affine_grid(torch.tensor(-1.0), torch.tensor(2.0), 4)).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_clip_gradient_masks_what_the_clamp_moved() -> None:
    x = torch.tensor([-1.0, -0.49, 0.0, 7.49, 7.51, 9.0], requires_grad=True)
    grid = Grid(torch.tensor(1.0), torch.tensor(0.0), 0, 7)
    fake_quantize(x, grid, clip_gradient=True).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]


def saved_tensors(clip_gradient: bool) -> list[Tensor]:
    kept: list[Tensor] = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = fake_quantize(x, symmetric_grid(torch.tensor(1.0), 4), clip_gradient=clip_gradient)
    # One node between x and y: no intermediate tensor is kept alive.
    assert y.grad_fn.next_functions[0][0].variable is x
    return kept


def test_graph_is_one_node_that_keeps_a_bool_mask_at_most() -> None:
    assert saved_tensors(clip_gradient=False) == []
    (mask,) = saved_tensors(clip_gradient=True)
    assert mask.dtype == torch.bool


def test_input_is_not_changed() -> None:
    x = torch.randn(50)
    before = x.clone()
    fake_quantize(x, symmetric_grid(torch.tensor(1.0), 4))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(500).to(dtype).requires_grad_()
    grid = affine_grid(torch.tensor(-1.3), torch.tensor(2.1), 8)
    y = fake_quantize(x, grid)
    assert y.dtype == torch.float32
    assert torch.equal(y, fake_quantize(x.float(), grid))
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_works_under_function_transforms_and_twice_differentiated() -> None:
    x = torch.randn(4, 6)
    grid = symmetric_grid(torch.tensor(1.0), 4)

    def loss(row: Tensor) -> Tensor:
        return fake_quantize(row, grid, clip_gradient=True).square().sum()

    assert torch.equal(torch.func.grad(loss)(x), 2 * fake_quantize(x, grid) * (x.abs() * grid.inv_step < 7.5))
    x.requires_grad_()
    (first,) = torch.autograd.grad(fake_quantize(x, grid).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.full_like(x, 2.0))


# ---- learned step


def plain_lsq_plus(
    x: Tensor, step: Tensor, offset: Tensor | None, bits: int, round_x: Tensor, round_offset: Tensor
) -> Tensor:
    """LSQ+ as one writes it with autograd; the rounding residuals are given, as constants: straight through."""
    levels = 2 ** (bits - 1) - 1 if offset is None else 2**bits - 1
    share = (x.numel() // step.numel() * levels) ** -0.5
    step = (step - step * share).detach() + step * share
    if offset is None:
        return (torch.clamp(x / step, -levels, levels) + round_x) * step
    offset = (offset - offset * share).detach() + offset * share
    first = offset / step + round_offset
    return (torch.clamp(x / step - first, 0, levels) + round_x + first) * step


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "symmetric"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
def test_learned_gradients_are_those_of_plain_autograd(bits: int, affine: bool, per_channel: bool) -> None:
    rng = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 40, generator=rng, dtype=torch.float64).requires_grad_()
    shape = (5, 1) if per_channel else ()
    step = (torch.rand(shape, generator=rng, dtype=torch.float64) + 1).mul(1.5 / 2**bits).requires_grad_()
    offset = torch.full(shape, -0.83, dtype=torch.float64, requires_grad=True) if affine else None
    inputs = [t for t in (x, step, offset) if t is not None]
    upstream = torch.randn(x.shape, generator=rng, dtype=torch.float64)

    y = learned_fake_quantize(x, step, offset, learned_grid(step, offset, bits))
    with torch.no_grad():
        first = torch.zeros(()) if offset is None else torch.round(offset / step)
        residual_offset = first - (0 if offset is None else offset / step)
        levels = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if offset is None else (0, 2**bits - 1)
        clipped = torch.clamp(x / step - first, *levels)
        residual = torch.round(clipped) - clipped
    assert (clipped != x / step - first).any() and (clipped == x / step - first).any()
    want = plain_lsq_plus(x, step, offset, bits, residual, residual_offset)

    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    got_grads = torch.autograd.grad(y, inputs, upstream)
    want_grads = torch.autograd.grad(want, inputs, upstream)
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_learned_step_gradient_by_hand() -> None:
    # LSQ's three cases with step 0.5, 3 bits (levels 3): inside -v + round(v), clipped the end code; n = 1 each.
    step = torch.tensor(0.5, requires_grad=True)
    for x, want in ((0.3, 1 - 0.6), (9.0, 3.0), (-9.0, -3.0), (1.5, 0.0)):
        grid = learned_grid(step, None, 3)
        (got,) = torch.autograd.grad(learned_fake_quantize(torch.tensor([x]), step, None, grid).sum(), step)
        assert got.item() == pytest.approx(want / 3**0.5, abs=1e-6)


def test_learned_gradient_straight_through_on_demand() -> None:
    x = torch.linspace(-9, 9, 21, requires_grad=True)
    step = torch.tensor(0.5)
    y = learned_fake_quantize(x, step, None, learned_grid(step, None, 4), clip_gradient=False)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(21))


def test_zeros_behind_a_relu_do_not_pull_at_the_offset() -> None:
    step, offset = torch.tensor(0.1), torch.zeros((), requires_grad=True)
    grid = learned_grid(step, offset, 4)
    (got,) = torch.autograd.grad(learned_fake_quantize(torch.zeros(100), step, offset, grid).sum(), offset)
    assert got == 0


@pytest.mark.parametrize("step", [-0.25, 0.0, -1e-30])
def test_learned_step_acts_by_its_magnitude(step: float) -> None:
    raw = torch.tensor(step, requires_grad=True)
    x = torch.randn(50)
    grid = learned_grid(raw, None, 4)
    y = learned_fake_quantize(x, raw, None, grid)
    assert torch.isfinite(y).all() and grid.inv_step > 0
    if step == -0.25:
        assert torch.equal(y, fake_quantize(x, learned_grid(-raw, None, 4)))
    positive = torch.tensor(max(abs(step), 1e-8), requires_grad=True)
    (got,) = torch.autograd.grad(y.sum(), raw)
    (want,) = torch.autograd.grad(
        learned_fake_quantize(x, positive, None, learned_grid(positive, None, 4)).sum(), positive
    )
    assert got == (want if step >= 0 else -want)
    assert got != 0  # a collapsed step can grow again


@pytest.mark.parametrize("offset", [-5.0, -0.3, 0.4, 5.0])
def test_learned_window_contains_zero_on_demand(offset: float) -> None:
    grid = learned_grid(torch.tensor(0.1), torch.tensor(offset), 4, include_zero=True)
    assert grid.qmin <= -grid.zero <= grid.qmax
    assert grid.zero == grid.zero.round()


def test_learned_x_gradient_numerically() -> None:
    # Away from the kinks, y is piecewise constant plus the straight-through identity: check the clipped part only.
    step = torch.tensor(0.5, dtype=torch.float64)
    grid = learned_grid(step, None, 3)
    x = torch.tensor([4.0, -7.0, 11.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: learned_fake_quantize(x, step, None, grid), (x,))
