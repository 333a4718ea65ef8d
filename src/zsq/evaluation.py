"""How good a network is: agreement with its teacher without labels, top-1 and top-5 with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zsq.errors import RunFailed

if TYPE_CHECKING:
    from zsq.data import LabelledData

BATCH = 256
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Score:
    """What a network reaches on a labelled set; shares are fractions.

    Attributes:
        top1: share of images whose label has the highest logit.
        top5: share of images whose label is among the five highest; None up to five classes.
        count: number of images.
        interval: 95 % Wilson interval of top1.
    """

    top1: float
    top5: float | None
    count: int
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        top5 = [] if self.top5 is None else [("top-5", f"{100 * self.top5:.2f} %")]
        return _table(
            [
                ("top-1", f"{100 * self.top1:.2f} %  (95 %: {100 * low:.2f} to {100 * high:.2f})"),
                *top5,
                ("images", str(self.count)),
            ]
        )


@dataclass(frozen=True)
class Agreement:
    """How close a student is to its teacher on unlabelled images.

    Attributes:
        share: share of images with the same highest logit, a fraction.
        interval: 95 % Wilson interval of share.
        kl: mean KL(teacher || student) of the softmax outputs at temperature 1, in nats.
        sqnr: logit signal to quantization noise, 10 log10(sum t^2 / sum (t - s)^2) in dB; inf for equal logits.
        count: number of images.
    """

    share: float
    interval: tuple[float, float]
    kl: float
    sqnr: float
    count: int

    def __str__(self) -> str:
        low, high = self.interval
        return _table(
            [
                ("agreement", f"{100 * self.share:.2f} %  (95 %: {100 * low:.2f} to {100 * high:.2f})"),
                ("KL", f"{self.kl:.4g} nats"),
                ("logit SQNR", f"{self.sqnr:.2f} dB"),
                ("images", str(self.count)),
            ]
        )


def score(net: nn.Module, data: LabelledData, *, batch: int = BATCH) -> Score:
    """Score a classifier on a labelled set.

    Args:
        net: maps [b, c, h, w] to logits [b, classes]; run in eval mode, left in the mode it was in.
        data: the set, already in the network's input space.
        batch: images per forward.

    Returns:
        Top-1, top-5 and the interval. Equal logits are ranked by class number: the same score everywhere.

    Raises:
        RunFailed: if a logit is not finite.
    """
    ranks, classes = [], 0
    with _evaluating(net):
        for images, labels in data.batches(batch):
            logits = net(images)
            classes = logits.shape[1]
            ranks.append(torch.where(logits.isfinite().all(1), label_rank(logits, labels), -1))
    rank = torch.cat(ranks).cpu()
    _refuse_nonfinite(rank < 0)
    count = len(rank)
    right = int((rank == 0).sum())
    top5 = int((rank < 5).sum()) / count if classes > 5 else None
    return Score(right / count, top5, count, wilson_interval(right, count))


def agreement(student: nn.Module, teacher: nn.Module, images: Tensor, *, batch: int = BATCH) -> Agreement:
    """Compare a student with its teacher on images without labels.

    Args:
        student: maps [b, c, h, w] to logits [b, classes].
        teacher: likewise, on the same device.
        images: shape [n, c, h, w], normalised; moved to the teacher's device batch by batch.
        batch: images per forward.

    Returns:
        Share of equal decisions with its interval, mean KL and logit SQNR.

    Raises:
        RunFailed: if a logit is not finite.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> agreement(net, net, torch.randn(8, 1, 2, 2)).share
        1.0
    """
    device = next((p.device for p in teacher.parameters()), images.device)
    rows = []  # per image: same decision, KL, signal, noise
    with _evaluating(student), _evaluating(teacher):
        for part in images.split(batch):
            x = part.to(device)
            t, s = teacher(x).double(), student(x).double()
            log_t, log_s = t.log_softmax(1), s.log_softmax(1)
            kl = (log_t.exp() * (log_t - log_s)).sum(1)
            same = (t.argmax(1) == s.argmax(1)).double()
            rows.append(torch.stack([same, kl, t.square().sum(1), (t - s).square().sum(1)]))
    table = torch.cat(rows, dim=1).cpu()
    _refuse_nonfinite(~table.isfinite().all(0))
    count = table.shape[1]
    same, kl, signal, noise = table.sum(1).tolist()
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    return Agreement(same / count, wilson_interval(round(same), count), max(kl / count, 0.0), sqnr, count)


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


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share.

    Args:
        right: number of hits.
        count: number of trials, at least 1.

    Returns:
        Lower and upper end, fractions in 0..1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA 1927).

    Example:
        >>> [round(end, 4) for end in wilson_interval(8, 10)]
        [0.4902, 0.9433]
    """
    share, z2 = right / count, Z95 * Z95
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    low, high = ((centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count))
    return (0.0 if right == 0 else low, 1.0 if right == count else high)  # exact ends, free of rounding


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode without autograd; every module gets its own mode back."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a module caches here must stay usable in training
            yield
    finally:
        for module, training in modes:
            module.training = training


def _refuse_nonfinite(bad: Tensor) -> None:
    if bool(bad.any()):
        raise RunFailed(
            f"evaluation: expected finite logits, got NaN or infinity on {int(bad.sum())} of {len(bad)} images."
            " Check the last losses of the run in metrics.jsonl."
        )


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
