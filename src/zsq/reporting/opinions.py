"""How each task says and draws what teacher and student make of an image."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsq.analysis.sensitivity import distance_of_logits
from zsq.export.labels import labels_of
from zsq.reporting.pictures import Album, Card, Drawn, Opinion, View, pixels_of
from zsq.tasks.base import Boxes
from zsq.tasks.boxes import AveragePrecision
from zsq.tasks.detect import SURE, Detect
from zsq.tasks.segment import IGNORE, decisions
from zsq.teachers import Teacher

Pixels = NDArray[np.uint8]


def classify(
    teacher: Teacher, told: Tensor, heard: Tensor, images: Tensor, labels: Tensor | None, names: Sequence[str]
) -> Drawn:  # fmt: skip
    """Class and probability of both networks.

    Args:
        teacher: the float network.
        told: its raw output.
        heard: the student's.
        images: shape [n, c, h, w], normalised.
        labels: what the images were made for, or None.
        names: of the classes.
    """
    agreed = distance_of_logits(heard, told)[:, 1].tolist()
    tops = [logits.double().softmax(1).max(1) for logits in (told, heard)]
    pixels = pixels_of(teacher, images)

    def draw(i: int) -> Card:
        opinions = [Opinion(who, names[int(top.indices[i])], float(top.values[i]))
                    for who, top in zip(("teacher", "student"), tops, strict=True)]  # fmt: skip
        words = "; ".join(f"{o.who}: {o.text}, {100 * (o.confidence or 0):.0f} %" for o in opinions)
        return Card(i, agreed[i], opinions, _asked(labels, i, names), [View("", f"Image {i}. {words}", pixels[i])])

    return agreed, tops[0].values.tolist(), draw


def segment(
    teacher: Teacher, told: Tensor, heard: Tensor, images: Tensor, labels: Any, names: Sequence[str]
) -> Drawn:  # fmt: skip
    """The image, and both networks' classes laid over it; with masks as labels also these."""
    agreed = distance_of_logits(heard, told)[:, 1].tolist()
    sure = told.double().softmax(1).amax(1).mean((1, 2)).tolist()
    size = (images.shape[2], images.shape[3])
    maps = [decisions(raw, size).cpu().numpy() for raw in (told, heard)]
    pixels = pixels_of(teacher, images)
    colours = np.array([colour(k) for k in range(teacher.classes)], dtype=np.uint8)

    def draw(i: int) -> Card:
        opinions, views = [], [View("image", f"Image {i}", pixels[i])]
        for who, found in zip(("teacher", "student"), maps, strict=True):
            text = _shares(found[i], names)
            over = (0.45 * pixels[i] + 0.55 * colours[found[i]]).astype(np.uint8)
            opinions.append(Opinion(who, text))
            views.append(View(who, f"Image {i}, classes of the {who}: {text}", over))
        if not isinstance(labels, Tensor) or labels.dim() != 3:
            return Card(i, agreed[i], opinions, _asked(labels, i, names), views)
        mask = labels[i].cpu().numpy()
        over = (0.45 * pixels[i] + 0.55 * colours[np.minimum(mask, teacher.classes - 1)]).astype(np.uint8)
        over[mask == IGNORE] = 0
        views.append(View("label", f"Image {i}, labels", over))
        return Card(i, agreed[i], opinions, None, views)

    return agreed, sure, draw


def detect(
    teacher: Teacher, told: Tensor, heard: Tensor, images: Tensor, labels: Any, names: Sequence[str]
) -> Drawn:  # fmt: skip
    """The image with both networks' boxes, and those of the labels where it has some.

    Agreement is the mAP@.5 of the student with the teacher's boxes as truth.
    """
    task = teacher.outputs
    assert isinstance(task, Detect)
    pixels = pixels_of(teacher, images)
    if task.decode is None:
        found = [[Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool),
                        torch.zeros(0))] * len(images)] * 2  # fmt: skip
    else:
        found = [task.objects(raw, least=SURE) for raw in (told, heard)]
    agreed = [_same(task.classes, ours, theirs) for theirs, ours in zip(*found, strict=True)]
    sure = [float(boxes.scores.max()) if len(boxes.scores) else 0.0 for boxes in found[0]]

    def draw(i: int) -> Card:
        opinions, views = [], []
        for who, boxes in zip(("teacher", "student"), (found[0][i], found[1][i]), strict=True):
            counts = Counter(names[int(k)] for k in boxes.classes)
            text = ", ".join(f"{n} {name}" for name, n in counts.most_common(5)) or f"nothing above {SURE:g}"
            opinions.append(Opinion(who, text, float(boxes.scores.max()) if len(boxes.scores) else None))
            views.append(View(who, f"Image {i}, boxes of the {who}: {text}", with_boxes(pixels[i], boxes, names)))
        if not isinstance(labels, list):
            return Card(i, agreed[i], opinions, _asked(labels, i, names), views)
        views.append(View("label", f"Image {i}, labelled boxes", with_boxes(pixels[i], labels[i], names)))
        return Card(i, agreed[i], opinions, None, views)

    return agreed, sure, draw


def names_of(teacher: Teacher) -> list[str]:
    """Names of a teacher's classes, or their numbers."""
    return labels_of(teacher.name, teacher.classes) or [f"class {k}" for k in range(teacher.classes)]


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class: hues far apart for neighbours, the same on every page."""
    strength, light = 0.55 + 0.4 * (number % 2), 0.95 - 0.25 * (number % 3 == 2)
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, strength, light)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_boxes(pixels: Pixels, boxes: Boxes, names: Sequence[str]) -> Pixels:
    """Draw boxes with class and score into a picture, which is enlarged if it is small.

    Args:
        pixels: uint8 [h, w, 3].
        boxes: in units of the picture's sides.
        names: of the classes.
    """
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    factor = max(1, -(-320 // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for corners, kind, score in zip(boxes.corners.tolist(), boxes.classes.tolist(), boxes.scores.tolist(), strict=True):
        x1, y1, x2, y2 = (v * s for v, s in zip(corners, (*image.size, *image.size), strict=True))
        pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour(kind), width=2)
        pen.text((x1 + 3, y1 + 2), f"{names[kind]} {100 * score:.0f}".encode("latin-1", "replace").decode("latin-1"),
                 fill=colour(kind), stroke_width=1, stroke_fill=(0, 0, 0))  # fmt: skip
    return np.asarray(image)


def _same(classes: int, ours: Boxes, theirs: Boxes) -> float:
    """MAP@.5 of one image; 1 where both see nothing, 0 where only the student sees something."""
    if not len(theirs.scores) or not len(ours.scores):
        return float(len(theirs.scores) == len(ours.scores))
    precision = AveragePrecision(classes)
    precision.add(ours, theirs)
    return float(precision.result()[0])


def _shares(found: NDArray[np.int64], names: Sequence[str]) -> str:
    """The classes that cover most of an image."""
    counts = np.bincount(found.ravel(), minlength=len(names)) / found.size
    return ", ".join(f"{names[k]} {100 * counts[k]:.0f} %" for k in np.argsort(-counts)[:3] if counts[k] >= 0.005)


def _asked(labels: Tensor | None, i: int, names: Sequence[str]) -> str | None:
    """What an image was made for, in words."""
    if labels is None:
        return None
    if labels.dim() == 1:
        return names[int(labels[i])]
    share, place = labels[i].topk(min(3, labels.shape[1]))
    parts = [f"{names[c]} {100 * s:.0f} %" for s, c in zip(share.tolist(), place.tolist(), strict=True) if s > 0.005]
    return ", ".join(parts)


OPINIONS: dict[str, Callable[..., Drawn]] = {"classify": classify, "segment": segment, "detect": detect}
PAINTED = ("segment",)  # tasks whose pictures need a legend


def album(
    teacher: Teacher,
    student: torch.nn.Module,
    images: Tensor,
    labels: Any,
    *,
    sample: int = 24,
    worst: int = 12,
    names: Sequence[str] | None = None,
) -> Album:
    """Ask teacher and student about images, and choose which to show.

    Args:
        teacher: the float network.
        student: its low-bit copy, in eval mode.
        images: shape [n, c, h, w], normalised, on the networks' device.
        labels: what the images were made for: int64 [n], soft [n, classes], or None; of labelled images masks
            int64 [n, h, w] or the boxes of each image.
        sample: number of images shown as they come.
        worst: number of images shown because the networks differ.
        names: of the classes; those that are known of the teacher, or numbers, if not given.
    """
    with torch.no_grad():
        parts = images.split(teacher.outputs.batch)
        told, heard = (torch.cat([net(part) for part in parts]) for net in (teacher.net, student))
    named = list(names or names_of(teacher))
    agreed, sure, draw = OPINIONS[teacher.task](teacher, told, heard, images, labels, named)
    order = sorted(range(len(images)), key=lambda i: (agreed[i], -sure[i]))
    differing = [i for i in order if agreed[i] < 1][:worst]
    return Album(len(images), sum(agreed) / len(agreed), [draw(i) for i in range(min(sample, len(images)))],
                 [draw(i) for i in differing], teacher.mean is None,
                 [(name, "#{:02x}{:02x}{:02x}".format(*colour(k))) for k, name in enumerate(named)]
                 if teacher.task in PAINTED else [])  # fmt: skip


def distance(teacher: Teacher) -> Callable[[Tensor, Tensor], Tensor]:
    """How a student's raw output is compared with the teacher's: KL and agreement of the classes at every position."""

    def compare(ours: Tensor, theirs: Tensor) -> Tensor:
        pair = (teacher.outputs.parts(raw).get("class", raw) for raw in (ours, theirs))
        return distance_of_logits(*pair)

    return compare
