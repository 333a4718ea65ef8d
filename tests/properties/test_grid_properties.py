"""What every grid must do for every input (hypothesis); the oracle is the same formula in numpy float32."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from zsq.grid import Grid, affine_grid, decode, encode, fake_quantize, learned_grid, symmetric_grid
from zsq.quantizer.ranges import least_error, min_max, percentile

BITS = st.integers(2, 8)
VALUES = st.floats(-100, 100, width=32, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=VALUES)


def affine(x: Tensor, bits: int) -> Grid:
    return affine_grid(*min_max(x, axis=0), bits)


def wide(x: Tensor, grid: Grid) -> Tensor:
    """Channels whose codes are exact integers in float32: the zero stays well below 2^24."""
    return (grid.zero.abs() < 2**20).expand(x.shape)


@given(ARRAYS, BITS)
def test_bits_equal_a_numpy_oracle(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    n, half = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    lo, hi = array.min(1, keepdims=True), array.max(1, keepdims=True)
    s = np.float32(1) / np.maximum(hi - lo, np.float32(1e-8)) * n  # as torch evaluates n / tensor
    z = np.round(s * lo) + half
    q = np.clip(np.round(array * s - z), -half, half - 1)
    grid = affine(x, bits)
    np.testing.assert_array_equal(encode(x, grid).numpy(), q)
    np.testing.assert_array_equal(fake_quantize(x, grid).numpy().view(np.int32), ((q + z) / s).view(np.int32))


@given(ARRAYS, BITS, st.floats(0.125, 3.0))
def test_codes_stay_inside_and_zero_is_integral(array: np.ndarray, bits: int, stretch: float) -> None:
    x = torch.from_numpy(array)
    for grid in (affine(x, bits), symmetric_grid(x.abs().amax(), bits), learned_grid(x.abs().amax(), x.amin(), bits)):
        codes = encode(x * stretch, grid)
        assert ((codes >= grid.qmin) & (codes <= grid.qmax)).all()
        assert torch.equal(codes, codes.round()) and torch.equal(grid.zero, grid.zero.round())
        assert grid.qmax - grid.qmin <= 2**bits - 1


@given(ARRAYS, BITS)
def test_idempotent_on_its_grid(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    for grid in (affine(x, bits), symmetric_grid(x.abs().amax(), bits)):
        once = fake_quantize(x, grid)
        keep = wide(x, grid)
        assert torch.equal(fake_quantize(once, grid)[keep], once[keep])


@given(ARRAYS, BITS)
def test_error_is_at_most_half_a_step_inside_the_window(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    for grid in (affine(x, bits), symmetric_grid(x.abs().amax(), bits)):
        bottom, top = decode(torch.tensor(grid.qmin), grid), decode(torch.tensor(grid.qmax), grid)
        inside = (x >= bottom) & (x <= top) & wide(x, grid)
        error = (fake_quantize(x, grid) - x).double().abs()
        # Float32 rounding of the value and of its position on the grid.
        slack = 4 * torch.finfo(torch.float32).eps * (x.abs() + (grid.zero.abs() + 2**bits) / grid.inv_step)
        assert (error <= 0.5 / grid.inv_step + slack)[inside].all()


@given(ARRAYS, BITS)
def test_clamp_never_bites_on_a_fresh_range(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    grid = affine(x, bits)
    position = x * grid.inv_step - grid.zero
    # Half a step is the tie that the upper end may lose (2^bits - 1 is odd).
    slack = 4 * torch.finfo(torch.float32).eps * (grid.zero.abs() + 2**bits)
    outside = (position < grid.qmin - 0.5 - slack) | (position > grid.qmax + 0.5 + slack)
    assert not outside[wide(x, grid)].any()


@given(ARRAYS, BITS)
def test_zero_point_flip_keeps_interior_values(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array)
    grid = affine(x, bits)
    moved = grid._replace(zero=grid.zero + 1)
    before, after = encode(x, grid), encode(x, moved)
    # Ties apart: half-even looks at the parity of the code, which the flip changes.
    position = x * grid.inv_step - grid.zero
    interior = (before > grid.qmin) & ((position - position.floor() - 0.5).abs() > 1e-3) & wide(x, grid)
    assert torch.equal(after[interior], before[interior] - 1)
    assert torch.equal(decode(after, moved)[interior], decode(before, grid)[interior])


@given(ARRAYS, BITS, st.booleans())
def test_gradient_is_identity_or_mask(array: np.ndarray, bits: int, clip: bool) -> None:
    x = torch.from_numpy(array).requires_grad_()
    grid = symmetric_grid(torch.tensor(10.0), bits)
    upstream = torch.arange(1.0, x.numel() + 1).reshape(x.shape)
    fake_quantize(x, grid, clip_gradient=clip).backward(upstream)
    with torch.no_grad():
        moved = torch.round(x * grid.inv_step).abs() > grid.qmax
    assert torch.equal(x.grad, upstream * ~moved if clip else upstream)


@given(ARRAYS, BITS)
def test_constant_and_zero_channels_are_finite(array: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(array).clone()
    x[0] = 0
    x[-1] = x[-1, 0]
    for grid in (affine(x, bits), symmetric_grid(min_max(x.abs(), 0)[1], bits)):
        y = fake_quantize(x, grid)
        assert torch.isfinite(y).all()
        assert (y[0] == 0).all()


@given(ARRAYS, st.floats(0.05, 1.0))
def test_percentile_keeps_its_share(array: np.ndarray, share: float) -> None:
    x = torch.from_numpy(array)
    lo, hi = percentile(x, None, share=share)
    ordered = np.sort(array, axis=None)
    cut = int(ordered.size * (1 - share) / 2 + 1e-6)
    assert (lo.item(), hi.item()) == (ordered[cut], ordered[ordered.size - 1 - cut])
    assert ((x >= lo) & (x <= hi)).float().mean() >= share - 1e-6


@given(ARRAYS, BITS, st.sampled_from([2.0, 2.4]))
def test_searched_range_is_never_worse_than_min_max(array: np.ndarray, bits: int, power: float) -> None:
    x = torch.from_numpy(array)
    lo, hi = least_error(x, 0, lambda lo, hi: affine_grid(lo, hi, bits), power=power, candidates=8)

    def error(grid: Grid) -> Tensor:
        return (fake_quantize(x, grid) - x).abs().pow(power).mean(1)

    assert (error(affine_grid(lo, hi, bits)) <= error(affine(x, bits)) * (1 + 1e-5) + 1e-12).all()
