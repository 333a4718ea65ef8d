"""A student's convolutions on integers: the products of codes are exact in 8 bits, at several times the float rate.

A convolution whose input and weight are both on a grid multiplies integers. The forward pass does just that: int8
products, int32 sums, one scale per output channel in float32. The backward pass multiplies in bfloat16, which holds the
input's integers exactly and rounds weight and incoming gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zsq.errors import RunFailed
from zsq.grid import Grid, encode
from zsq.insert.layers import is_plain_conv
from zsq.quantizer import LearnedStep, LiveMinMax, Quantizer
from zsq.quantizer.base import ObservedRange

_BLOCK = 1 << 17  # elements rounded at a time: seven passes over what is in the cache
TOP = 127  # largest integer: signed 8 bits, and bfloat16 is exact up to 256


def available(device: torch.device) -> bool:
    """Whether this build of torch has integer convolutions with float results here (oneDNN, on a CPU)."""
    operators = torch.ops.onednn
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(operators, "qconv2d_pointwise")


class _IntegerConv(torch.autograd.Function):
    """`x` is on the grid of its source; the gradient passes straight through the weight's rounding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, grid: Grid, codes: Tensor, in_inv: Tensor, peak: Tensor,
        options: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        stride, padding, dilation, groups = options
        whole = encode(weight, grid).add_(grid.zero)
        torch.maximum(peak, whole.abs().max(), out=peak)
        own = whole.to(torch.int8)
        scale = torch.reciprocal(grid.inv_step.flatten() * in_inv)
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        ctx.save_for_backward(codes, whole.div_(grid.inv_step), in_inv)
        ctx.options = options
        y: Tensor = torch.ops.onednn.qconv2d_pointwise(
            # Not its qconv_prepack, which reads every scale back to the host.
            codes.view(torch.uint8), 1.0, 0, own.to_mkldnn(), scale, zeros, None, stride, padding, dilation, groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, rounded, in_inv = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        half = torch.bfloat16
        kernel = rounded.to(half, memory_format=torch.channels_last)
        into_x, into_weight, _ = torch.ops.aten.convolution_backward(
            grad.to(half), codes.to(half), kernel, None, stride, padding, dilation, False, [0, 0], groups,
            [*ctx.needs_input_grad[:2], False],
        )  # fmt: skip
        # The codes of x are in units of its step.
        into_weight = None if into_weight is None else into_weight.float().div_(in_inv)
        return None if into_x is None else into_x.float(), into_weight, None, None, None, None, None


class _Rounding(torch.autograd.Function):
    """What a quantizer gives, bit for bit, and the integers behind it; straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inv_step: Tensor, zero: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        # int8, read as unsigned below: this conversion is vectorised, that to uint8 is not.
        y, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
        rows = max(1, _BLOCK * len(x) // max(1, x.numel()))
        for part, out, whole in zip(x.split(rows), y.split(rows), codes.split(rows), strict=True):
            torch.mul(part, inv_step, out=out).sub_(zero).round_().clamp_(qmin, qmax).add_(zero)
            whole.copy_(out)
            out.div_(inv_step)
        ctx.mark_non_differentiable(codes)
        return y, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


class _Remembering:
    """A forward for an activation quantizer that keeps the integers of what it gave last."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._given: Callable[[], Tensor | None] = lambda: None
        self._codes: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y, codes = _Rounding.apply(x, *self._quantizer.grid(x))
        self._given, self._codes = weakref.ref(y), codes
        return y

    def codes(self, x: Tensor) -> Tensor:
        """Integers of x: those kept, or found again if x has been pooled or reshaped since."""
        if self._codes is not None and self._given() is x:
            return self._codes
        # Truncation of n + 1/2 plus a rounding error: n.
        return torch.mul(x.detach(), self._quantizer.grid(x).inv_step).add_(0.5).to(torch.int8)


class IntegerPlan:
    """How one layer computes on integers, decided before a loop: nothing is read from a tensor within it.

    Args:
        layer: a plain convolution with a `weight_path`.
        name: of the layer.
        sources: the quantizer its input comes from, per call site; None where it computes in float.

    Attributes:
        name, layer, sources: as given.
        peak: largest integer of the weight so far, 0-dim.
    """

    def __init__(self, layer: Any, name: str, sources: tuple[Quantizer | None, ...]) -> None:
        self.name, self.sources, self.layer = name, sources, layer
        self._options = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        self.peak = torch.zeros(())

    def __call__(self, x: Tensor, site: int) -> Tensor | None:
        """The layer's output, or None if this call has to be computed in float."""
        source = self.sources[site] if site < len(self.sources) else None
        path = self.layer.weight_path
        if source is None or not path.active or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return None
        rounding = source.__dict__.get("forward")
        if not isinstance(rounding, _Remembering):  # this site rounds nothing at the moment
            return None
        weight, in_inv = self.layer.weight, source.grid(x).inv_step
        y: Tensor = _IntegerConv.apply(x, weight, path.quantizer.grid(weight), rounding.codes(x), in_inv, self.peak,
                                       self._options)  # fmt: skip
        return y if self.layer.bias is None else y + self.layer.bias[:, None, None]


def require_small(plans: Sequence[IntegerPlan]) -> None:
    """Refuse weights that left the integers since a loop began; reads their peaks.

    Args:
        plans: of the loop.

    Raises:
        RunFailed: if a weight did.
    """
    peaks = torch.stack([plan.peak for plan in plans]).tolist() if plans else []
    for plan, largest in zip(plans, peaks, strict=True):
        if largest > TOP:
            raise RunFailed(
                f"layer {plan.name}: expected weights whose integers stay within {TOP}, got {largest:.0f}: all weights "
                "of a channel have moved to one side, far from zero. Run it again with --precision float32."
            )


def plans(student: nn.Module) -> list[IntegerPlan]:
    """Find the layers of a student that can compute on integers.

    A convolution qualifies if its input is the output of frozen activation quantizers without negative values, its
    weight is rounded with a straight-through gradient, nothing is folded into it, and all integers are small. Half of
    the room is left free at the start, since the weights will move.

    Args:
        student: from `quantize`, its ranges frozen.
    """
    found = []
    for name, layer in student.named_modules():
        path: Any = getattr(layer, "weight_path", None)
        if path is None or not isinstance(layer, nn.Conv2d) or not is_plain_conv(layer) or not _suits(layer, path):
            continue
        sources = tuple(source if source is not None and _small(source) else None for source in path.inputs)
        if any(sources) and _largest(layer.weight, path.quantizer) <= TOP // 2:
            found.append(IntegerPlan(layer, name, sources))
    return found


def _suits(layer: Any, path: Any) -> bool:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or path.norm is not None or path.sources:
        return False
    weight: Any = path.quantizer
    straight = isinstance(weight, LiveMinMax) and not weight.clip_gradient and weight.axis == 0
    return straight and layer.weight.dtype == torch.float32 and available(layer.weight.device)


def _small(source: Quantizer) -> bool:
    """Whether all of a quantizer's values are integers from 0 to TOP; read once, before a loop."""
    if not isinstance(source, ObservedRange) or isinstance(source, LearnedStep) or source.observing:
        return False
    if source.axis is not None or source.clip_gradient or "forward" in source.__dict__:
        return False
    grid = source.grid()
    low, high = (int(grid.zero) + end for end in (grid.qmin, grid.qmax))
    return low >= 0 and high <= TOP


def _largest(weight: Tensor, quantizer: Quantizer) -> float:
    with torch.no_grad():
        grid = quantizer.grid(weight)
        return float(encode(weight, grid).add_(grid.zero).abs().max())


@contextmanager
def on_integers(student: nn.Module) -> Iterator[list[IntegerPlan]]:
    """Let the layers that can compute on integers do so within a ``with`` block.

    Args:
        student: from `quantize`, its ranges frozen.

    Yields:
        One plan per such layer, for `require_small` now and then.
    """
    chosen = plans(student)
    sources = {source for plan in chosen for source in plan.sources if source is not None}
    for source in sources:
        source.__dict__["forward"] = _Remembering(source)
    for plan in chosen:
        plan.layer.weight_path.integers = plan
    try:
        yield chosen
    finally:
        for plan in chosen:
            plan.layer.weight_path.integers = None
        for source in sources:
            del source.__dict__["forward"]
