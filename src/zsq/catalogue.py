"""What `zsq list` shows. Reads files as text; imports neither torch nor any recipe."""

from __future__ import annotations

import ast
from pathlib import Path

from zsq import recipes as folder


def recipes() -> list[dict[str, str]]:
    """One row per recipe: name, paper, parts, and the first sentence of its file."""
    rows = []
    for name in folder.names():
        tree = ast.parse((Path(folder.__file__ or "").parent / f"{name}.py").read_text(encoding="utf-8"))
        facts = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in {"PAPER", "PARTS"}
        }  # fmt: skip
        what = (ast.get_docstring(tree) or "").partition("\n")[0]
        rows.append({"recipe": name, "what it does": what.partition(": ")[2].partition(" (")[0],
                     "parts": facts.get("PARTS", ""), "paper": facts.get("PAPER", "")})  # fmt: skip
    return rows


def teachers() -> list[dict[str, str]]:
    """One row per teacher that needs nothing else, and one per way to bring another."""
    from zsq.teachers import teacher_names

    return [{"teacher": name, "what it is": what} for name, what in teacher_names().items()]


def data() -> list[dict[str, str]]:
    """One row per form of the DATA argument."""
    return [
        {"data": "digits", "what it is": "held-out part of scikit-learn's digits"},
        {"data": "shapes-segment, shapes-detect", "what it is": "400 drawn scenes with masks, with boxes"},
        {"data": "npz:FILE, npz:FILE[a:b]", "what it is": "images uint8 [n, h, w, c], labels int64 [n]; a slice of it"},
        {"data": "cifar10:DIR, cifar100:DIR", "what it is": "CIFAR test set, binary version (*.bin)"},
        {"data": "imagefolder:DIR", "what it is": "class folders, or flat images with labels.csv (file,label)"},
        {"data": "camvid:DIR, camvid:DIR/val", "what it is": "masks: the test split (test, testannot), or another one"},
        {"data": "voc:DIR", "what it is": "a VOCdevkit/VOC20xx folder: masks for a segmenter, boxes for a detector"},
        {"data": "coco:DIR", "what it is": "boxes: annotations/instances_val2017.json, images in val2017"},
        {"data": "yolo:DIR", "what it is": "boxes: images/*.jpg, labels/*.txt (class cx cy w h)"},
    ]
