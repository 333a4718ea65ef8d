"""A source whose batches are put together from two others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.run import Run
from zsq.sources.base import Batch, Source, prepare


def mix(first: Source, second: Callable[[], Source], *, share: float, batch: int) -> Source:
    """A `MixedSource`, or one of the two alone where the share of the second is 0 or 1.

    Args:
        first: as there.
        second: makes the other one, if it is needed.
        share: of the second, from 0 to 1.
        batch: images per draw.
    """
    if share == 0:
        return first
    return second() if share == 1 else MixedSource(first, second(), share=share, batch=batch)


class MixedSource:
    """Batches of which one part comes from one source and the rest from another, without labels.

    Args:
        first: gives the images in front.
        second: gives those behind.
        share: of the second in every batch, above 0 and below 1; each gives at least one image.
        batch: images per draw.
        least: fewest images that the second can make; those too many are left out.

    Raises:
        BadInput: the share is none, or the batch too small for two parts.
    """

    def __init__(self, first: Source, second: Source, *, share: float, batch: int, least: int = 2) -> None:
        if not 0 < share < 1:
            raise BadInput("--share", expected="a share between 0 and 1", got=share, fix="0 or 1 leaves one out.")
        self._first, self._second, self._share, self._least = first, second, share, least
        self.name = f"{second.name}+{first.name}"
        self.metrics: dict[str, Tensor] = {}
        self.batch = batch

    @property
    def batch(self) -> int:
        """Images per draw."""
        return self._count

    @batch.setter
    def batch(self, count: int) -> None:
        """Images per draw."""
        if count < 2:
            raise BadInput("--batch", expected="at least 2 images, for two sources", got=count,
                           fix="Choose a larger batch.")  # fmt: skip
        self._count = count
        self._behind = min(max(round(count * self._share), 1), count - 1)
        self._first.batch, self._second.batch = count - self._behind, max(self._least, self._behind)

    def prepare(self, run: Run) -> None:
        """Let both prepare."""
        for source in (self._first, self._second):
            prepare(source, run)

    def draw(self, rng: torch.Generator) -> Batch:
        """A batch of both."""
        front, behind = self._first.draw(rng).images, self._second.draw(rng).images[: self._behind]
        self.metrics = self._first.metrics | self._second.metrics
        images = torch.cat([front, behind])
        return Batch(images.contiguous(memory_format=torch.channels_last))

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Images of both in the same shares, spread evenly: the first of many are what few would have been."""
        seeds = torch.randint(2**62, (2,), generator=rng).tolist()
        behind = [int((i + 1) * self._share) > int(i * self._share) for i in range(count)]
        parts = {}
        for source, seed, mine in zip((self._first, self._second), seeds, (False, True), strict=True):
            wanted = behind.count(mine)
            if wanted:
                parts[mine] = iter(source.sample(wanted, torch.Generator().manual_seed(seed)).images)
        return Batch(torch.stack([next(parts[mine]) for mine in behind]))

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first.state_dict(), "second": self._second.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first.load_state_dict(state["first"])
        self._second.load_state_dict(state["second"])
