"""Networks whose weights are in the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zsq.teachers import nets
from zsq.teachers.facts import Facts

FOLDER = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Embedded:
    """A network whose weights are in the package.

    Attributes:
        build: makes the network.
        weights: name of its weights file.
        facts: what is known about it.
        about: one line for `zsq list teachers`.
    """

    build: Callable[[], nn.Module]
    weights: str
    facts: Facts
    about: str


EMBEDDED = {
    "digits": Embedded(
        nets.digits_net,
        "digits.safetensors",
        Facts("classify", 10, (1, 8, 8), (0.305,), (0.376,)),
        "small residual network for scikit-learn's 8x8 digits; top-1 99.50 % on the 599 held out",
    ),
    "resnet20-cifar10": Embedded(
        lambda: nets.resnet20(10),
        "resnet20_cifar10.safetensors",
        Facts("classify", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "ResNet-20 with projection shortcuts, CIFAR-10; top-1 90.92 % on cifar10_test.npz[2000:]",
    ),
    "resnet20-cifar100": Embedded(
        lambda: nets.resnet20(100),
        "resnet20_cifar100.safetensors",
        Facts("classify", 100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "ResNet-20 with projection shortcuts, CIFAR-100; top-1 64.33 % on cifar100_test.npz[2000:]",
    ),
    "shapes-segment": Embedded(
        nets.ShapesSegmenter,
        "shapes_segment.safetensors",
        Facts("segment", 5, (3, 64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        "small segmenter of drawn scenes, background and four shapes; mIoU 92.25 % on the 400 held out",
    ),
    "shapes-detect": Embedded(
        nets.ShapesDetector,
        "shapes_detect.safetensors",
        Facts("detect", 4, (3, 64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), decode=nets.grid_boxes),
        "small detector of drawn scenes, four shapes; mAP@.5 96.17 % on the 400 held out",
    ),
}
