"""Segmentation: logits for every pixel of a coarser grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from zsq.errors import BadInput
from zsq.extras import optional
from zsq.tasks.base import Outline, Score
from zsq.tasks.logits import Logits, require_classes

IGNORE = 255  # a pixel of a mask that counts nothing


@dataclass(frozen=True)
class Segment(Logits):
    """Raw output [b, classes, h', w']: logits before they are up-sampled to the image, bilinearly.

    Up-sampling is linear and the same in teacher and student: losses on the coarse grid lose nothing by leaving it out.

    Attributes:
        classes: number of classes.
    """

    name: ClassVar[str] = "segment"
    metric: ClassVar[str] = "miou"
    batch: ClassVar[int] = 8
    held_out: ClassVar[int] = 16
    image_labels: ClassVar[bool] = False

    @classmethod
    def of(cls, out: Tensor, facts: Outline, *, name: str) -> Segment:
        """Logits of shape [b, classes, h', w']."""
        if out.dim() != 4 or out.shape[1] < 2:
            raise BadInput(
                f"teacher {name}", expected="per-pixel logits of shape [batch, classes, h, w], two classes or more",
                got=f"shape {list(out.shape)}", fix="Name the module that gives them with --raw MODULE.",
            )  # fmt: skip
        require_classes(facts.classes, out.shape[1], name)
        return cls(out.shape[1])

    def image_logits(self, raw: Tensor) -> Tensor:
        """Mean over pixels: an image that shows a class in most places."""
        return raw.flatten(2).mean(2)

    def scored(self) -> PixelClasses:
        """Mean intersection over union, and pixel accuracy."""
        return PixelClasses(self.classes)

    def compared(self) -> PixelClasses:
        """Share of pixels with the teacher's decision, and the mean intersection over union with it."""
        return PixelClasses(self.classes, against_teacher=True)


def decisions(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """Class of every pixel of an image.

    Args:
        raw: logits [b, classes, h', w'].
        size: height and width of the image.

    Returns:
        Shape [b, h, w], int64.
    """
    if raw.shape[2:] != size:
        raw = F.interpolate(raw.float(), size, mode="bilinear", align_corners=False)
    return raw.argmax(1)


class PixelClasses:
    """Mean intersection over union and pixel accuracy over a whole set (torchmetrics).

    A class that neither labels nor decisions contain does not count. Every pixel of the set weighs the same.

    Args:
        classes: number of classes.
        against_teacher: what is added as truth are the teacher's logits; then pixel accuracy is the main measure.
    """

    def __init__(self, classes: int, *, against_teacher: bool = False) -> None:
        metrics = optional("torchmetrics.classification", "torchmetrics", "scores of a segmenter")
        self.against_teacher = against_teacher
        self._count = 0
        self._miou = metrics.MulticlassJaccardIndex(classes, ignore_index=IGNORE, validate_args=False)
        self._accuracy = metrics.MulticlassAccuracy(
            classes, average="micro", ignore_index=IGNORE, validate_args=False
        )  # fmt: skip

    def add(self, raw: Tensor, truth: Any) -> None:
        """Take logits [b, k, h', w'] and masks int64 [b, h, w] (255: ignored), or the teacher's logits."""
        # Two coarse grids are compared as they are: their decisions are what a loss can see.
        masks: Tensor = truth.argmax(1) if self.against_teacher else truth
        found = decisions(raw, (masks.shape[1], masks.shape[2]))
        self._count += len(masks)
        for metric in (self._miou, self._accuracy):
            metric.update(found.cpu(), masks.cpu())

    def result(self) -> Score:
        """Both measures, the main one first."""
        miou, accuracy = float(self._miou.compute()), float(self._accuracy.compute())
        if self.against_teacher:
            return Score("agreement", accuracy, self._count, None, {"miou": miou})
        return Score("miou", miou, self._count, None, {"pixel_accuracy": accuracy})
