"""Readers of images with a class per pixel: CamVid and Pascal VOC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsq.data.files import Found, Shape
from zsq.data.images import SUFFIXES, listed_set
from zsq.errors import BadInput
from zsq.extras import optional
from zsq.tasks.segment import IGNORE


def camvid_folders(folder: Path) -> tuple[Path, Path]:
    """Folders of images and masks: DIR/test and DIR/testannot; of a split that is named DIR/val and DIR/valannot."""
    images = folder if folder.with_name(f"{folder.name}annot").is_dir() else folder / "test"
    return images, images.with_name(f"{images.name}annot")


def read_camvid(folder: Path, part: slice, shape: Shape, *, classes: int, with_labels: bool) -> Found:
    """``camvid:DIR`` (its test split) or ``camvid:DIR/val``: images, and masks of class numbers.

    The number behind the last class is not scored.

    Raises:
        BadInput: if folders are missing, or naming the first image without a mask or the first mask that is none.
    """
    subject = f"data camvid:{folder}"
    images, masks = camvid_folders(folder)
    if not images.is_dir() or not masks.is_dir():
        missing = masks if images.is_dir() else images
        raise BadInput(subject, expected="folders test and testannot, or a split such as DIR/val beside DIR/valannot",
                       got=f"no folder {missing.name}", fix="Check the path.")  # fmt: skip
    pictures = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    rows = [(path, masks / f"{path.stem}.png" if with_labels else None) for path in pictures]
    truth = _mask_reader(rows, part, shape, classes, unscored=classes) if with_labels else None
    return listed_set(rows, part, shape, folder if folder != images else folder.parent, truth, subject)


def read_voc_masks(folder: Path, part: slice, shape: Shape, *, classes: int, with_labels: bool) -> Found:
    """``voc:DIR`` for a segmenter: the images of ImageSets/Segmentation/val.txt, masks in SegmentationClass.

    Raises:
        BadInput: if folders or the list are missing, or naming the first bad file.
    """
    subject = f"data voc:{folder}"
    names = voc_names(folder, "Segmentation", subject)
    rows = [
        (folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png" if with_labels else None)
        for name in names
    ]
    require_files([image for image, _ in rows], subject)
    truth = _mask_reader(rows, part, shape, classes, unscored=IGNORE) if with_labels else None
    return listed_set(rows, part, shape, folder, truth, subject)


def voc_names(folder: Path, kind: str, subject: str) -> list[str]:
    """Names of the images of a list of VOC: val.txt, else test.txt, else trainval.txt, in ImageSets/KIND.

    Raises:
        BadInput: if DIR is no VOC folder.
    """
    lists = [folder / "ImageSets" / kind / f"{split}.txt" for split in ("val", "test", "trainval")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        inner = sorted(folder.glob("**/ImageSets")) if folder.is_dir() else []
        fix = f"Name the folder {inner[0].parent}." if inner else "Name a folder such as VOCdevkit/VOC2012."
        raise BadInput(subject, expected=f"ImageSets/{kind}/val.txt in it", got="none there", fix=fix)
    return [line.split()[0] for line in found.read_text(encoding="utf-8").splitlines() if line.strip()]


def require_files(paths: list[Path], subject: str) -> None:
    """Refuse a set with a missing file, naming the first."""
    if (missing := next((path for path in paths if not path.is_file()), None)) is not None:
        raise BadInput(subject, expected=f"the file {missing}, which the set names", got="no such file",
                       fix="Complete the folder.")  # fmt: skip


def _mask_reader(
    rows: list[tuple[Path, Path | None]], part: slice, shape: Shape, classes: int, *, unscored: int
) -> Callable[[int], Tensor]:
    """Check every mask of a slice, and give them one by one at the network's size (nearest pixel)."""
    pil = optional("PIL.Image", "pillow", "masks")
    _, h, w = shape.image

    def read(index: int) -> np.ndarray:
        image, path = rows[index]
        if path is None or not path.is_file():
            raise BadInput(f"image {image}", expected=f"its mask {path}", got="no such file",
                           fix="Complete or remove it.")  # fmt: skip
        try:
            with pil.open(path) as file:
                if file.mode not in ("L", "P", "I", "I;16", "1"):
                    raise BadInput(f"mask {path}", expected="one class number per pixel (8-bit grey or palette)",
                                   got=f"a picture of mode {file.mode}", fix="Save class numbers.")  # fmt: skip
                return np.array(file.resize((w, h), pil.Resampling.NEAREST)).astype(np.int64)
        except (OSError, ValueError, SyntaxError) as error:
            raise BadInput(f"mask {path}", expected="a readable PNG", got=f"{error}",
                           fix="Replace or remove it.") from error  # fmt: skip

    for index in range(len(rows))[part]:
        values = read(index)
        bad = values[(values >= classes) & (values != unscored) & (values != IGNORE)]
        if bad.size:
            expected = f"numbers from 0 to {classes - 1}, or {unscored} for none"
            raise BadInput(f"mask {rows[index][1]}", expected=expected, got=int(bad[0]),
                           fix="Use the network these classes belong to.")  # fmt: skip

    def truth(index: int) -> Tensor:
        values = torch.from_numpy(read(index))
        return torch.where(values == unscored, IGNORE, values)

    return truth
