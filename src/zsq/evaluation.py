"""How good a network is: agreement with its teacher without labels, the score of its task with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsq.checkpoint import save_tree
from zsq.errors import RunFailed
from zsq.probe import probe_pool
from zsq.sources.crops import crop, crop_boxes
from zsq.tasks.base import Score, table

if TYPE_CHECKING:
    from zsq.data import LabelledData
    from zsq.teachers import Teacher

EXAMPLES = 8  # labelled images kept for the report
KL_CHUNK = 1 << 24  # numbers that are compared in float64 at a time
CROPS = (0.5, 1.0)  # smallest and largest share of an image in a random crop


@dataclass(frozen=True)
class Agreement:
    """How close a student is to its teacher on unlabelled images.

    Attributes:
        share: what both agree on, a fraction: images with the same highest logit; pixels with the same class; mAP@.5 of
            the student with the teacher's boxes as truth.
        interval: 95 % Wilson interval of share, for whole images; else None.
        kl: mean KL(teacher || student) at temperature 1 as the task defines it, in nats.
        sqnr: signal of the raw output to quantization noise, 10 log10(sum t^2 / sum (t - s)^2) in dB; inf for equal
            outputs.
        count: number of images.
        extra: further measures of the task, fractions.
    """

    share: float
    interval: tuple[float, float] | None
    kl: float
    sqnr: float
    count: int
    extra: dict[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        low, high = self.interval or (0.0, 0.0)
        bounds = f"  (95 %: {100 * low:.2f} to {100 * high:.2f})" if self.interval else ""
        return table(
            [
                ("agreement", f"{100 * self.share:.2f} %{bounds}"),
                *((key, f"{100 * value:.2f} %") for key, value in self.extra.items() if value is not None),
                ("KL", f"{self.kl:.4g} nats"),
                ("logit SQNR", f"{self.sqnr:.2f} dB"),
                ("images", str(self.count)),
            ]
        )


def score(net: nn.Module, data: LabelledData, *, batch: int | None = None) -> Score:
    """Score a network on a labelled set.

    Args:
        net: gives the raw output of the set's teacher's task; run in eval mode, left in the mode it was in.
        data: the set, already in the network's input space.
        batch: images per forward; the task's if not given.

    Returns:
        The measures of the task.

    Raises:
        RunFailed: if an output is not finite.
    """
    task = data.teacher.outputs
    meter, finite = task.scored(), []
    with _evaluating(net):
        for images, truth in data.batches(batch or task.batch):
            raw = net(images)
            finite.append(raw.flatten(1).isfinite().all(1))
            meter.add(raw, truth)
    _refuse_nonfinite(~torch.cat(finite).cpu())
    return meter.result()


def agreement(student: nn.Module, teacher: Teacher, images: Tensor, *, batch: int | None = None) -> Agreement:
    """Compare a student with its teacher on images without labels.

    Args:
        student: maps [b, c, h, w] to the teacher's raw output, on the same device.
        teacher: the float network and what its output means.
        images: shape [n, c, h, w], normalised; moved to the teacher's device batch by batch.
        batch: images per forward; the task's if not given.

    Returns:
        What both agree on, mean KL and SQNR.

    Raises:
        RunFailed: if an output is not finite.
    """
    task, device = teacher.outputs, teacher.device
    meter, finite, rows = task.compared(), [], []  # rows: KL times images, signal, noise
    with _evaluating(student), _evaluating(teacher.net):
        for part in images.split(batch or task.batch):
            x = part.to(device)
            t, s = teacher.net(x), student(x)
            finite.append((t.isfinite() & s.isfinite()).flatten(1).all(1))
            meter.add(s, t)
            for a, b in zip(_chunks(t), _chunks(s), strict=True):
                kl = task.kl(b.double(), a.double(), temperature=1.0, reduction="batchmean")
                noise = (a.double() - b.double()).square().sum()
                rows.append(torch.stack([kl * len(a), a.double().square().sum(), noise]))
    _refuse_nonfinite(~torch.cat(finite).cpu())
    kl, signal, noise = torch.stack(rows).sum(0).cpu().tolist()
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    found, count = meter.result(), len(images)
    return Agreement(found.value, found.interval, max(kl / count, 0.0), sqnr, count, found.extra)


def label_free(student: nn.Module, teacher: Teacher, images: Tensor, inputs: str) -> dict[str, Any]:
    """What a summary says of a student without labels: agreement on three sets of images.

    A source's own images are the ones its teacher is surest of: a student that errs on every tenth real image can agree
    on all of them. Random crops of the same images (half to all of the area, flips; always the same ones) are less
    typical, for teacher and student alike.

    Args:
        student: the quantized network.
        teacher: the float network.
        images: held-out images of the run's source, shape [n, c, h, w], normalised.
        inputs: what they are, in words.

    Returns:
        ``agreement`` and ``agreement_inputs``; ``crop_agreement`` on crops; ``probe_agreement`` on the probe pool.
    """
    cropped = crop(images, crop_boxes(len(images), torch.Generator().manual_seed(0), scale=CROPS))
    return {
        "agreement": agreement(student, teacher, images).share,
        "agreement_inputs": inputs,
        "crop_agreement": agreement(student, teacher, cropped).share,
        "probe_agreement": agreement(student, teacher, probe_pool(teacher)).share,
    }


def _chunks(raw: Tensor) -> tuple[Tensor, ...]:
    return raw.split(max(1, KL_CHUNK // max(1, raw[0].numel())))


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


def keep_examples(path: Path, data: LabelledData) -> None:
    """Keep the first labelled images of an evaluation in labelled.safetensors, for the report to show.

    Args:
        path: the run directory.
        data: what the run was scored on.
    """
    images, truth = next(iter(data.batches(EXAMPLES)))
    kept = truth.cpu() if isinstance(truth, Tensor) else [boxes._asdict() for boxes in truth]
    tree = {"name": data.name, "classes": data.names, "images": images.cpu(), "truth": kept}
    save_tree(path / "labelled.safetensors", tree)
