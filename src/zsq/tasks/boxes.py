"""Boxes: overlap, the best of overlapping ones, and average precision over a set (faster-coco-eval)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsq.extras import optional
from zsq.tasks.base import Boxes

SIDE = 1000.0  # images are scored as squares of this side: overlaps do not depend on it


class AveragePrecision:
    """COCO's average precision over a whole set: 101 recall points, at most 100 detections an image, all sizes.

    Args:
        classes: number of classes; those without any object do not count.

    Raises:
        BadInput: without faster-coco-eval.
    """

    def __init__(self, classes: int) -> None:
        self._library = optional("faster_coco_eval", "faster-coco-eval", "scores of a detector")
        self.images = 0
        self._classes = classes
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(self, found: Boxes, truth: Boxes) -> None:
        """Take the detections and the objects of one image."""
        self.images += 1
        self._found += [
            row | {"score": score} for row, score in zip(self._rows(found), found.scores.tolist(), strict=True)
        ]
        for row, crowd in zip(self._rows(truth), truth.crowd.tolist(), strict=True):
            self._truth.append(row | {"id": len(self._truth) + 1, "iscrowd": int(crowd)})

    def result(self) -> tuple[float, float]:
        """Mean average precision at an overlap of .5, and the mean over .5, .55 ... .95; 0 without any object."""
        if not any(not row["iscrowd"] for row in self._truth):
            return 0.0, 0.0
        images = [{"id": i + 1, "width": SIDE, "height": SIDE} for i in range(self.images)]
        categories = [{"id": i + 1, "name": str(i)} for i in range(self._classes)]
        truth = self._library.COCO({"images": images, "categories": categories, "annotations": self._truth})
        judge = self._library.COCOeval_faster(
            truth, truth.loadRes(self._found), "bbox", print_function=lambda *_: None, separate_eval=True
        )
        judge.evaluate()
        judge.accumulate()
        precision = judge.eval["precision"][:, :, :, 0, -1]  # overlaps, recall points, classes; all sizes, 100 an image
        known = precision > -1
        return float(precision[0][known[0]].mean()), float(precision[known].mean())

    def _rows(self, boxes: Boxes) -> list[dict[str, Any]]:
        corners = (boxes.corners.double() * SIDE).tolist()
        rows = zip(corners, boxes.classes.tolist(), strict=True)
        return [
            {"image_id": self.images, "category_id": number + 1, "area": max(x2 - x1, 0.0) * max(y2 - y1, 0.0),
             "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for (x1, y1, x2, y2), number in rows
        ]  # fmt: skip


def best_boxes(rows: Tensor, *, least: float, overlap: float = 0.5, most: int = 100) -> Boxes:
    """Greedy non-maximum suppression per class.

    Args:
        rows: [n, 6]: x1, y1, x2, y2, score, class; rows that are not finite are dropped.
        least: smallest score.
        overlap: a box that overlaps a better one of its class by more than this (intersection over union) is dropped.
        most: how many of the best are kept.

    Returns:
        At most `most` boxes, best first.

    Example:
        >>> rows = torch.tensor([[0, 0, 1, 1, 0.9, 2], [0, 0, 1, 0.9, 0.8, 2], [0, 0, 1, 0.9, 0.7, 1]])
        >>> best_boxes(rows, least=0.1).classes.tolist()
        [2, 1]
    """
    rows = rows[rows.isfinite().all(1) & (rows[:, 4] >= least)]
    rows = rows[rows[:, 4].argsort(descending=True, stable=True)][:1000]
    same = rows[:, None, 5] == rows[None, :, 5]
    close = (overlaps(rows[:, :4], rows[:, :4]) > overlap) & same
    keep = torch.ones(len(rows), dtype=torch.bool)
    for i, row in enumerate(close):
        if keep[i]:
            keep[i + 1 :] &= ~row[i + 1 :]
    rows = rows[keep][:most]
    return Boxes(rows[:, :4], rows[:, 5].long(), torch.zeros(len(rows), dtype=torch.bool), rows[:, 4])


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` [n, 4] with every box of `b` [m, 4]; 0 for boxes without area.

    Example:
        >>> overlaps(torch.tensor([[0.0, 0, 2, 1]]), torch.tensor([[1.0, 0, 3, 1]])).tolist()
        [[0.3333333432674408]]
    """
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = (high - low).clamp_min(0).prod(2)
    area = [(x[:, 2:] - x[:, :2]).clamp_min(0).prod(1) for x in (a, b)]
    return inner / (area[0][:, None] + area[1][None, :] - inner).clamp_min(1e-12)
