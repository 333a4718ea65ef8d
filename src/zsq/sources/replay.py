"""A memory of past images: what a generator that moves on has asked before should not be unlearned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Replay:
    """First in, first out, 8 bits per pixel (each image from its own minimum to its own maximum).

    Kept on the images' device, so that neither storing nor picking waits for it.

    Args:
        capacity: number of images.

    Example:
        >>> memory = Replay(4)
        >>> memory.push(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
        >>> memory.pick(2, torch.Generator().manual_seed(0)).tolist()
        [[[[0.0, 1.0]]], [[[0.0, 1.0]]]]
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pushed = 0
        self._codes: Tensor | None = None  # uint8 [capacity, c, h, w]
        self._ends: Tensor | None = None  # minimum and maximum of each, [capacity, 2]

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def push(self, images: Tensor) -> None:
        """Remember images [n, c, h, w], detached; the oldest make room."""
        if self._codes is None or self._ends is None:
            self._codes = images.new_zeros((self.capacity, *images.shape[1:]), dtype=torch.uint8)
            self._ends = images.new_zeros(self.capacity, 2)
        images = images[-self.capacity :]
        low, high = images.flatten(1).aminmax(dim=1)
        codes = (images - _column(low)) / _column((high - low).clamp_min(1e-12)) * 255
        first = self._pushed % self.capacity
        room = min(len(images), self.capacity - first)
        for where, part in ((slice(first, first + room), slice(room)), (slice(len(images) - room), slice(room, None))):
            self._codes[where] = codes[part].round().to(torch.uint8)
            self._ends[where] = torch.stack([low[part], high[part]], dim=1)
        self._pushed += len(images)

    def pick(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw `count` images with replacement; the memory must not be empty."""
        if self._codes is None or self._ends is None:
            raise ValueError("pick: expected images to have been pushed")
        index = torch.randint(len(self), (count,), generator=rng).to(self._codes.device)
        low, high = self._ends[index].unbind(1)
        return self._codes[index].to(low.dtype) * _column((high - low) / 255) + _column(low)

    def state_dict(self) -> dict[str, Any]:
        return {"pushed": self._pushed, "codes": self._codes, "ends": self._ends}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pushed, self._codes, self._ends = state["pushed"], state["codes"], state["ends"]


def _column(x: Tensor) -> Tensor:
    return x[:, None, None, None]
