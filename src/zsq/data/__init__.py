"""Labelled test sets by name. Only the evaluation reads labels; no recipe can import this."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.data.boxes import read_coco, read_voc_boxes, read_yolo
from zsq.data.files import Found, Shape, open_npz, read_cifar, read_digits, read_npz, sha256_of
from zsq.data.images import read_folder
from zsq.data.masks import camvid_folders, read_camvid, read_voc_masks
from zsq.data.shapes import SHAPES, read_shapes
from zsq.errors import BadInput
from zsq.teachers import Teacher

CHUNK = 256
BUILT_IN = ("digits", "shapes-segment", "shapes-detect")  # sets that need no file
SLICED = ("camvid", "voc", "coco", "yolo")  # folders of which a slice can be named


@dataclass(frozen=True)
class LabelledData:
    """A labelled test set, read batch by batch in the input space of one teacher.

    Attributes:
        name: file or folder name and slice, without the path.
        sha256: of the whole file, or over names and bytes of all files of a folder.
        labels: shape [count], int64, on the CPU; empty of a set of masks or boxes.
        teacher: whose normalisation applies.
        found: where the pixels come from.
    """

    name: str
    sha256: str
    labels: Tensor
    teacher: Teacher
    found: Found

    @property
    def count(self) -> int:
        """Number of images."""
        return self.found.count

    @property
    def names(self) -> list[str] | None:
        """Names of the teacher's classes, if the set has them; what it names behind them is not scored."""
        known = self.found.names[: self.teacher.classes]
        return list(known) if len(known) == self.teacher.classes else None

    def batches(self, size: int = CHUNK) -> Iterator[tuple[Tensor, Any]]:
        """Give images and what is true of them in order, once per call.

        Args:
            size: images per batch; the last may have fewer.

        Yields:
            Images [b, c, h, w], float32, normalised, on the teacher's device; with them labels int64 [b] there, masks
            int64 [b, h, w], or the `Boxes` of each image.
        """
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            images = self.teacher.normalise(self.found.read(start, stop))
            if self.found.truths is not None:
                yield images, self.found.truths(start, stop)
            else:
                yield images, self.labels[start:stop].to(images.device)


Reader = Callable[..., Found]  # of what follows the colon, the teacher, and with_labels=


def _digits(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
    _same_classes("digits", 10, teacher)
    return read_digits(rest, _shape(teacher))


def _npz(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
    path, part = split_slice(rest)
    return read_npz(path, part, _shape(teacher), with_labels=with_labels)


def _cifar(classes: int) -> Reader:
    def read(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
        _same_classes(f"cifar{classes}", classes, teacher)
        return read_cifar(Path(rest), _shape(teacher), classes=classes)

    return read


def _folder(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
    return read_folder(Path(rest), _shape(teacher), classes=teacher.classes, with_labels=with_labels)


def _shapes(*, masks: bool) -> Reader:
    def read(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
        _same_classes("shapes-segment" if masks else "shapes-detect", len(SHAPES) + masks, teacher)
        return read_shapes(rest, _shape(teacher), masks=masks, with_labels=with_labels)

    return read


def _listed(read: Callable[..., Found]) -> Reader:
    """A folder of images with masks or boxes, in the order of their names, or a slice of it."""

    def open_folder(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
        folder, part = split_slice(rest)
        return read(folder, part, _shape(teacher), classes=teacher.classes, with_labels=with_labels)

    return open_folder


def _voc(rest: str, teacher: Teacher, *, with_labels: bool) -> Found:
    return _listed(read_voc_masks if teacher.task == "segment" else read_voc_boxes)(
        rest, teacher, with_labels=with_labels
    )


# A new form of DATA is one function and one line here, and one in `zsq list data` (catalogue.py).
READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "digits": (_digits, ("classify",)),
    "npz": (_npz, ("classify",)),
    "cifar10": (_cifar(10), ("classify",)),
    "cifar100": (_cifar(100), ("classify",)),
    "imagefolder": (_folder, ("classify",)),
    "shapes-segment": (_shapes(masks=True), ("segment",)),
    "shapes-detect": (_shapes(masks=False), ("detect",)),
    "camvid": (_listed(read_camvid), ("segment",)),
    "voc": (_voc, ("segment", "detect")),
    "coco": (_listed(read_coco), ("detect",)),
    "yolo": (_listed(read_yolo), ("detect",)),
}


def load_data(spec: str, teacher: Teacher) -> LabelledData:
    """Open a labelled test set.

    Args:
        spec: ``digits`` (its held-out part; ``digits:train`` is the rest), ``npz:FILE``, ``npz:FILE[a:b]``,
            ``cifar10:DIR``, ``cifar100:DIR`` or ``imagefolder:DIR`` of classified images; ``camvid:DIR``, ``voc:DIR``,
            ``coco:DIR`` or ``yolo:DIR`` of masks or boxes, each with ``[a:b]`` for a slice.
        teacher: whose input shape, normalisation, resize, crop and classes apply. Image files are resized and cropped;
            arrays must have the network's size.

    Returns:
        The set; images are decoded when its batches are read.

    Raises:
        BadInput: for an unknown form, or files that are missing, damaged or do not fit the teacher.
    """
    found = _open(spec, teacher, with_labels=True)
    if found.truths is not None:
        return LabelledData(_short(spec), found.sha256, found.labels, teacher, found)
    low, high = int(found.labels.min()), int(found.labels.max())
    if low < 0 or high >= teacher.classes:
        raise BadInput(
            f"data {spec}",
            expected=f"labels from 0 to {teacher.classes - 1}, the classes of {teacher.name}",
            got=f"{low} to {high}",
            fix="Number the classes from 0, as the network does.",
        )
    return LabelledData(_short(spec), found.sha256, found.labels, teacher, found)


def load_images(spec: str, teacher: Teacher) -> Tensor:
    """Read pixels alone: labels are not even opened.

    Args:
        spec: as for `load_data`; an image folder may then be any folder.
        teacher: whose input shape and normalisation apply.

    Returns:
        Shape [n, c, h, w], float32, normalised, on the teacher's device.

    Raises:
        BadInput: as for `load_data`.
    """
    found = _open(spec, teacher, with_labels=False)
    parts = [found.read(a, min(a + CHUNK, found.count)) for a in range(0, found.count, CHUNK)]
    return torch.cat([teacher.normalise(part) for part in parts])


def check_disjoint(images: str, evaluation: str) -> None:
    """Refuse a pool that contains images of the evaluation set.

    Args:
        images: a DATA string whose pixels will be used.
        evaluation: the DATA string that will be scored on.

    Raises:
        BadInput: if both name a common part of the same file (also a copy of it) or folder.
    """
    (source, start, stop), (other, first, last) = _extent(images), _extent(evaluation)
    same = source == other or (
        isinstance(source, Path)
        and isinstance(other, Path)
        and (source.is_relative_to(other) or other.is_relative_to(source))
    )
    if same and ((start < last and first < stop) or source != other):
        raise BadInput(
            f"--images {images}",
            expected=f"images apart from those of --eval {evaluation}",
            got="common ones",
            fix="Choose disjoint slices, e.g. [:2000] and [2000:].",
        )


def split_slice(text: str) -> tuple[Path, slice]:
    """Read ``FILE`` or ``FILE[a:b]``; bounds as in Python, either may be left out or negative.

    Raises:
        BadInput: for anything else in the brackets.

    Example:
        >>> split_slice("set.npz[2000:]")[1]
        slice(2000, None, None)
    """
    file, bracket, inner = text.removesuffix("]").rpartition("[") if text.endswith("]") else (text, "", "")
    if not bracket:
        return Path(text), slice(None)
    bounds = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", inner)
    if bounds is None or not file:
        raise BadInput(
            f"data npz:{text}",
            expected="FILE or FILE[a:b] with whole numbers a and b",
            got=f"[{inner}]",
            fix="For example npz:test.npz[2000:] or npz:test.npz[:-100].",
        )
    start, stop = (None if bound is None else int(bound) for bound in bounds.groups())
    return Path(file), slice(start, stop)


def _open(spec: str, teacher: Teacher, *, with_labels: bool) -> Found:
    kind, _, rest = spec.partition(":")
    if kind not in READERS or (kind not in BUILT_IN and not rest):
        forms = f"{', '.join(BUILT_IN)}, npz:FILE, npz:FILE[a:b], " + ", ".join(
            f"{k}:DIR" for k in READERS if k not in (*BUILT_IN, "npz")
        )
        raise BadInput("data", expected=forms, got=repr(spec), fix="See `zsq list data`.")
    read, tasks = READERS[kind]
    if with_labels and teacher.task not in tasks:
        raise BadInput(
            f"data {spec}", expected=f"a network whose task is to {' or '.join(tasks)}",
            got=f"{teacher.name}, whose task is to {teacher.task}",
            fix="Choose a set for its task (`zsq list data`), or name the task with --task.",
        )  # fmt: skip
    return read(rest, teacher, with_labels=with_labels)


def _shape(teacher: Teacher) -> Shape:
    dense = not teacher.outputs.image_labels  # masks and boxes lie over the whole image: nothing may be cut off
    return Shape(teacher.image, None if dense else teacher.resize, None if dense else teacher.crop, stretch=dense)


def _same_classes(name: str, classes: int, teacher: Teacher) -> None:
    if teacher.classes != classes:
        raise BadInput(
            f"data {name}",
            expected=f"a network with {classes} classes",
            got=f"{teacher.classes} ({teacher.name})",
            fix="Choose the set the network was trained for.",
        )


def _short(spec: str) -> str:
    """The spec without folders: results never carry a path of one machine."""
    kind, _, rest = spec.partition(":")
    if kind in BUILT_IN:
        return spec
    if kind == "npz":
        path, _ = split_slice(rest)
        return path.name + rest[len(rest.partition("[")[0]) :] if rest.endswith("]") else path.name
    if kind in SLICED:
        path, _ = split_slice(rest)
        return f"{kind} {path.resolve().name}{rest[len(str(rest).rpartition('[')[0]) :] if rest.endswith(']') else ''}"
    return f"{kind} {Path(rest).resolve().name}"


def _extent(spec: str) -> tuple[object, float, float]:
    """Source, first and last position of the images that a spec names."""
    kind, _, rest = spec.partition(":")
    if kind == "npz":
        path, part = split_slice(rest)
        start, stop, _ = part.indices(len(open_npz(path, ("images",))["images"]))
        return sha256_of(path), start, stop
    if kind in SLICED:
        path, part = split_slice(rest)
        first, last = part.start or 0, float("inf") if part.stop is None else part.stop
        if first < 0 or last < 0:
            first, last = 0, float("inf")  # from the end: how many there are is not known here
        path = camvid_folders(path)[0] if kind == "camvid" else path
        return path.resolve(), first, last
    source = f"{kind.partition('-')[0]} {rest}" if kind in BUILT_IN else Path(rest).resolve()
    return source, 0, float("inf")
