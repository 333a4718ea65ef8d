"""Classification: one row of logits per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.tasks.base import Outline, Score, wilson_interval
from zsq.tasks.logits import Logits, require_classes


@dataclass(frozen=True)
class Classify(Logits):
    """Raw output [b, classes]: logits.

    Attributes:
        classes: number of classes.
    """

    name: ClassVar[str] = "classify"
    metric: ClassVar[str] = "top1"
    batch: ClassVar[int] = 256
    held_out: ClassVar[int] = 1024
    image_labels: ClassVar[bool] = True

    @classmethod
    def of(cls, out: Tensor, facts: Outline, *, name: str) -> Classify:
        """Logits of shape [b, classes]."""
        if out.dim() != 2:
            fix = "Wrap the network so that it returns the logits alone; a segmenter or detector needs --task."
            raise BadInput(
                f"teacher {name}", expected="logits of shape [batch, classes]", got=f"shape {list(out.shape)}", fix=fix
            )
        require_classes(facts.classes, out.shape[1], name)
        return cls(out.shape[1])

    def image_logits(self, raw: Tensor) -> Tensor:
        """The logits."""
        return raw

    def scored(self) -> TopClasses:
        """Top-1 and top-5."""
        return TopClasses(self.classes)

    def compared(self) -> SameDecision:
        """Share of equal decisions."""
        return SameDecision()


class TopClasses:
    """Top-1 with its interval, and top-5. Equal logits are ranked by class number: the same score everywhere.

    Args:
        classes: top-5 says nothing up to five of them.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._ranks: list[Tensor] = []

    def add(self, raw: Tensor, truth: Any) -> None:
        """Take logits [b, k] and labels int64 [b]."""
        self._ranks.append(label_rank(raw, truth))

    def result(self) -> Score:
        """Top-1, with top-5 beside it."""
        rank = torch.cat(self._ranks).cpu()
        count, right = len(rank), int((rank == 0).sum())
        top5 = int((rank < 5).sum()) / count if self.classes > 5 else None
        return Score("top1", right / count, count, wilson_interval(right, count), {"top5": top5})


class SameDecision:
    """Share of images with the same highest logit."""

    def __init__(self) -> None:
        self._same: list[Tensor] = []

    def add(self, raw: Tensor, truth: Any) -> None:
        """Take logits of student and teacher, [b, k]."""
        self._same.append(raw.argmax(1) == truth.argmax(1))

    def result(self) -> Score:
        """The share and its interval."""
        same = torch.cat(self._same).cpu()
        count, right = len(same), int(same.sum())
        return Score("agreement", right / count, count, wilson_interval(right, count))


def label_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label: those with a higher logit, and equal ones with a lower number.

    Args:
        logits: shape [b, classes].
        labels: shape [b], int64.

    Returns:
        Shape [b], int64; 0 where the label is the decision.

    Example:
        >>> label_rank(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([2])).tolist()
        [1]
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)
