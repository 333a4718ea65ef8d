"""Readers of labelled arrays: digits, npz, CIFAR. Each gives uint8 images of one size; nothing here normalises."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.extras import optional


@dataclass(frozen=True)
class Found:
    """What a reader found.

    Attributes:
        read: gives images [a, b) as uint8 [b - a, h, w, c]; RGB for three channels.
        count: number of images.
        labels: shape [count], int64, of a set of classified images; empty of another set, or where only pixels were
            asked for.
        sha256: of the file, or of names and bytes of all files.
        source: what the images come from: equal for equal sources.
        start: position of the first image within that source.
        truths: gives what is true of images [a, b): int64 masks [b - a, h, w], or `Boxes` of each image; None for
            classified images.
        names: of the classes in the order of their numbers, where the set names them (DIR/classes.txt, COCO's json).
    """

    read: Callable[[int, int], Tensor]
    count: int
    labels: Tensor
    sha256: str
    source: str
    start: int = 0
    truths: Callable[[int, int], Any] | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What the images must become.

    Attributes:
        image: (c, h, w).
        resize: shorter side to resize to, for files of any size.
        crop: side of the centre crop.
        stretch: resize image files to (h, w) as they are, whatever their aspect, instead.
    """

    image: tuple[int, int, int]
    resize: int | None = None
    crop: int | None = None
    stretch: bool = False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- digits


def digits_split(*, held_out: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scikit-learn's 1,797 digits, split once and for all: every third image is held out (599), 1,198 train.

    Within the images sorted by class (stably), positions 2, 5, 8 ... are held out; no random number is involved.

    Args:
        held_out: which part.

    Returns:
        Images uint8 [n, 8, 8, 1] (the 0..16 of the set as round(255 / 16 * value)), labels int64 [n], and positions
        within the whole set; in the order of the set.

    Raises:
        BadInput: without scikit-learn.
    """
    whole = optional("sklearn.datasets", "scikit-learn", "data digits").load_digits()
    by_class = np.argsort(whole.target, kind="stable")
    apart = np.zeros(len(by_class), dtype=bool)
    apart[by_class[2::3]] = True
    chosen = np.flatnonzero(apart == held_out)
    pixels = np.rint(whole.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    return pixels, whole.target[chosen].astype(np.int64), chosen


def read_digits(part: str, shape: Shape) -> Found:
    """``digits``: the held-out part; ``digits:train``: the rest."""
    if part not in ("", "train"):
        raise BadInput("data", expected="digits or digits:train", got=f"'digits:{part}'", fix="Choose one of the two.")
    images, labels, _ = digits_split(held_out=not part)
    _same_shape(images, shape, "data digits")
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return _array(images, labels, sha256=digest, source=f"digits {part}")


# ---- arrays


def open_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read plain arrays out of an .npz file; no other key is opened, and nothing pickled is read.

    Raises:
        BadInput: if the file or a key is missing, or it is no such file.
    """
    subject = f"data {path}"
    if not path.is_file():
        raise BadInput(subject, expected="an .npz file", got="no such file", fix="Check the path.")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = list(file)
            arrays = {key: np.atleast_1d(file[key]) for key in keys if key in found}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(
            subject,
            expected="an .npz file of plain arrays",
            got=f"something else ({error})",
            fix="Write it with numpy.savez_compressed; pickled objects are never read.",
        ) from error
    if len(arrays) < len(keys):
        raise BadInput(
            subject,
            expected=f"the keys {' and '.join(keys)}",
            got=", ".join(found) or "none",
            fix="Save both with numpy.savez_compressed(FILE, images=..., labels=...).",
        )
    return arrays


def read_npz(path: Path, part: slice, shape: Shape, *, with_labels: bool) -> Found:
    """``npz:FILE[a:b]``: arrays ``images`` uint8 [n, h, w, c] and ``labels`` int64 [n], already of the network's size.

    Raises:
        BadInput: if the file or a key is missing, or type, shape or length is wrong, or the slice is empty.
    """
    subject, arrays = f"data {path}", open_npz(path, ("images", "labels") if with_labels else ("images",))
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise BadInput(
            subject,
            expected="images of type uint8, 0..255",
            got=f"{images.dtype}",
            fix="Save the pixels before any normalisation.",
        )
    _same_shape(images, shape, subject)
    labels = _whole_labels(arrays["labels"], len(images), subject) if with_labels else None
    start, stop, _ = part.indices(len(images))
    if stop <= start:
        raise BadInput(
            subject, expected=f"a slice of its {len(images)} images", got="an empty one", fix="Choose other bounds."
        )
    digest = sha256_of(path)
    return _array(
        images[start:stop], None if labels is None else labels[start:stop], sha256=digest, source=digest, start=start
    )


def _whole_labels(labels: np.ndarray, count: int, subject: str) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise BadInput(
            subject,
            expected="labels of type int64 and shape [n]",
            got=f"{labels.dtype} {list(labels.shape)}",
            fix="Save one class number per image.",
        )
    if len(labels) != count:
        raise BadInput(
            subject, expected=f"{count} labels, one per image", got=f"{len(labels)}", fix="Save both together."
        )
    return labels.astype(np.int64)


def _same_shape(images: np.ndarray, shape: Shape, subject: str) -> None:
    c, h, w = shape.image
    if images.shape[1:] != (h, w, c) or not len(images):
        raise BadInput(
            subject,
            expected=f"images of shape [n, {h}, {w}, {c}] (height, width, channels) as the network wants",
            got=f"{list(images.shape)}",
            fix="Save them in that size, or use imagefolder:DIR with --resize and --crop.",
        )


def _array(images: np.ndarray, labels: np.ndarray | None, *, sha256: str, source: str, start: int = 0) -> Found:
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    numbers = torch.empty(0, dtype=torch.int64) if labels is None else torch.from_numpy(labels)
    return Found(lambda a, b: pixels[a:b], len(pixels), numbers, sha256, source, start)


# ---- CIFAR


def read_cifar(folder: Path, shape: Shape, *, classes: int) -> Found:
    """``cifar10:DIR`` or ``cifar100:DIR``: the test set of the binary version, fine labels.

    Raises:
        BadInput: if DIR holds the pickled version, no file or one of another size.
    """
    name, file, label_bytes = ("cifar10", "test_batch.bin", 1) if classes == 10 else ("cifar100", "test.bin", 2)
    inner = {10: "cifar-10-batches-", 100: "cifar-100-"}[classes]
    places = [folder, folder / (inner + ("bin" if classes == 10 else "binary"))]
    path = next((place / file for place in places if (place / file).is_file()), None)
    fix = f"Unpack cifar-{classes}-binary.tar.gz and name its folder."
    if path is None:
        pickled = [folder / file.removesuffix(".bin"), folder / f"{inner}py{'' if classes == 10 else 'thon'}"]
        got = "the pickled version, which is never read" if any(p.exists() for p in pickled) else "none there"
        raise BadInput(f"data {name}:{folder}", expected=f"{file} of the binary version", got=got, fix=fix)
    raw = np.fromfile(path, dtype=np.uint8)
    row = label_bytes + 3072
    if not raw.size or raw.size % row:
        raise BadInput(
            f"data {path}", expected=f"rows of {row} bytes", got=f"{raw.size} bytes: cut short or another file", fix=fix
        )
    rows = raw.reshape(-1, row)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    _same_shape(images, shape, f"data {path}")
    digest = sha256_of(path)
    return _array(images, rows[:, label_bytes - 1].astype(np.int64), sha256=digest, source=digest)
