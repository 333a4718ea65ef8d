"""Images that a run kept: synthetic ones, and labelled ones of an evaluation; checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.tasks.base import Boxes
from zsq.teachers import Teacher


class Labelled(NamedTuple):
    """Labelled images.

    Attributes:
        name: of their set.
        images: shape [n, c, h, w], normalised.
        truth: labels int64 [n], masks int64 [n, h, w], or the boxes of each image.
        classes: names of the classes, if the set has them.
    """

    name: str
    images: Tensor
    truth: Any
    classes: list[str] | None = None


def labelled_images(path: Path, teacher: Teacher) -> Labelled | None:
    """The first images of a run's last evaluation; None without one.

    Raises:
        BadInput: if the file is damaged.
    """
    file = path / "labelled.safetensors"
    if not file.exists():
        return None
    tree = load_tree(file)
    try:
        images, truth = tree["images"], tree["truth"]
        if isinstance(truth, list):
            truth = [Boxes(**boxes) for boxes in truth]
        whole = truth if isinstance(truth, Tensor) else torch.cat([boxes.classes for boxes in truth])
        classes = whole[whole != 255] if whole.dim() == 3 else whole
        right = images.dim() == 4 and images.shape[1] == teacher.image[0] and len(images) == len(truth) > 0
        if right and bool(images.isfinite().all() & ((classes >= 0) & (classes < teacher.classes)).all()):
            names = tree.get("classes")  # files of 0.1 have none
            known = isinstance(names, list) and len(names) == teacher.classes
            return Labelled(str(tree["name"]), images, truth, [str(name) for name in names] if known else None)
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError):
        pass
    return damaged(file, "images and labels of an evaluation", "other data")


def saved_images(path: Path, teacher: Teacher) -> tuple[Tensor | None, Tensor | None]:
    """Saved images of a run and what they were made for; None for what is not there.

    They have the size of the teacher's input, or another one that the network takes (`--synthetic`).

    Raises:
        BadInput: if the file is damaged or does not fit the teacher.
    """
    file = path / "images.safetensors"
    if not file.exists():
        return None, None
    tree = load_tree(file)
    images = tree.get("images") if isinstance(tree, dict) else None
    fits = isinstance(images, Tensor) and images.dim() == 4 and _takes(teacher, tuple(images.shape[1:]))
    if not isinstance(images, Tensor) or not fits or len(images) == 0 or not bool(images.isfinite().all()):
        return damaged(file, f"finite images of shape [n, {', '.join(map(str, teacher.image))}]", "other data")
    labels = tree.get("labels", tree.get("soft_labels"))
    if labels is None:
        return images, None
    right = isinstance(labels, Tensor) and len(labels) == len(images)
    if labels.dtype == torch.int64:
        right = right and bool(((labels >= 0) & (labels < teacher.classes)).all())
    else:
        right = right and labels.dim() == 2 and labels.shape[1] == teacher.classes
    return (images, labels) if right else damaged(file, f"labels of {teacher.classes} classes", "other ones")


def _takes(teacher: Teacher, image: tuple[int, ...]) -> bool:
    if image == teacher.image or image[0] != teacher.image[0] or min(image) < 1:
        return image == teacher.image
    try:
        return teacher.sized((image[1], image[2])).image == image
    except BadInput:
        return False


def damaged(file: Path, expected: str, got: str) -> Any:
    """Refuse a file.

    Raises:
        BadInput: always.
    """
    raise BadInput(str(file), expected=expected, got=got,
                   fix="The file was changed or cut short: restore it, or quantize again.")  # fmt: skip
