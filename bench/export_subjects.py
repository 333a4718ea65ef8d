"""Students whose exported files are measured: trained runs, calibrated real networks, untrained shapes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the untrained shapes are those of the tests

import zoo_export  # noqa: E402
from zsq.bench import read_matrix, run_cell  # noqa: E402
from zsq.checkpoint import load_tree  # noqa: E402
from zsq.data import LabelledData, load_data  # noqa: E402
from zsq.finished import open_run  # noqa: E402
from zsq.insert import QuantSpec  # noqa: E402
from zsq.recipes.zeroq import zeroq  # noqa: E402
from zsq.run import Run  # noqa: E402
from zsq.sources.noise import probe_images  # noqa: E402
from zsq.sources.pool import PoolSource  # noqa: E402
from zsq.teachers import Teacher, load_teacher  # noqa: E402

MATRICES = [ROOT / "bench" / f"export_runs{name}.toml" for name in ("", "_segment", "_cgnet")]
SHARED = Path(os.environ.get("ZSQ_SHARED") or ROOT.parent / "shared")
BITS = ((8, 8), (4, 8), (4, 4), (3, 3))


class Subject(NamedTuple):
    """A student at one width, not made yet.

    Attributes:
        network: its teacher, in words.
        students: how it came about: trained, calibrated (ranges only) or untrained (random weights).
        bits: of weights and activations.
        make: makes it.
    """

    network: str
    students: str
    bits: tuple[int, int]
    make: Callable[[], Made]

    @property
    def width(self) -> str:
        """Bits in words."""
        return "W{}A{}".format(*self.bits)


class Made(NamedTuple):
    """A student with what it is compared on.

    Attributes:
        student: calibrated or trained, ranges fixed.
        teacher: its float network.
        images: synthetic ones, as the export sees them.
        data: a labelled set, or None for random weights.
    """

    student: nn.Module
    teacher: Teacher
    images: Tensor
    data: LabelledData | None


def subjects(runs: Path) -> Iterator[Subject]:
    """All of them, in the order of the table.

    Args:
        runs: where the trained runs are, or will be made.
    """
    for cell, shared in ((cell, shared) for cells, shared in map(read_matrix, MATRICES) for cell in cells):
        asked = cell.asked(shared)
        if "../shared/" in asked["eval"] and not SHARED.exists():
            print(f"{cell.teacher}: left out, its files are not in the folder of shared data", file=sys.stderr)
            continue

        def trained(cell: Any = cell, shared: dict[str, Any] = shared, data: str = asked["eval"]) -> Made:
            folder = runs / cell.name
            run_cell(cell, folder, shared, 1)
            teacher, student, _ = open_run(folder)
            images = load_tree(folder / "images.safetensors")["images"]
            return Made(student, teacher, images, load_data(data, teacher))

        kind = "calibrated" if asked.get("steps") == 0 else "trained"
        yield Subject(cell.teacher, kind, (cell.weight_bits, cell.act_bits), trained)
    for name, real in REAL.items():
        if str(SHARED) in real.data and not SHARED.exists():
            print(f"{name}: left out, its files are not in the folder of shared data", file=sys.stderr)
            continue
        for bits in real.bits:

            def calibrated(name: str = name, bits: tuple[int, int] = bits) -> Made:
                teacher, images, labelled = _real(name)
                return Made(student_of(teacher, images, bits), teacher, images, labelled)

            yield Subject(name, "calibrated", bits, calibrated)
    for name in SHAPES:
        for bits in BITS:

            def untrained(name: str = name, bits: tuple[int, int] = bits) -> Made:
                teacher, images = shape(name)
                return Made(student_of(teacher, images, bits), teacher, images, None)

            yield Subject(name, "untrained", bits, untrained)


def student_of(teacher: Teacher, images: Tensor, bits: tuple[int, int]) -> nn.Module:
    """A student in deploy placement whose ranges are those of some images, as recipe `zeroq` takes them."""
    pool = PoolSource(images, None, name="pool", held_out=1)
    batch = min(32, len(images))
    spec = QuantSpec(*bits, placement="deploy")
    return zeroq(teacher, Run(None), spec=spec, images=pool, warmup=10, batch=batch).student


# ---- real networks, calibrated on images made from themselves

_NETS = SHARED / "teachers" / "nets.py"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Real(NamedTuple):
    """A real network: how many images are made from it in how many steps, its facts, what it is scored on, widths."""

    count: int
    steps: int
    facts: dict[str, Any]
    data: str
    bits: tuple[tuple[int, int], ...] = BITS


_DATA = SHARED / "data"
REAL = {
    "shapes-detect": Real(64, 40, {}, "shapes-detect"),
    "imagenet_mobilenetv1_x025": Real(
        64, 40, {"classes": 1000, "image": (3, 224, 224), "mean": _MEAN, "std": _STD, "resize": 256, "crop": 224},
        f"imagefolder:{_DATA / 'imagenet_ccby'}",
    ),
}  # fmt: skip


@cache
def _real(name: str) -> tuple[Teacher, Tensor, LabelledData]:
    real = REAL[name]
    if real.facts:
        weights = SHARED / "teachers" / f"{name}.safetensors"
        teacher = load_teacher(f"{_NETS}:{name}", weights=str(weights), **real.facts)
    else:
        teacher = load_teacher(name)
    return teacher, probe_images(teacher, real.count, steps=real.steps), load_data(real.data, teacher)


# ---- stacks of one layer: what the runtimes' kernels gain at most

STACKS = {
    "3x3, 64 channels, 56x56": (64, 56, 3), "3x3, 128 channels, 28x28": (128, 28, 3),
    "3x3, 256 channels, 14x14": (256, 14, 3), "3x3, 512 channels, 7x7": (512, 7, 3),
    "1x1, 256 channels, 28x28": (256, 28, 1),
}  # fmt: skip


@cache
def stack(name: str) -> tuple[Teacher, Tensor]:
    """Four equal convolutions with ReLU, 8-bit throughout but for the output, and noise."""
    channels, side, kernel = STACKS[name]

    def make() -> nn.Module:
        layers = [zoo_export.conv(channels, channels, kernel, act=nn.ReLU()) for _ in range(4)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    return zoo_export.settled(name, make, (channels, side, side), count=8, passes=4)


def stack_operations(name: str) -> int:
    """Multiplications and additions of the convolutions of a stack, for one image."""
    channels, side, kernel = STACKS[name]
    return 2 * 4 * (channels * kernel * side) ** 2


# ---- shapes with random weights, at the size that networks of this kind are used at

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18 shape": lambda: zoo_export.ResNet18(64, 1000),
    "MobileNetV2 shape": lambda: zoo_export.Mobile(
        nn.ReLU6, gate=False, rows=zoo_export.MOBILENET_V2, stem=32, head=1280, classes=1000
    ),
    "SE and Hardswish": lambda: zoo_export.Mobile(
        nn.Hardswish, gate=True, rows=zoo_export.GATED, stem=16, head=576, classes=1000
    ),
}


@cache
def shape(name: str) -> tuple[Teacher, Tensor]:
    """An untrained network for images of 224 pixels, and 8 images of noise."""
    torch.manual_seed(0)
    return zoo_export.settled(name, SHAPES[name], (3, 224, 224), count=8, passes=6)
