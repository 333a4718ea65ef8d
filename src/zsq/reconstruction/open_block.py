"""What is learned in one block of a student, and how the block computes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zsq.insert.access import NamedPath
from zsq.quantizer import LearnedStep, Quantizer
from zsq.reconstruction.rounding import Adam, LearnedRounding, indecision, rectified_sigmoid

Draw = Callable[[Tensor], Tensor]


class OpenBlock:
    """What is learned in one block.

    Args:
        rounded: layers whose rounding is learned.
        learned: quantizers whose step and offset learn by their own gradient.
        sites: activation quantizers of the block, by which values may pass unrounded.
    """

    def __init__(
        self, rounded: Sequence[NamedPath], learned: Sequence[LearnedStep], sites: Sequence[Quantizer]
    ) -> None:
        self.roundings = [LearnedRounding(path, latent) for _, path, latent in rounded if latent is not None]
        self._sites = sites
        steps = [rounding.step for rounding in self.roundings if rounding.step.requires_grad]
        own = [p for quantizer in learned for p in (quantizer.step, quantizer.offset) if p is not None]
        units = [quantizer.step for quantizer in learned for p in (quantizer.step, quantizer.offset) if p is not None]
        self.leaves: list[Tensor] = [*(rounding.v for rounding in self.roundings), *steps, *own]
        ones = [torch.ones((), device=v.device) for v in self.leaves[: len(self.roundings)]]
        self.adam = Adam(self.leaves, [*ones, *(unit.detach().abs().clone() for unit in (*steps, *units))])
        changed = [r.latent for r in self.roundings] + [p for r in self.roundings for p in r.quantizer_parameters()]
        self._changed = [*changed, *own]
        self._before = [p.detach().clone() for p in self._changed]
        self.error: Tensor | None = None  # of the block before anything was learned

    def indecision(self, beta: float) -> Tensor:
        """Of all its weights."""
        return torch.stack([indecision(rectified_sigmoid(rounding.v), beta) for rounding in self.roundings]).sum()

    @contextmanager
    def soft(self, keep: Draw | None) -> Iterator[None]:
        """Compute with soft weights, and pass on activations unrounded where `keep` says so."""
        weights: list[Any] = [rounding.path.quantizer for rounding in self.roundings]
        for quantizer, rounding in zip(weights, self.roundings, strict=True):
            quantizer.__dict__["forward"] = rounding.weight
        if keep is not None:
            for site in self._sites:
                site.__dict__["forward"] = partial(_unrounded_at_times, site, keep)
        try:
            yield
        finally:
            for module in (*weights, *self._sites):
                module.__dict__.pop("forward", None)

    def put_back(self) -> None:
        """Undo everything that was learned."""
        with torch.no_grad():
            for parameter, before in zip(self._changed, self._before, strict=True):
                parameter.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        leaves = [leaf.detach() for leaf in self.leaves]
        return {"leaves": leaves, "adam": self.adam.state_dict(), "before": self._before, "error": self.error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for own, saved in zip([*self.leaves, *self._before], [*state["leaves"], *state["before"]], strict=True):
                own.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.error = state["error"].to(self._before[0].device) if self._before else state["error"]


def _unrounded_at_times(site: Quantizer, keep: Draw, x: Tensor) -> Tensor:
    return torch.where(keep(x), x, type(site).forward(site, x))
