"""A student's convolutions on integers: the products of codes are exact in 8 bits, at several times the float rate.

A convolution whose input and weight are both on a grid multiplies integers. The forward pass does just that: int8
products, int32 sums, one scale per output channel in float32. The backward pass multiplies in bfloat16, which holds the
input's integers exactly and rounds weight and incoming gradient. A frozen BatchNorm behind it is another scale and an
offset per channel: it needs no pass of its own, forward or backward.
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
from zsq.insert.graph import norms_behind
from zsq.insert.layers import is_plain_conv
from zsq.precision import half_gradient_holds
from zsq.quantizer import LearnedStep, LiveMinMax, Quantizer
from zsq.quantizer.base import ObservedRange

_BLOCK = 1 << 17  # elements rounded at a time: seven passes over what is in the cache
_DEAD = 0.01  # of the widest channel's range
TOP = 127  # largest integer: signed 8 bits, and bfloat16 is exact up to 256


def available(device: torch.device) -> bool:
    """Whether this build of torch has integer convolutions with float results here (oneDNN, on a CPU)."""
    operators = torch.ops.onednn
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(operators, "qconv2d_pointwise")


class _IntegerConv(torch.autograd.Function):
    """`x` is on the grid of its source; the gradient passes straight through the weight's rounding.

    With `stats` (mean and inverse deviation of a BatchNorm) the result is ``gamma * (conv - mean) * inverse + beta``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, grid: Grid, codes: Tensor,
        in_inv: Tensor, peak: Tensor, options: tuple[Any, ...], stats: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        stride, padding, dilation, groups = options
        whole = encode(weight, grid).add_(grid.zero)
        torch.maximum(peak, whole.abs().max(), out=peak)
        own = whole.to(torch.int8)
        scale, factor, shift = torch.reciprocal(grid.inv_step.flatten() * in_inv), None, None
        if stats is not None:
            factor = stats[1] if gamma is None else gamma * stats[1]
            scale, shift = scale * factor, torch.addcmul(torch.zeros(()) if beta is None else beta, -stats[0], factor)
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        ctx.save_for_backward(codes, whole.div_(grid.inv_step), in_inv, factor, *(stats or ()))
        ctx.options = options
        y: Tensor = torch.ops.onednn.qconv2d_pointwise(
            # Not its qconv_prepack, which reads every scale back to the host.
            codes.view(torch.uint8), 1.0, 0, own.to_mkldnn(), scale, zeros, shift, stride, padding, dilation, groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, rounded, in_inv, factor, *stats = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        needs_x, needs_weight, *needs_norm = ctx.needs_input_grad[:4]
        half = torch.bfloat16
        kernel = rounded if factor is None else rounded * factor[:, None, None, None]
        wanted = [needs_x, needs_weight or any(needs_norm), any(needs_norm)]
        into_x, into_weight, total = torch.ops.aten.convolution_backward(
            grad.to(half), codes.to(half), kernel.to(half, memory_format=torch.channels_last), [len(kernel)],
            stride, padding, dilation, False, [0, 0], groups, wanted,
        )  # fmt: skip
        into_x = None if into_x is None else into_x.float()
        # The codes of x are in units of its step.
        into_weight = None if into_weight is None else into_weight.float().div_(in_inv)
        into_gamma = into_beta = None
        if any(needs_norm):
            into_beta, (mean, inverse) = total.float(), stats
            # The sum of gradient times result, which the gradient of the weight has summed already.
            product = (rounded * into_weight).flatten(1).sum(1)
            into_gamma = product.sub_(mean * into_beta).mul_(inverse)
        if factor is not None and into_weight is not None:
            into_weight.mul_(factor[:, None, None, None])
        return into_x, into_weight, into_gamma, into_beta, None, None, None, None, None, None


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


class _Normalised:
    """A forward for a frozen BatchNorm that gives back what the convolution before it has normalised already."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self._norm = norm
        self.given: Callable[[], Tensor | None] = lambda: None

    def __call__(self, input: Tensor) -> Tensor:
        return input if self.given() is input else nn.BatchNorm2d.forward(self._norm, input)


class IntegerPlan:
    """How one layer computes on integers, decided before a loop: nothing is read from a tensor within it.

    Args:
        layer: a plain convolution with a `weight_path`.
        name: of the layer.
        sources: the quantizer its input comes from, per call site; None where it computes in float.
        norm: a BatchNorm with running statistics that is the only reader of the layer's only call, and has no other.

    Attributes:
        name, layer, sources, norm: as given.
        peak: largest integer of the weight so far, 0-dim.
    """

    def __init__(
        self, layer: Any, name: str, sources: tuple[Quantizer | None, ...], norm: nn.BatchNorm2d | None = None
    ) -> None:
        self.name, self.sources, self.layer, self.norm = name, sources, layer, norm
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
        gamma, beta, stats, normalised = self._norm_now()
        y: Tensor = _IntegerConv.apply(x, weight, gamma, beta, path.quantizer.grid(weight), rounding.codes(x), in_inv,
                                       self.peak, self._options, stats)  # fmt: skip
        if normalised is not None:
            normalised.given = weakref.ref(y)
        return y if self.layer.bias is None else y + self.layer.bias[:, None, None]

    def _norm_now(self) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None, _Normalised | None]:
        """The BatchNorm's factors and statistics and its forward; nothing where it has to be apart."""
        norm: Any = self.norm
        normalised = None if norm is None else norm.__dict__.get("forward")
        watched = norm is None or norm._forward_pre_hooks or norm._forward_hooks or self.layer._forward_hooks
        if watched or norm.training or not isinstance(normalised, _Normalised):
            return None, None, None, None
        stats = norm.running_mean, torch.rsqrt(norm.running_var + norm.eps)
        return norm.weight, norm.bias, stats, normalised


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
    weight is rounded with a straight-through gradient, nothing is folded into it, its bfloat16 gradient is right
    (`zsq.precision.half_gradient_holds`), no channel is dead beside the others, and all integers are small. Half of the
    room is left free at the start, since the weights will move.

    Args:
        student: from `quantize`, its ranges frozen.
    """
    found, norms = [], norms_behind(student)
    for name, layer in student.named_modules():
        path: Any = getattr(layer, "weight_path", None)
        if path is None or not isinstance(layer, nn.Conv2d) or not is_plain_conv(layer) or not _suits(layer, path):
            continue
        sources = tuple(source if source is not None and _small(source) else None for source in path.inputs)
        if any(sources) and _alive(layer.weight) and _largest(layer.weight, path.quantizer) <= TOP // 2:
            found.append(IntegerPlan(layer, name, sources, norms.get(name) if layer.bias is None else None))
    return found


def _suits(layer: Any, path: Any) -> bool:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or path.norm is not None or path.sources:
        return False
    if not half_gradient_holds(layer):
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


def _alive(weight: Tensor) -> bool:
    """Whether all channels have a range to speak of: a dead one leaves the integers with the first step of an Adam."""
    rows = weight.detach().flatten(1)
    ranges = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    return bool((ranges >= _DEAD * ranges.max()).all())


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
        if plan.norm is not None and "forward" not in plan.norm.__dict__:
            plan.norm.__dict__["forward"] = _Normalised(plan.norm)
    try:
        yield chosen
    finally:
        for plan in chosen:
            plan.layer.weight_path.integers = None
            if plan.norm is not None and isinstance(plan.norm.__dict__.get("forward"), _Normalised):
                del plan.norm.__dict__["forward"]
        for source in sources:
            del source.__dict__["forward"]
