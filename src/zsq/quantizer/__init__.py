"""Quantizers: a grid whose range is chosen from data. One per weight, one per call site of an activation.

* LiveMinMax (weights): the range of the tensor itself, at every call.
* RunningMinMax (activations): average of the batches' extremes.
* WideningMinMax (activations): extremes of everything seen.
* Percentile (activations): average of the batches' ranges without the outermost values.
* MseRange (both): the shrunken range with the least error.
* LearnedStep (both): step and offset trained with the network, initialised like MseRange.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.grid import Grid, learned_fake_quantize, learned_grid
from zsq.quantizer.base import ObservedRange, Quantizer
from zsq.quantizer.ranges import least_error, min_max, percentile

__all__ = ["LearnedStep", "LiveMinMax", "MseRange", "ObservedRange", "Percentile", "Quantizer", "RunningMinMax",
           "WideningMinMax"]  # fmt: skip


class LiveMinMax(Quantizer):
    """Range = minimum and maximum of the tensor itself, at every call. No state: `freeze` has nothing to fix.

    Args: see `Quantizer`.

    Source: the weight quantizer of ZeroQ, GDFQ, Qimera, AIT, IntraQ and HAST (there with axis=0).

    Example:
        >>> w = torch.tensor([[-0.9, -0.2, 0.0, 0.35, 1.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
        >>> LiveMinMax(4, axis=0).codes(w)
        tensor([[-8, -2, -1,  2,  7],
                [-8, -4, -1,  3,  7]], dtype=torch.int8)
    """

    def grid(self, x: Tensor) -> Grid:
        """Grid of min and max of x."""
        with torch.no_grad():
            return self._range_grid(*min_max(x, self.axis))


class RunningMinMax(ObservedRange):
    """Average of the minimum and of the maximum of every batch.

    Args:
        correction: "once" divides the average by 1 - momentum^t when it is read; "official" divides the stored value at
            every step, as the released code of the GDFQ family does: a constant 1 then reads 1, 5.3, 17.8, 47 ... 3945
            (21 batches) ... 3.6 (100) ... 1.0 (250).
        bits, axis, symmetric, include_zero, clip_gradient: see `Quantizer`.
        momentum: see `ObservedRange`.

    Source: GDFQ (Xu et al., ECCV 2020), activation ranges.

    Example:
        >>> quantizer = RunningMinMax(4)
        >>> quantizer(torch.tensor([0.0, 1.2, 2.5]))
        tensor([0.0000, 1.1667, 2.5000])
        >>> quantizer.freeze()
        >>> quantizer(torch.tensor([0.3, 5.0]))
        tensor([0.3333, 2.5000])
    """

    def __init__(
        self,
        bits: int,
        *,
        axis: int | None = None,
        symmetric: bool = False,
        include_zero: bool = False,
        clip_gradient: bool = False,
        momentum: float = 0.9,
        correction: str = "once",
    ) -> None:
        super().__init__(
            bits,
            axis=axis,
            symmetric=symmetric,
            include_zero=include_zero,
            clip_gradient=clip_gradient,
            momentum=momentum,
        )
        if correction not in ("once", "official"):
            fix = "Choose 'once' unless you reproduce released code."
            raise BadInput("correction of a range", expected="'once' or 'official'", got=repr(correction), fix=fix)
        self.correction = correction

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum."""
        return min_max(x, self.axis)

    def _average(self, old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        if self.correction == "official":
            return (old * self.momentum + new * (1 - self.momentum)) / weight
        return super()._average(old, new, weight)


class WideningMinMax(ObservedRange):
    """Extremes of everything seen while observing: the range only ever widens, one outlier stays for good.

    Args:
        bits, axis, symmetric, include_zero, clip_gradient: see `Quantizer`.
        momentum: not used, as in the released code, which declares it.

    Source: ZAQ (arXiv 2103.15263), activation ranges of the released code.

    Example:
        >>> quantizer = WideningMinMax(4)
        >>> _ = quantizer(torch.tensor([0.0, 3.0])), quantizer(torch.tensor([-1.0, 2.0]))
        >>> quantizer.lo.item(), quantizer.hi.item()
        (-1.0, 3.0)
    """

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of x and of all before it."""
        lo, hi = min_max(x, self.axis)
        return (torch.minimum(lo, self.lo), torch.maximum(hi, self.hi)) if self._observed else (lo, hi)

    def _average(self, old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        return new


class Percentile(ObservedRange):
    """Average over the batches of the range that keeps the middle `share` of the values.

    Args:
        share: share of the values inside the range, in (0, 1]; half of the others is left out at each end.
        bits, axis, symmetric, include_zero, clip_gradient: see `Quantizer`.
        momentum: see `ObservedRange`.

    Source: percentile calibration as in TensorRT-style toolkits; exact order statistics, see `ranges.percentile`.
    """

    def __init__(
        self,
        bits: int,
        *,
        axis: int | None = None,
        symmetric: bool = False,
        include_zero: bool = False,
        clip_gradient: bool = False,
        momentum: float = 0.9,
        share: float = 0.9999,
    ) -> None:
        super().__init__(
            bits,
            axis=axis,
            symmetric=symmetric,
            include_zero=include_zero,
            clip_gradient=clip_gradient,
            momentum=momentum,
        )
        if not 0 < share <= 1:
            fix = "0.9999 leaves out one value in ten thousand."
            raise BadInput("share of Percentile", expected="0 < share <= 1", got=share, fix=fix)
        self.share = share

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Order statistics at both ends."""
        return percentile(x, self.axis, share=self.share)


class MseRange(ObservedRange):
    """Average over the batches of the shrunken min/max range with the least mean |x - Q(x)|^power.

    The search runs while observing only. As a weight's quantizer it follows the weight until `freeze` and has a fixed
    range afterwards: freeze it before training.

    Args:
        power: exponent of the error, > 0.
        candidates: number of shrink factors tried, from 1 down to 0.2, >= 1.
        bits, axis, symmetric, include_zero, clip_gradient: see `Quantizer`.
        momentum: see `ObservedRange`.

    Source: see `zsq.quantizer.ranges.least_error`.
    """

    def __init__(
        self,
        bits: int,
        *,
        axis: int | None = None,
        symmetric: bool = False,
        include_zero: bool = False,
        clip_gradient: bool = False,
        momentum: float = 0.9,
        power: float = 2.4,
        candidates: int = 80,
    ) -> None:
        super().__init__(
            bits,
            axis=axis,
            symmetric=symmetric,
            include_zero=include_zero,
            clip_gradient=clip_gradient,
            momentum=momentum,
        )
        if power <= 0:
            raise BadInput("power of a range search", expected="power > 0", got=power, fix="2 is the squared error.")
        if candidates < 1:
            fix = "80 candidates are one per cent apart."
            raise BadInput("candidates of a range search", expected="candidates >= 1", got=candidates, fix=fix)
        self.power = power
        self.candidates = candidates

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least-error range."""
        return least_error(x, self.axis, self._range_grid, power=self.power, candidates=self.candidates)


class LearnedStep(MseRange):
    """Learned step size and, if affine, learned offset (LSQ+).

    While observing, both are set from the averaged least-error range and get no gradient; after `freeze` they are
    trained with the network. Observing again starts them afresh. The step that acts is max(|step|, 1e-8): always
    positive, with the published gradient for every positive step. The offset acts rounded to a whole number of steps,
    straight-through.

    Args:
        clip_gradient: no gradient for clipped values; on, as published.
        bits, axis, symmetric, include_zero: see `Quantizer`.
        momentum: see `ObservedRange`.
        power: see `MseRange`.
        candidates: see `MseRange`.

    Attributes:
        step: parameter, in units of x; 0-dim, or broadcastable along `axis`.
        offset: parameter, lower end of the window in units of x, same shape; None if symmetric.

    Source: LSQ (Esser et al., ICLR 2020); LSQ+ (Bhalgat et al., CVPR Workshops 2020). The gradients are those of
        `zsq.grid.learned_fake_quantize`.
    """

    def __init__(
        self,
        bits: int,
        *,
        axis: int | None = None,
        symmetric: bool = False,
        include_zero: bool = False,
        clip_gradient: bool = True,
        momentum: float = 0.9,
        power: float = 2.0,
        candidates: int = 80,
    ) -> None:
        super().__init__(
            bits, axis=axis, symmetric=symmetric, include_zero=include_zero, clip_gradient=clip_gradient,
            momentum=momentum, power=power, candidates=candidates,
        )  # fmt: skip
        self.step = nn.Parameter(torch.ones(()))
        self.offset = None if symmetric else nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            return super().forward(x)
        return learned_fake_quantize(x, self.step, self.offset, self.grid(), clip_gradient=self.clip_gradient)

    def observe(self, x: Tensor) -> None:
        """Let x enter the average and start step and offset from it.

        Args:
            x: values, not empty.
        """
        super().observe(x)
        with torch.no_grad():
            grid = self._range_grid(self.lo, self.hi)
            self._store(step=1 / grid.inv_step)
            if self.offset is not None:
                self._store(offset=self.lo.clamp(max=0) if self.include_zero else self.lo)

    def _present_grid(self) -> Grid:
        return learned_grid(self.step, self.offset, self.bits, include_zero=self.include_zero)
