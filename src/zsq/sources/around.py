"""A source that changes what another one draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from zsq.run import Run
from zsq.sources.base import Batch, Source, distinct_images, prepare


class Around(ABC):
    """Another source, whose batches are changed on their way; what is not drawn stays as it is.

    Args:
        source: whose images.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name, self.metrics = source.name, source.metrics

    @abstractmethod
    def changed(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Change a batch of the source."""

    @property
    def batch(self) -> int:
        """Images per draw."""
        return self._source.batch

    @batch.setter
    def batch(self, count: int) -> None:
        """Images per draw."""
        self._source.batch = count

    def prepare(self, run: Run) -> None:
        """Let the source prepare."""
        prepare(self._source, run)

    def draw(self, rng: torch.Generator) -> Batch:
        """A batch of the source, changed."""
        batch = self._source.draw(rng)
        self.metrics = self._source.metrics
        return self.changed(batch, rng)

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Images of the source as they are."""
        return self._source.sample(count, rng)

    def pick(self, count: int, rng: torch.Generator) -> Batch:
        """Images of the source as they are, each at most once."""
        return Batch(distinct_images(self._source, count, rng))

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)
