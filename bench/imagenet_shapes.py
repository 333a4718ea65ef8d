"""ResNet-18, ResNet-50 and MobileNetV2 at 224 pixels with random weights, for measurements in which shapes count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsq.teachers import Teacher, make_teacher
from zsq.teachers.facts import Facts

# Parameters of the published networks: whoever changes a shape below is told.
PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenet_v2": 3_504_872}
INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def teacher(name: str) -> Teacher:
    """A network of this shape as a teacher of 1,000 classes.

    Args:
        name: resnet18, resnet50 or mobilenet_v2.
    """
    torch.manual_seed(0)
    net = mobilenet() if name == "mobilenet_v2" else resnet((2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3))
    count = sum(p.numel() for p in net.parameters())
    if count != PARAMETERS[name]:
        raise AssertionError(f"{name}: expected {PARAMETERS[name]:,} parameters, got {count:,}")
    return make_teacher(net, Facts(image=(3, 224, 224), classes=1000), name=f"mine:{name}")


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """Stages of basic blocks, or of bottlenecks if there are more than 8 blocks."""
    deep = sum(blocks) > 8
    width, layers = 64, [*_unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        inner = 64 * 2**stage
        for i in range(count):
            stride = 2 if stage and not i else 1
            middle = (inner, 3, stride)
            shapes = [(inner, 1, 1), middle, (4 * inner, 1, 1)] if deep else [middle, (inner, 3, 1)]
            layers.append(_Residual(width, shapes))
            width = shapes[-1][0]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def mobilenet() -> nn.Module:
    """Inverted residuals with ReLU6."""
    width, layers = 32, [*_unit(3, 32, 3, 2, act=nn.ReLU6)]
    for expand, out, count, first in INVERTED:
        for i in range(count):
            layers.append(_Inverted(width, out, first if i == 0 else 1, expand))
            width = out
    head = _unit(width, 1280, 1, 1, act=nn.ReLU6)
    return nn.Sequential(*layers, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000))


class _Residual(nn.Module):
    """Convolutions (channels, kernel, stride) beside a shortcut."""

    def __init__(self, width: int, shapes: list[tuple[int, int, int]]) -> None:
        super().__init__()
        widths, stride = [width, *(out for out, _, _ in shapes)], max(stride for _, _, stride in shapes)
        units = [_unit(i, o, k, s) for i, (o, k, s) in zip(widths, shapes, strict=False)]
        self.body = nn.Sequential(*[layer for unit in units for layer in unit][:-1])
        self.shortcut = None
        if stride > 1 or width != widths[-1]:
            self.shortcut = nn.Sequential(*_unit(width, widths[-1], 1, stride)[:-1])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


class _Inverted(nn.Module):
    """Expand, depthwise, project."""

    def __init__(self, width: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = width * expand
        first = _unit(width, wide, 1, 1, act=nn.ReLU6) if expand > 1 else []
        last = _unit(wide, out, 1, 1)[:-1]
        self.body = nn.Sequential(*first, *_unit(wide, wide, 3, stride, groups=wide, act=nn.ReLU6), *last)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _unit(
    width: int, out: int, kernel: int, stride: int, *, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> list[nn.Module]:
    conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), act(inplace=True)]
