"""A fixed pool of images: a saved synthetic set, or real unlabelled images as a named control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.sources.base import Batch


class PoolSource:
    """Draws batches from a tensor of images; learns nothing.

    Args:
        images: shape [n, c, h, w], in the teacher's normalised space.
        labels: shape [n], int64, or None.
        name: where the images came from; named in the summary.
        batch: images per draw.
        held_out: how many images at the end of the pool `draw` never sees; `sample` reads only those.

    Raises:
        BadInput: if the pool is not larger than the part held out.

    Example:
        >>> source = PoolSource(torch.zeros(8, 3, 4, 4), None, name="zeros", batch=2, held_out=2)
        >>> source.draw(torch.Generator().manual_seed(0)).images.shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None, *, name: str, batch: int, held_out: int | None = None
    ) -> None:
        keep = min(1024, len(images) // 8) if held_out is None else held_out
        if images.ndim != 4 or not 0 < keep < len(images):
            raise BadInput(
                "--images",
                expected="at least 8 images, shape [n, c, h, w]",
                got=f"a tensor of shape {list(images.shape)}",
                fix="Give a larger pool, or a wider slice of the file.",
            )
        self.name, self.batch = name, batch
        self.metrics: dict[str, Tensor] = {}
        self._images, self._labels, self._seen = images, labels, len(images) - keep

    def draw(self, rng: torch.Generator) -> Batch:
        """A batch drawn with replacement from the part that is not held out."""
        return self._pick(torch.randint(self._seen, (self.batch,), generator=rng))

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Up to `count` held-out images, in a random order, each at most once."""
        held = len(self._images) - self._seen
        return self._pick(self._seen + torch.randperm(held, generator=rng)[:count])

    def _pick(self, index: Tensor) -> Batch:
        index = index.to(self._images.device)
        return Batch(self._images[index], None if self._labels is None else self._labels[index])

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: the pool is the user's file."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
