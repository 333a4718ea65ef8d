"""Reader of image files in folders: decoding, resizing, cropping. Gives uint8 images of one size."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq.data.files import Found, Shape, sha256_of
from zsq.errors import BadInput
from zsq.extras import optional

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


def read_folder(folder: Path, shape: Shape, *, classes: int, with_labels: bool) -> Found:
    """``imagefolder:DIR``: one folder per class, sorted by name; or flat images with labels.csv (columns file, label).

    Files of labels.csv are looked up in DIR, then in DIR/images. Without labels every image file under DIR is read.

    Raises:
        BadInput: if there are no images, a listed one is missing, or the folders are not the network's classes.
    """
    optional("PIL.Image", "pillow", f"data imagefolder:{folder}")
    if not folder.is_dir():
        raise BadInput(
            f"data imagefolder:{folder}", expected="a folder", got="none of that name", fix="Check the path."
        )
    if not with_labels:
        rows = [(path, 0) for path in _images(folder)]
    elif (folder / "labels.csv").is_file():
        rows = _listed(folder)
    else:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        rows = [(path, label) for label, name in enumerate(names) for path in _images(folder / name)]
        if names and len(names) != classes:
            raise BadInput(
                f"data imagefolder:{folder}",
                expected=f"{classes} class folders, one per class of the network",
                got=f"{len(names)}",
                fix="Name all classes, or list the images in DIR/labels.csv.",
            )
    if not rows:
        raise BadInput(
            f"data imagefolder:{folder}",
            expected="class folders with images, or labels.csv",
            got="neither",
            fix="See `zsq list data`.",
        )
    paths = [path for path, _ in rows]
    digest = hashlib.sha256()
    for path, label in rows:
        digest.update(f"{path.relative_to(folder).as_posix()} {label} {sha256_of(path)}\n".encode())
    labels = torch.tensor([label for _, label in rows]) if with_labels else torch.empty(0, dtype=torch.int64)
    return Found(
        lambda a, b: torch.stack([open_image(p, shape) for p in paths[a:b]]),
        len(paths),
        labels,
        digest.hexdigest(),
        str(folder.resolve()),
    )


def _images(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _listed(folder: Path) -> list[tuple[Path, int]]:
    table, rows = folder / "labels.csv", []
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"file", "label"} <= set(reader.fieldnames or ()):
            raise BadInput(
                f"data {table}",
                expected="columns file and label",
                got=", ".join(reader.fieldnames or ["none"]),
                fix="Name them in the first line.",
            )
        for number, row in enumerate(reader, 2):
            path = next((p for p in (folder / row["file"], folder / "images" / row["file"]) if p.is_file()), None)
            if path is None or not (row["label"] or "").strip().isdecimal():
                got = f"{row['file']!r}, {row['label']!r}"
                raise BadInput(
                    f"data {table}, line {number}",
                    expected="an existing file and a class number",
                    got=got,
                    fix="Correct the line.",
                )
            rows.append((path, int(row["label"])))
    return rows


def open_image(path: Path, shape: Shape) -> Tensor:
    """Decode one file; resize its shorter side and crop its centre, or stretch it.

    Args:
        path: the file.
        shape: what it must become; resizing is bilinear with antialiasing, as Pillow does it.

    Returns:
        Shape [h, w, c], uint8.

    Raises:
        BadInput: if the file cannot be decoded, or does not come out in the network's size.
    """
    pil = optional("PIL.Image", "pillow", f"image {path}")
    c, h, w = shape.image
    try:
        with pil.open(path) as file:
            picture = file.convert("L" if c == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise BadInput(
            f"image {path}", expected="a readable image", got=f"{error}", fix="Replace or remove it."
        ) from error
    if shape.stretch:
        picture = picture.resize((w, h), pil.Resampling.BILINEAR)
    elif shape.resize is not None:
        width, height = picture.size
        short = min(width, height)
        size = (int(shape.resize * width / short), int(shape.resize * height / short))
        picture = picture.resize(size, pil.Resampling.BILINEAR)
    if shape.crop is not None:
        left, top = round((picture.width - shape.crop) / 2), round((picture.height - shape.crop) / 2)
        picture = picture.crop((left, top, left + shape.crop, top + shape.crop)) if min(left, top) >= 0 else picture
    if (picture.height, picture.width) != (h, w) or c not in (1, 3):
        raise BadInput(
            f"image {path}",
            expected=f"{h}x{w} pixels, as the network wants",
            got=f"{picture.height}x{picture.width} after resize {shape.resize} and crop {shape.crop}",
            fix="Set --resize (shorter side) and --crop.",
        )
    return torch.from_numpy(np.array(picture)).reshape(h, w, c)


def listed_set(
    rows: Sequence[tuple[Path, Path | None]], part: slice, shape: Shape, folder: Path,
    truth: Callable[[int], Any] | None, subject: str,
) -> Found:  # fmt: skip
    """A set of image files in order, each with what is true of it.

    Args:
        rows: image files and, where each has one, the file that belongs to it; all in the order of the set.
        part: which of them.
        shape: what the images must become.
        folder: names in the checksum are relative to it.
        truth: gives what is true of the image at a position of `rows`; None where only pixels are wanted.
        subject: how messages name the set.

    Raises:
        BadInput: if there is none in that slice, or the first file that is no image.
    """
    pil = optional("PIL.Image", "pillow", subject)
    chosen = range(len(rows))[part]
    if not chosen:
        expected, got = (f"a slice of its {len(rows)} images", "an empty one") if rows else ("images", "none")
        raise BadInput(subject, expected=expected, got=got, fix="Choose other bounds, or check the path.")
    digest = hashlib.sha256()
    for index, paths in enumerate(rows):
        for path in paths:
            if path is not None:
                digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
        if index in chosen:
            try:
                pil.open(paths[0]).close()  # reads the head only
            except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
                raise BadInput(f"image {paths[0]}", expected="a readable image", got=f"{error}",
                               fix="Replace or remove it.") from error  # fmt: skip

    def truths(a: int, b: int) -> Any:
        found = [truth(index) for index in chosen[a:b]] if truth is not None else []
        return torch.stack(found) if found and isinstance(found[0], Tensor) else found

    return Found(
        lambda a, b: torch.stack([open_image(rows[index][0], shape) for index in chosen[a:b]]),
        len(chosen), torch.empty(0, dtype=torch.int64), digest.hexdigest(), str(folder.resolve()), chosen[0],
        None if truth is None else truths, listed_names(folder),
    )  # fmt: skip


def listed_names(folder: Path) -> tuple[str, ...]:
    """Names of a set's classes from its classes.txt, one a line; nothing without a readable one: names only explain."""
    try:
        lines = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(line.strip() for line in lines if line.strip())
