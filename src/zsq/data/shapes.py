"""Drawn scenes with a class per pixel and a box per object, so that every task runs without a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsq.data.files import Found, Shape
from zsq.errors import BadInput
from zsq.tasks.base import Boxes

SIDE = 64  # height and width of a scene
SHAPES = ("disc", "square", "triangle", "cross")
HELD_OUT, TRAIN = 400, 4000  # scenes; a seed and a number make a scene, so that no scene is in both parts


class Scenes(NamedTuple):
    """Scenes and what they show.

    Attributes:
        images: uint8 [n, 64, 64, 3], RGB.
        masks: int64 [n, 64, 64]: 0 for background, k + 1 for the k-th of `SHAPES`.
        boxes: the objects of each scene; the k-th of `SHAPES` is class k.
    """

    images: Tensor
    masks: Tensor
    boxes: list[Boxes]


def draw_scenes(count: int, *, seed: int, start: int = 0) -> Scenes:
    """Draw scenes: one to four shapes of any colour, size and angle on a shaded, noisy ground.

    Colours say nothing about classes. Shapes do not hide each other.

    Args:
        count: number of scenes.
        seed: of the whole sequence.
        start: number of the first scene; scene i of a seed is the same whatever the others are.

    Returns:
        The scenes.

    Example:
        >>> scenes = draw_scenes(2, seed=1)
        >>> scenes.images.shape, int(scenes.masks.max()) <= 4
        (torch.Size([2, 64, 64, 3]), True)
    """
    drawn = [_scene(np.random.Generator(np.random.PCG64([seed, number]))) for number in range(start, start + count)]
    images, masks, boxes = zip(*drawn, strict=True)
    return Scenes(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), list(boxes))


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Boxes]:
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    slope = rng.uniform(-1, 1, 2)
    shade = (slope[0] * (x / SIDE - 0.5) + slope[1] * (y / SIDE - 0.5))[..., None]
    ground = rng.uniform(40, 215, 3)
    image = ground + 60 * shade + rng.normal(0, rng.uniform(2, 10), (SIDE, SIDE, 3))
    mask = np.zeros((SIDE, SIDE), dtype=np.int64)
    corners, classes = [], []
    for _ in range(rng.integers(1, 5)):
        for _ in range(10):  # tries to find a free place
            radius = rng.uniform(6, 13)
            kind, angle = int(rng.integers(len(SHAPES))), rng.uniform(0, 2 * np.pi)
            cx, cy = rng.uniform(radius, SIDE - radius, 2)
            inside = _inside(SHAPES[kind], x - cx, y - cy, radius, angle)
            room = (x - cx) ** 2 + (y - cy) ** 2 <= (radius + 2) ** 2
            if mask[room].any():
                continue
            mask[inside] = kind + 1
            colour = rng.uniform(0, 255, 3)
            while np.abs(colour - ground).max() < 60:
                colour = rng.uniform(0, 255, 3)
            texture = rng.normal(0, rng.uniform(0, 12), (SIDE, SIDE, 3))
            image = np.where(inside[..., None], colour + texture, image)
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            corners.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            classes.append(kind)
            break
    found = torch.tensor(np.array(corners)).float() / SIDE
    marked = torch.zeros(len(classes), dtype=torch.bool)
    boxes = Boxes(found.reshape(-1, 4), torch.tensor(classes), marked, torch.ones(len(classes)))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask, boxes


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Pixels of a shape around the origin, within a circle of the given radius."""
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if shape == "disc":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.71 * radius
    if shape == "triangle":
        return (v >= -radius / 2) & (v + np.sqrt(3) * np.abs(u) <= radius)
    arm = 0.32 * radius
    return ((np.abs(u) <= arm) & (np.abs(v) <= 0.95 * radius)) | ((np.abs(v) <= arm) & (np.abs(u) <= 0.95 * radius))


@lru_cache(maxsize=2)
def _part(name: str) -> tuple[Scenes, str]:
    scenes = draw_scenes(TRAIN, seed=0) if name == "train" else draw_scenes(HELD_OUT, seed=1)
    digest = hashlib.sha256(scenes.images.numpy().tobytes() + scenes.masks.numpy().tobytes())
    for boxes in scenes.boxes:
        digest.update(boxes.corners.numpy().tobytes() + boxes.classes.numpy().tobytes())
    return scenes, digest.hexdigest()


def read_shapes(part: str, shape: Shape, *, masks: bool, with_labels: bool) -> Found:
    """``shapes-segment`` or ``shapes-detect``: 400 held-out scenes; with ``:train`` the 4,000 for training.

    Raises:
        BadInput: for another part, or a network for images of another size.
    """
    name = "shapes-segment" if masks else "shapes-detect"
    if part not in ("", "train"):
        raise BadInput("data", expected=f"{name} or {name}:train", got=f"'{name}:{part}'", fix="Choose one of the two.")
    if shape.image != (3, SIDE, SIDE):
        raise BadInput(f"data {name}", expected=f"a network for images of 3x{SIDE}x{SIDE}",
                       got="x".join(map(str, shape.image)), fix="Use the teacher of that name.")  # fmt: skip
    scenes, digest = _part(part)
    truths: Callable[[int, int], Any] = (lambda a, b: scenes.masks[a:b]) if masks else (lambda a, b: scenes.boxes[a:b])
    return Found(lambda a, b: scenes.images[a:b], len(scenes.images), torch.empty(0, dtype=torch.int64), digest,
                 f"shapes {part}", truths=truths if with_labels else None)  # fmt: skip
