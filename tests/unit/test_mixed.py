"""Batches of two sources: shares, order, what is refused."""

from __future__ import annotations

import pytest
import torch

from zsq.errors import BadInput
from zsq.sources.mixed import MixedSource
from zsq.sources.pool import PoolSource


def flat(value: float, name: str) -> PoolSource:
    return PoolSource(torch.full((64, 1, 4, 4), value), torch.zeros(64, dtype=torch.int64), name=name, batch=1)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("share", "batch", "second"), [(0.25, 16, 4), (0.5, 9, 4), (0.01, 16, 1), (0.99, 16, 15), (0.3, 4, 1), (0.25, 2, 1)]
)
def test_shares(share: float, batch: int, second: int) -> None:
    mixed = MixedSource(flat(0.0, "drawn"), flat(1.0, "made"), share=share, batch=batch)
    drawn = mixed.draw(rng())
    assert drawn.labels is None and mixed.batch == batch and mixed.name == "made+drawn"
    assert drawn.images[:, 0, 0, 0].tolist() == [0.0] * (batch - second) + [1.0] * second
    spread = mixed.sample(8, rng()).images[:, 0, 0, 0]
    assert int(spread.sum()) == int(8 * share)
    mixed.batch = 20
    assert len(mixed.draw(rng()).images) == 20


def test_metrics_and_state_are_of_both() -> None:
    first, second = flat(0.0, "drawn"), flat(1.0, "made")
    first.metrics, second.metrics = {"a": torch.ones(())}, {"b": torch.ones(())}
    mixed = MixedSource(first, second, share=0.5, batch=8)
    mixed.draw(rng())
    assert set(mixed.metrics) == {"a", "b"}
    mixed.load_state_dict(mixed.state_dict())


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(BadInput, match="--share"):
        MixedSource(flat(0.0, "a"), flat(1.0, "b"), share=share, batch=8)


def test_a_batch_too_small_for_two() -> None:
    with pytest.raises(BadInput, match="--batch: expected at least 2"):
        MixedSource(flat(0.0, "a"), flat(1.0, "b"), share=0.5, batch=1)
