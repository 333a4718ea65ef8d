"""Readers of images with boxes: Pascal VOC (xml), COCO (json) and YOLO (txt)."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.data.files import Found, Shape
from zsq.data.images import SUFFIXES, listed_set
from zsq.data.masks import require_files, voc_names
from zsq.errors import BadInput
from zsq.tasks.base import Boxes

_NAMES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor"""
VOC_CLASSES = list(_NAMES.split())


def read_yolo(folder: Path, part: slice, shape: Shape, *, classes: int, with_labels: bool) -> Found:
    """``yolo:DIR``: images/NAME.jpg and labels/NAME.txt with lines "class cx cy w h" in units of the image's sides.

    An image without a txt shows nothing; a txt without an image is none of the set.

    Raises:
        BadInput: if folders are missing, or naming the first bad file and line.
    """
    subject = f"data yolo:{folder}"
    for name in ("images", "labels") if with_labels else ("images",):
        if not (folder / name).is_dir():
            raise BadInput(subject, expected="folders images and labels", got=f"no folder {name}",
                           fix="Check the path.")  # fmt: skip
    images = sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in SUFFIXES)
    rows = [(path, label if (label := folder / "labels" / f"{path.stem}.txt").is_file() else None) for path in images]
    if not with_labels:
        return listed_set([(image, None) for image, _ in rows], part, shape, folder, None, subject)
    truths = [_yolo_boxes(label, classes) for _, label in rows]
    return listed_set(rows, part, shape, folder, truths.__getitem__, subject)


def _yolo_boxes(path: Path | None, classes: int) -> Boxes:
    numbers: list[list[float]] = []
    for line, text in enumerate(_lines(path) if path is not None else [], 1):
        try:
            row = [float(word) for word in text.split()]
        except ValueError:
            row = []
        if len(row) != 5 or not row[0].is_integer() or not 0 <= row[0] < classes or min(row[3:]) < 0:
            raise BadInput(f"{path}, line {line}", expected=f"class (0 to {classes - 1}) cx cy w h", got=repr(text),
                           fix="Correct the line, or use the network these classes belong to.")  # fmt: skip
        numbers.append(row)
    table = torch.tensor(numbers).reshape(-1, 5)
    centre, half = table[:, 1:3], table[:, 3:5] / 2
    return make_boxes(torch.cat([centre - half, centre + half], 1), table[:, 0].long())


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(path), expected="a text file", got=f"{error}", fix="Replace or remove it.") from error


def read_voc_boxes(folder: Path, part: slice, shape: Shape, *, classes: int, with_labels: bool) -> Found:
    """``voc:DIR`` for a detector: the images of ImageSets/Main/val.txt (else test.txt), boxes in Annotations/NAME.xml.

    Classes are VOC's twenty in alphabetical order, or those of DIR/classes.txt, one a line. Objects marked difficult
    count neither as found nor as missed.

    Raises:
        BadInput: if folders or the list are missing, or naming the first bad file.
    """
    subject = f"data voc:{folder}"
    names = voc_names(folder, "Main", subject)
    rows = [(folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml") for name in names]
    require_files([image for image, _ in rows], subject)
    if not with_labels:
        return listed_set([(image, None) for image, _ in rows], part, shape, folder, None, subject)
    own = folder / "classes.txt"
    known = [line.strip() for line in _lines(own)] if own.is_file() else VOC_CLASSES
    if len(known) != classes:
        raise BadInput(subject, expected=f"{classes} classes, as the network has", got=f"{len(known)}",
                       fix="Use a network for this set, or name its classes in DIR/classes.txt.")  # fmt: skip
    require_files([label for _, label in rows], subject)
    truths = [_voc_boxes(label, known) for _, label in rows]
    return listed_set(list(rows), part, shape, folder, truths.__getitem__, subject)


def _voc_boxes(path: Path, known: list[str]) -> Boxes:
    try:
        root = ET.parse(path).getroot()
        width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        corners, numbers, difficult = [], [], []
        for item in root.iter("object"):
            box = [float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            # Pixels are counted from 1, and the last one belongs to the box.
            corners.append([(box[0] - 1) / width, (box[1] - 1) / height, box[2] / width, box[3] / height])
            numbers.append(known.index(item.findtext("name", "")))
            difficult.append(item.findtext("difficult", "0").strip() == "1")
    except (ET.ParseError, OSError, ValueError, ZeroDivisionError) as error:
        raise BadInput(str(path), expected="an annotation of VOC with size, and name and bndbox of every object",
                       got=f"{error}", fix="Correct or remove it.") from error  # fmt: skip
    return make_boxes(torch.tensor(corners).reshape(-1, 4), torch.tensor(numbers, dtype=torch.int64), difficult)


def read_coco(folder: Path, part: slice, shape: Shape, *, classes: int, with_labels: bool) -> Found:
    """``coco:DIR``: annotations/instances_val2017.json (or the only instances_*.json, or DIR itself a .json file).

    Images are looked up in DIR/SPLIT, DIR/images and DIR. Categories are numbered in the order of their ids where there
    are as many as the network has classes; else an id is a class number plus one. Crowds do not count.

    Raises:
        BadInput: if there is no or more than one annotation file, or naming the first bad file or entry.
    """
    subject = f"data coco:{folder}"
    file = _coco_file(folder, subject)
    base = folder.parent if folder.suffix == ".json" else folder
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        entries = sorted(table["images"], key=lambda image: str(image["file_name"]))
        sizes = {image["id"]: (float(image["width"]), float(image["height"])) for image in entries}
        kinds = {int(category["id"]): str(category.get("name", category["id"])) for category in table["categories"]}
        ids = sorted(kinds)
        notes = [
            (note["image_id"], [float(x) for x in note["bbox"]], int(note["category_id"]), bool(note.get("iscrowd", 0)))
            for note in table["annotations"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise BadInput(str(file), expected="COCO's json: images, categories and annotations with bbox", got=got,
                       fix="Correct it, or download it again.") from error  # fmt: skip
    split = file.stem.removeprefix("instances_")
    places = [base / split, base / "images", base, file.parent]
    names = [str(image["file_name"]) for image in entries]
    paths = [next((path / n for path in places if (path / n).is_file()), places[0] / n) for n in names]
    require_files(paths, subject)
    if not with_labels:
        return listed_set([(path, None) for path in paths], part, shape, base, None, subject)
    numbers = _numbered(ids, classes, subject)
    grouped: dict[Any, list[tuple[list[float], int, bool]]] = {image["id"]: [] for image in entries}
    for image_id, box, category, crowd in notes:
        if image_id not in grouped or category not in numbers or len(box) != 4:
            raise BadInput(str(file), expected="annotations of its images and categories",
                           got=f"image_id {image_id}, category_id {category}, bbox {box}",
                           fix="Correct the entry.")  # fmt: skip
        grouped[image_id].append((box, numbers[category], crowd))
    truths = [_coco_boxes(grouped[image["id"]], sizes[image["id"]]) for image in entries]
    found = listed_set([(path, file) for path in paths[:1]] + [(path, None) for path in paths[1:]], part, shape,
                       base, truths.__getitem__, subject)  # fmt: skip
    by_number = {number: kinds[key] for key, number in numbers.items()}
    return replace(found, names=tuple(by_number.get(number, f"class {number}") for number in range(classes)))


def _coco_file(folder: Path, subject: str) -> Path:
    if folder.suffix == ".json" and folder.is_file():
        return folder
    files = sorted(folder.glob("annotations/instances_*.json")) if folder.is_dir() else []
    wanted = [path for path in files if path.stem == "instances_val2017"] or files
    if len(wanted) != 1:
        raise BadInput(subject, expected="annotations/instances_val2017.json, or one other instances_*.json",
                       got=", ".join(path.name for path in files) or "none",
                       fix="Name the .json file itself: coco:DIR/annotations/FILE.json.")  # fmt: skip
    return wanted[0]


def _numbered(ids: list[int], classes: int, subject: str) -> dict[int, int]:
    """Class number of each category id."""
    if len(ids) == classes:
        return {key: number for number, key in enumerate(ids)}
    if ids and ids[0] >= 1 and ids[-1] <= classes:
        return {key: key - 1 for key in ids}
    raise BadInput(subject, expected=f"{classes} categories, as the network has classes", got=f"{len(ids)}",
                   fix="Use a network for this set.")  # fmt: skip


def _coco_boxes(rows: list[tuple[list[float], int, bool]], size: tuple[float, float]) -> Boxes:
    table = torch.tensor([box for box, _, _ in rows]).reshape(-1, 4)
    corners = torch.cat([table[:, :2], table[:, :2] + table[:, 2:]], 1) / torch.tensor([*size, *size])
    return make_boxes(corners, torch.tensor([n for _, n, _ in rows], dtype=torch.int64), [c for _, _, c in rows])


def make_boxes(corners: Tensor, classes: Tensor, crowd: list[bool] | None = None) -> Boxes:
    """Labels of one image.

    Args:
        corners: [n, 4] in units of the image's sides.
        classes: int64 [n].
        crowd: which of them do not count; None for none.
    """
    marked = torch.tensor([False] * len(classes) if crowd is None else crowd, dtype=torch.bool)
    return Boxes(corners.float(), classes, marked, torch.ones(len(classes)))
