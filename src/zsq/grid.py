"""Uniform integer grids: from a range to codes and back, with straight-through gradients. Pure functions, torch only.

Every operation keeps one order of evaluation: multiply by the inverse step, subtract the integral zero, round half to
even, clamp; then add the zero and divide by the inverse step. Any other order differs in the last bit and flips ties.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

# Floor of a range's width: a constant channel gets a huge but finite inverse step and passes (almost) unchanged.
_MIN_WIDTH = 1e-8
# Floor of a learned step: keeps 1 / step finite whatever an optimizer does.
_MIN_STEP = 1e-8
# Elements that a backward pass handles at a time on a CPU: its dozen passes then stay in the cache.
_BLOCK = 1 << 16


class Grid(NamedTuple):
    """Which numbers a quantized tensor can hold: ``(q + zero) / inv_step`` for the integers q from qmin to qmax.

    Attributes:
        inv_step: steps per unit of x (the inverse of the step size), float; broadcasts against x.
        zero: integral offset of the codes, float; broadcasts against x. 0.0 is on the grid iff -zero is a code.
        qmin: smallest signed code.
        qmax: largest signed code.
    """

    inv_step: Tensor
    zero: Tensor
    qmin: int
    qmax: int


def affine_grid(lo: Tensor, hi: Tensor, bits: int) -> Grid:
    """Grid of 2^bits levels over [lo, hi], its offset rounded to an integer so that 0 falls on a (virtual) level.

        inv_step = (2^bits - 1) / max(hi - lo, 1e-8)        zero = round(inv_step * lo) + 2^(bits-1)

    Args:
        lo: lower end of the range, in units of x; any shape that broadcasts against x.
        hi: upper end, same shape.
        bits: number of bits of a code.

    Returns:
        A grid with signed codes -2^(bits-1) .. 2^(bits-1)-1. Since the offset is rounded, the representable window is
        [lo, hi] moved by at most half a step.

    Source: the quantizer of ZeroQ (Cai et al., CVPR 2020), shared by GDFQ, Qimera, AIT, IntraQ and HAST.

    Example:
        >>> grid = affine_grid(torch.tensor(-0.9), torch.tensor(1.1), bits=4)
        >>> encode(torch.tensor([-0.9, -0.2, 0.0, 0.35, 1.1]), grid)
        tensor([-8., -2., -1.,  2.,  7.])
    """
    half = 2 ** (bits - 1)
    # Not a division: torch evaluates number / tensor as number * (1 / tensor), and so does all released code.
    inv_step = torch.reciprocal(torch.clamp(hi - lo, min=_MIN_WIDTH)) * (2**bits - 1)
    zero = torch.round(inv_step * lo) + half
    return Grid(inv_step, zero, -half, half - 1)


def symmetric_grid(bound: Tensor, bits: int) -> Grid:
    """Grid over [-bound, bound] with zero 0 and as many negative as positive codes (narrow range).

    Args:
        bound: largest magnitude to represent, in units of x, >= 0; any shape that broadcasts against x.
        bits: number of bits of a code.

    Returns:
        A grid with codes -(2^(bits-1)-1) .. 2^(bits-1)-1, inv_step = (2^(bits-1)-1) / max(bound, 1e-8).

    Example:
        >>> decode(torch.tensor([-3.0, 0.0, 1.0]), symmetric_grid(torch.tensor(1.5), bits=3))
        tensor([-1.5000,  0.0000,  0.5000])
    """
    top = 2 ** (bits - 1) - 1
    inv_step = torch.reciprocal(torch.clamp(bound, min=_MIN_WIDTH)) * top
    return Grid(inv_step, torch.zeros_like(inv_step), -top, top)


def learned_grid(step: Tensor, offset: Tensor | None, bits: int, *, include_zero: bool = False) -> Grid:
    """Grid of a learned step and a learned offset.

    Args:
        step: learned step size, in units of x; its magnitude is used, floored at 1e-8, so that it is always positive.
        offset: learned lower end of the window, in units of x, rounded to a whole number of steps;
            None for a symmetric grid.
        bits: number of bits of a code.
        include_zero: move the offset as far as needed for 0 to lie inside the window.

    Returns:
        A detached grid: affine with an offset, symmetric (narrow) without.

    Source: LSQ+ (Bhalgat et al., CVPR Workshops 2020); the offset is rounded so that integers can execute it.
    """
    inv_step = 1 / torch.clamp(step.detach().abs(), min=_MIN_STEP)
    top = 2 ** (bits - 1) - 1
    if offset is None:
        return Grid(inv_step, torch.zeros_like(inv_step), -top, top)
    first = torch.round(offset.detach() * inv_step)
    if include_zero:
        first = torch.clamp(first, min=1 - 2**bits, max=0)
    return Grid(inv_step, first + (top + 1), -top - 1, top)


def encode(x: Tensor, grid: Grid) -> Tensor:
    """Integer codes of x: ``clamp(round(x * inv_step - zero), qmin, qmax)``, half to even.

    Args:
        x: values; half precision is computed in float32.
        grid: where to round to.

    Returns:
        Signed codes, same shape as x, as a float tensor (float32, or float64 if x or the grid is).
    """
    return _position(x, grid).round_().clamp_(grid.qmin, grid.qmax)


def decode(q: Tensor, grid: Grid) -> Tensor:
    """Values of codes: ``(q + zero) / inv_step``.

    Args:
        q: signed codes, of any dtype.
        grid: the grid they were encoded with.

    Returns:
        Values, same shape as q, in the grid's floating type.
    """
    return (q + grid.zero) / grid.inv_step


def fake_quantize(x: Tensor, grid: Grid, *, clip_gradient: bool = False) -> Tensor:
    """Round x to the grid; the gradient passes straight through to x (and never reaches the grid).

    Args:
        x: values of any shape the grid broadcasts against; half precision is computed in float32.
        grid: where to round to.
        clip_gradient: stop the gradient of values the clamp moved. Off, as in the GDFQ family: identity everywhere.

    Returns:
        ``decode(encode(x, grid), grid)``, bit for bit; float32, or float64 if x or the grid is.

    Example:
        >>> x = torch.tensor([0.0, 0.3, 0.7, 5.0], requires_grad=True)
        >>> y = fake_quantize(x, affine_grid(torch.tensor(0.0), torch.tensor(2.5), bits=4), clip_gradient=True)
        >>> y.detach()
        tensor([0.0000, 0.3333, 0.6667, 2.5000])
        >>> torch.autograd.grad(y.sum(), x)[0]
        tensor([1., 1., 1., 0.])
    """
    y: Tensor = _StraightThrough.apply(x, *grid, clip_gradient)[0]
    return y


def learned_fake_quantize(
    x: Tensor, step: Tensor, offset: Tensor | None, grid: Grid, *, clip_gradient: bool = True
) -> Tensor:
    """Round x to the grid of a learned step (and offset) and give all of them the gradients of LSQ+.

    With v = x / step - round(offset / step), and c the code (all counted from the lower end of the window):

        inside the window    dy/dx = 1, dy/dstep = round(v) - v, dy/doffset = 0
        clipped              dy/dx = 0, dy/dstep = c + round(offset/step) - offset/step, dy/doffset = 1

    The gradients of step and offset are scaled by 1 / sqrt(n * levels), n being the number of values that share a step
    and levels the largest code (2^bits - 1 affine, 2^(bits-1) - 1 symmetric). A value exactly on an end of the window
    counts as inside: otherwise every zero behind a ReLU would pull at the offset.

    Args:
        x: values of any shape the step broadcasts against; half precision is computed in float32.
        step: learned step; trainable. A negative one acts by its magnitude, and its gradient is that of the magnitude.
        offset: learned lower end, or None for a symmetric grid; trainable.
        grid: ``learned_grid(step, offset, bits)``.
        clip_gradient: give x no gradient where it is clipped, as published; False: straight through everywhere.

    Returns:
        The same values as ``fake_quantize(x, grid)``.

    Source: LSQ (Esser et al., ICLR 2020); LSQ+ (Bhalgat et al., CVPR Workshops 2020).
    """
    y: Tensor = _LearnedStep.apply(x, step, offset, *grid, clip_gradient)
    return y


def _position(x: Tensor, grid: Grid) -> Tensor:
    """Unrounded code of x, as a new tensor."""
    # Explicit: a half-precision x times a 0-dim float32 tensor would stay in half precision.
    return torch.mul(x.to(torch.promote_types(x.dtype, torch.float32)), grid.inv_step).sub_(grid.zero)


class _StraightThrough(Function):
    """Fake quantization as one node of the autograd graph; keeps nothing but a bool mask, and that only on demand."""

    @staticmethod
    def forward(
        x: Tensor,
        inv_step: Tensor,
        zero: Tensor,
        qmin: int,
        qmax: int,
        clip: bool,  # noqa: FBT001 (apply: by position)
    ) -> tuple[Tensor, Tensor | None]:
        y = _position(x, Grid(inv_step, zero, qmin, qmax)).round_()
        inside = ((y >= qmin) & (y <= qmax)) if clip else None
        return y.clamp_(qmin, qmax).add_(zero).div_(inv_step), inside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.dtype = inputs[0].dtype
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        grad_x = grad if inside is None else grad * inside
        return grad_x.to(ctx.dtype), None, None, None, None, None


class _LearnedStep(Function):
    """Keeps its inputs only: x is alive anyway in most networks, and recomputing the codes is one elementwise pass."""

    @staticmethod
    def forward(
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        inv_step: Tensor,
        zero: Tensor,
        qmin: int,
        qmax: int,
        clip: bool,  # noqa: FBT001 (apply: by position)
    ) -> Tensor:
        return encode(x, Grid(inv_step, zero, qmin, qmax)).add_(zero).div_(inv_step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.qmin, ctx.qmax, ctx.clip = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, offset, inv_step, zero = ctx.saved_tensors
        grid = Grid(inv_step, zero, ctx.qmin, ctx.qmax)
        # The offset is rounded in the forward pass only: clipped values keep its rounding error in their slope.
        rounding = torch.zeros_like(zero) if offset is None else zero - offset * inv_step
        rows = len(x) if step.dim() or x.device.type != "cpu" else max(1, _BLOCK * len(x) // max(1, x.numel()))
        grad_x, sums = torch.empty_like(x), []
        for values, given, into in zip(x.split(rows), grad.split(rows), grad_x.split(rows), strict=True):
            passed, slope, clipped = _learned_slopes(values, given, grid, rounding)
            into.copy_(passed if ctx.clip else given)
            sums.append(torch.stack([slope.sum_to_size(step.shape), clipped.sum_to_size(step.shape)]))
        grad_step, grad_offset = torch.stack(sums).sum(0).unbind()

        levels = ctx.qmax if offset is None else ctx.qmax - ctx.qmin
        scale = 1 / math.sqrt(x.numel() // max(step.numel(), 1) * levels)
        grad_step = grad_step * torch.where(step < 0, -1.0, 1.0) * scale
        return grad_x, grad_step, None if offset is None else grad_offset * scale, None, None, None, None, None


def _learned_slopes(x: Tensor, grad: Tensor, grid: Grid, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a gradient is worth, value by value: to x inside the window, to the step, to the offset outside it."""
    position = _position(x, grid)
    bound = position.clamp(grid.qmin, grid.qmax)
    inside = bound == position
    passed = torch.where(inside, grad, 0.0)
    slope = torch.where(inside, bound.round().sub_(position), bound.add_(rounding)).mul_(grad)
    return passed, slope, grad - passed
