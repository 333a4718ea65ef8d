"""What all quantizers share: options, codes, freezing, and the state of a range averaged while observing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import BadInput, RunFailed
from zsq.grid import Grid, affine_grid, encode, fake_quantize, symmetric_grid


class Quantizer(nn.Module, ABC):
    """Rounds a tensor to a grid; straight-through gradient. The arithmetic and the result are float32 (at least).

    Args:
        bits: number of bits of a code, 2 to 8.
        axis: None for one range per tensor; 0 for one per output channel of a weight (1: of a transposed convolution).
        symmetric: zero 0 and as many negative as positive codes; otherwise affine: 2^bits codes, integral zero.
        include_zero: widen the range to contain 0, which an integer runtime needs for padding.
        clip_gradient: no gradient for values the clamp moved; off: identity everywhere, as in the GDFQ family.

    Attributes:
        observing: whether a forward updates the range; a plain bool. Always False where there is nothing to update.

    Raises:
        BadInput: if bits or axis is none of the above.
    """

    def __init__(
        self,
        bits: int,
        *,
        axis: int | None = None,
        symmetric: bool = False,
        include_zero: bool = False,
        clip_gradient: bool = False,
    ) -> None:
        super().__init__()
        if type(bits) is not int or not 2 <= bits <= 8:
            raise BadInput("bits of a quantizer", expected="a whole number from 2 to 8", got=bits, fix="Choose 2 to 8.")
        if axis not in (None, 0, 1):
            fix = "Choose None for one range, 0 for a weight, 1 for the weight of a transposed convolution."
            raise BadInput("axis of a quantizer", expected="None, 0 or 1", got=axis, fix=fix)
        self.bits = bits
        self.axis = axis
        self.symmetric = symmetric
        self.include_zero = include_zero
        self.clip_gradient = clip_gradient
        self.observing = False

    @abstractmethod
    def grid(self, x: Tensor) -> Grid:
        """Grid that x would be rounded to now; detached, and without updating anything."""

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.grid(x), clip_gradient=self.clip_gradient)

    def codes(self, x: Tensor) -> Tensor:
        """Signed integer codes of x on the present grid.

        Args:
            x: values; nothing is updated by them.

        Returns:
            int8, same shape as x.
        """
        with torch.no_grad():
            return encode(x, self.grid(x)).to(torch.int8)

    def freeze(self) -> None:
        """Stop observing: from now on a forward changes nothing."""
        self.observing = False

    def extra_repr(self) -> str:
        flags = ("symmetric", "include_zero", "clip_gradient", "observing")
        words = [f"bits={self.bits}", *([] if self.axis is None else [f"axis={self.axis}"])]
        return ", ".join(words + [f"{flag}=True" for flag in flags if getattr(self, flag)])

    def _range_grid(self, lo: Tensor, hi: Tensor) -> Grid:
        """Grid of a range under this quantizer's options."""
        if self.symmetric:
            return symmetric_grid(torch.maximum(lo.abs(), hi.abs()), self.bits)
        if self.include_zero:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        return affine_grid(lo, hi, self.bits)


class ObservedRange(Quantizer):
    """A range averaged over the tensors seen while `observing` (True at first), fixed after `freeze`.

    While observing, every forward first updates the range from its tensor, then quantizes with it. The average is
    exponential and corrected for its start: sum_i m^(t-i) v_i / sum_i m^(t-i), which is a <- m a + (1-m) v divided by
    1 - m^t. As a weight's quantizer it follows the weight, at the pace of the average, while observing, and stays fixed
    after `freeze`. A subclass says what the range of one tensor is (`range_of`).

    Args:
        momentum: share m of the old average that a new tensor leaves, in [0, 1); 0 keeps the last tensor's range only.
        bits, axis, symmetric, include_zero, clip_gradient: see `Quantizer`.

    Attributes:
        lo: lower end, buffer, float32, 0-dim or broadcastable along `axis`; read it, do not assign it.
        hi: upper end, the same.
        weight: 1 - m^t after t tensors, buffer, float32, 0-dim.
    """

    lo: Tensor
    hi: Tensor
    weight: Tensor
    _inv_step: Tensor
    _zero: Tensor

    def __init__(
        self,
        bits: int,
        *,
        axis: int | None = None,
        symmetric: bool = False,
        include_zero: bool = False,
        clip_gradient: bool = False,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(bits, axis=axis, symmetric=symmetric, include_zero=include_zero, clip_gradient=clip_gradient)
        if not 0 <= momentum < 1:
            fix = "0.9 averages over about ten batches."
            raise BadInput("momentum of a range", expected="0 <= momentum < 1", got=momentum, fix=fix)
        self.momentum = momentum
        self.observing = True
        self._observed = False
        for name in ("lo", "hi", "weight"):
            self.register_buffer(name, torch.zeros(()))
        # What a frozen forward reads: a handful of tiny kernels per call site saved on every step.
        self.register_buffer("_inv_step", torch.ones(()), persistent=False)
        self.register_buffer("_zero", torch.zeros(()), persistent=False)

    @abstractmethod
    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Range (lo, hi) of one detached tensor, before averaging."""

    def grid(self, x: Tensor | None = None) -> Grid:
        """Present grid; x is not looked at.

        Raises:
            RunFailed: if no tensor was observed yet.
        """
        if not self._observed:
            raise RunFailed(
                f"{type(self).__name__}: expected a range, got none: no tensor was observed yet. "
                "Calibrate first (a forward while `observing` is True), or load a state that has a range."
            )
        return self._present_grid()

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe(x)
        return super().forward(x)

    def observe(self, x: Tensor) -> None:
        """Let x enter the average, whatever `observing` says.

        Args:
            x: values, not empty.
        """
        with torch.no_grad():
            lo, hi = (end.to(self.lo.dtype) for end in self.range_of(x.detach()))
            weight = self.weight * self.momentum + (1 - self.momentum)
            self._store(lo=self._average(self.lo, lo, weight), hi=self._average(self.hi, hi, weight), weight=weight)
            self._refresh()
        self._observed = True

    def get_extra_state(self) -> Tensor:
        """The two host-side flags as a uint8 tensor, so that a state dict holds tensors only."""
        return torch.tensor([self.observing, self._observed], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Restore the flags; the only place where a quantizer's state is read back to the host."""
        self.observing, self._observed = (bool(flag) for flag in state.tolist())
        self._refresh()

    def _average(self, old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        # Equal to keeping sum and weight and dividing when read; a first and a constant input are kept to the last bit.
        return torch.lerp(old, new, (1 - self.momentum) / weight)

    def _present_grid(self) -> Grid:
        half = 2 ** (self.bits - 1)
        return Grid(self._inv_step, self._zero, 1 - half if self.symmetric else -half, half - 1)

    def _refresh(self) -> None:
        # New tensors, not in place: a grid that was handed out stays what it is.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._inv_step, self._zero, _, _ = self._range_grid(self.lo, self.hi)

    def _store(self, **values: Tensor) -> None:
        """Write state in place; the first tensor per channel also gives it its shape."""
        # Memory allocated in inference mode could never take part in a training step later.
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, value in values.items():
                _resize(getattr(self, name), value).copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A fresh quantizer does not know its number of channels; any other difference of shapes is reported by torch.
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value = state_dict.get(prefix + name)
            if own is not None and value is not None and 0 in (own.dim(), value.dim()):
                _resize(own, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _resize(own: Tensor, value: Tensor) -> Tensor:
    """Give a buffer or parameter the shape of `value`; it stays the same object, so optimizers keep knowing it."""
    if own.shape != value.shape:
        own.data = own.new_empty(value.shape)
    return own
