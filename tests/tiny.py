"""A user's own tiny network on disk, and the command line in-process: what the tests of the command need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zsq.cli import main
from zsq.teachers import Teacher, make_teacher
from zsq.teachers.facts import Facts

# What a user would write. 1x8x8 images and ten classes, so that the digits can be scored.
SOURCE = """
import torch
from torch import nn

ZSQ = {"image": (1, 8, 8), "mean": 0.305, "std": 0.376}


def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )


def without_norms():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.body(x)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branching()

    def forward(self, x):
        return self.inner(x)


def six_classes():
    return nn.Sequential(*list(net())[:-1], nn.Linear(8, 6))
"""
SHORT = ("--recipe", "ait", "--steps", "3", "--warmup", "3", "--batch", "8")


class Folder(NamedTuple):
    """A folder with the user's file and weights for each callable in it."""

    path: Path

    def teacher(self, name: str = "net") -> list[str]:
        """The arguments of the command line that name a network of the file."""
        return [f"{self.path / 'mine.py'}:{name}", "--weights", str(self.path / f"{name}.safetensors")]


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


def write_folder(path: Path) -> Folder:
    """Write the user's file, and weights with BatchNorm statistics of some input."""
    (path / "mine.py").write_text(SOURCE)
    scope: dict[str, Callable[[], nn.Module]] = {"__name__": "mine"}
    exec(SOURCE, scope)
    for name in ("net", "without_norms", "Branching", "Holder", "six_classes"):
        torch.manual_seed(0)
        save_file(settled(scope[name]()).state_dict(), path / f"{name}.safetensors")
    return Folder(path)


def settled(net: nn.Module, image: tuple[int, int, int] = (1, 8, 8)) -> nn.Module:
    """Give the BatchNorms scales and the statistics of some input, the classifier decided opinions; then freeze."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=rng)
                module.bias.uniform_(-0.5, 0.5, generator=rng)
            elif isinstance(module, nn.Linear):
                module.weight.mul_(20)
        net.train()(torch.randn(64, *image, generator=torch.Generator().manual_seed(1)))
    return net.eval().requires_grad_(False)


def tiny_teacher(size: int = 8) -> Teacher:
    """The same network as a teacher in memory."""
    torch.manual_seed(0)
    scope: dict[str, Callable[[], nn.Module]] = {"__name__": "mine"}
    exec(SOURCE, scope)
    facts = Facts(image=(1, size, size), mean=(0.305,), std=(0.376,))
    return make_teacher(settled(scope["net"](), (1, size, size)), facts, name="tiny")


def call(capture: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """Run the command line in this process."""
    capture.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Said(code, *capture.readouterr())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes, and every folder in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
