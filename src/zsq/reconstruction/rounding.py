"""Learned rounding: which of its two neighbours on the grid every weight takes, and how long a step of the grid is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.grid import decode
from zsq.insert.weight_path import WeightPath
from zsq.quantizer import LearnedStep
from zsq.quantizer.base import ObservedRange

_LOW, _HIGH = -0.1, 1.1  # ends of the stretched sigmoid: 0 and 1 are reached at finite values


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1): how far a weight is rounded up.

    Args:
        v: any shape.

    Source: AdaRound (Nagel et al., ICML 2020), equation 23; the stretch is that of Louizos et al. (ICLR 2018).

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(v) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v with ``rectified_sigmoid(v) = h``.

    Args:
        h: values in [0, 1].

    Example:
        >>> round(float(rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor(0.3)))), 6)
        0.3
    """
    return -torch.log((_HIGH - _LOW) / (h - _LOW) - 1)


def indecision(h: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2h - 1|^beta: 0 where every weight is rounded fully down or up.

    Args:
        h: values in [0, 1].
        beta: exponent; a large one bothers only values near 1/2, a small one pulls all of them to the ends.

    Returns:
        0-dim tensor.

    Source: AdaRound (Nagel et al., ICML 2020), equation 24.

    Example:
        >>> float(indecision(torch.tensor([0.0, 0.25, 0.5, 1.0]), beta=2.0))
        1.75
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


class LearnedRounding:
    """One layer's weight while its rounding is learned.

    The grid's zero and the lower neighbour of every weight stay as they were; learned are v, how far each weight is
    rounded up, and (where the quantizer is a `LearnedStep`) the step per channel.

    Args:
        path: of a layer whose range is fixed and whose weight is not computed from others.
        latent: its parameter.

    Attributes:
        v: of the folded weight's shape; starts where the soft weight is the float weight, where that is on the grid.
        step: per channel, positive.

    Source: AdaRound (Nagel et al., ICML 2020); the step beside it as in GENIE-M (Jeon et al., CVPR 2023), whose
        gradient does not reach the lower neighbour either.
    """

    def __init__(self, path: WeightPath, latent: nn.Parameter) -> None:
        self.path, self.latent = path, latent
        with torch.no_grad():
            folded, _ = path.fold(latent, None)
            grid = path.quantizer.grid(folded)
            position = folded * grid.inv_step - grid.zero
            self._zero, self._ends, self._down = grid.zero.clone(), (grid.qmin, grid.qmax), position.floor()
            self.v = inverse_rectified_sigmoid(position - self._down).requires_grad_()
            self.step = grid.inv_step.reciprocal().requires_grad_(isinstance(path.quantizer, LearnedStep))

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """Step and offset of the layer's own quantizer, if they are learned."""
        quantizer = self.path.quantizer
        if not isinstance(quantizer, LearnedStep):
            return []
        return [quantizer.step] if quantizer.offset is None else [quantizer.step, quantizer.offset]

    def weight(self, latent: Tensor | None = None) -> Tensor:
        """The soft weight; what the layer's quantizer gives while the rounding is learned."""
        return (torch.clamp(self._down + rectified_sigmoid(self.v), *self._ends) + self._zero) * self.step

    def harden(self) -> None:
        """Round every weight to its nearer neighbour, and make the layer's own quantizer give exactly these codes.

        The latent weight becomes the value of its code, the quantizer's range that of the learned step.
        """
        with torch.no_grad():
            codes = torch.clamp(self._down + (rectified_sigmoid(self.v) >= 0.5), *self._ends)
            quantizer: Any = self.path.quantizer
            if isinstance(quantizer, LearnedStep):
                quantizer.step.copy_(self.step)
                if quantizer.offset is not None:
                    quantizer.offset.copy_((self._zero + self._ends[0]) * self.step)
            values = decode(codes, quantizer.grid(self.latent))
            scale = self.path.scale()
            if scale is not None:
                spread = self.path.spread(scale, self.latent)
                values = torch.where(spread == 0, self.latent, values / spread)  # a dead channel has only code 0
            self.latent.copy_(values)


def check_fixed(name: str, path: WeightPath) -> None:
    """Refuse a weight whose grid would move with it.

    Args:
        name: of the layer, for the message.
        path: its weight path.

    Raises:
        BadInput: if the range follows the weight.
    """
    quantizer = path.quantizer
    if not isinstance(quantizer, ObservedRange) or quantizer.observing:
        got = f"{type(quantizer).__name__} for {name}" + ", still observing" * getattr(quantizer, "observing", False)
        raise BadInput("reconstruction", expected="weights whose ranges are fixed", got=got,
                       fix="Quantize with weight=LearnedStep (or MseRange), and calibrate first.")  # fmt: skip


class Adam:
    """Adam with its usual betas, each parameter moving in units of its own; keeps everything on the device.

    Args:
        parameters: leaves; changed in place.
        units: what a learning rate of 1 means for each, broadcastable.
    """

    def __init__(self, parameters: Sequence[Tensor], units: Sequence[Tensor]) -> None:
        self._parameters, self._units, self._count = list(parameters), list(units), 0
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]

    def update(self, gradients: Sequence[Tensor | None], rates: Sequence[float]) -> None:
        """One update; a parameter without a gradient stays.

        Args:
            gradients: one per parameter.
            rates: learning rate of each.
        """
        self._count += 1
        with torch.no_grad():
            for i, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
                if gradient is None:
                    continue
                first, second = self._first[i], self._second[i]
                first.lerp_(gradient, 0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                spread = (second / (1 - 0.999**self._count)).sqrt_().add_(1e-8)
                self._parameters[i].sub_(first / spread * self._units[i], alpha=rate / (1 - 0.9**self._count))

    def state_dict(self) -> dict[str, Any]:
        names = ("units", "first", "second")
        return {"count": self._count} | {name: list(getattr(self, f"_{name}")) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        for name in ("units", "first", "second"):
            for own, saved in zip(getattr(self, f"_{name}"), state[name], strict=True):
                own.copy_(saved)
