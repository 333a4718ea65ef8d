"""The shapes of network that must export: untrained, with settled BatchNorm statistics, for small images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.insert import QuantSpec, freeze_ranges, quantize
from zsq.teachers import Teacher, nets


def conv(
    i: int, o: int, kernel: int = 3, stride: int = 1, *, groups: int = 1, act: nn.Module | None = None
) -> nn.Module:
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([] if act is None else [act]))


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(i, o, 3, stride, act=nn.ReLU(inplace=True)), conv(o, o)
        self.downsample = conv(i, o, 1, stride) if stride != 1 or i != o else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """7x7 stem, max pool, four stages of two basic blocks."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, width, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(BasicBlock(i, o, 2 if i != o else 1) for i, o in pairs))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.blocks(self.pool(self.stem(x)))), 1))


class Inverted(nn.Module):
    """Expand, depthwise, project; with squeeze-and-excite if asked for; residual where the shapes allow."""

    def __init__(self, i: int, o: int, stride: int, act: type[nn.Module], *, gate: bool, factor: int = 4) -> None:
        super().__init__()
        wide, few = factor * i, max(8, i)
        self.expand = conv(i, wide, 1, act=act()) if factor > 1 else nn.Sequential()
        self.depthwise = conv(wide, wide, 3, stride, groups=wide, act=act())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, few, 1), nn.ReLU(), nn.Conv2d(few, wide, 1), nn.Hardsigmoid()
        ) if gate else None  # fmt: skip
        self.project = conv(wide, o, 1)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y if self.gate is None else y * self.gate(y))
        return x + y if self.residual else y


# Rows: output channels, blocks, stride of the first, how many times wider the depthwise layer is.
Rows = list[tuple[int, int, int, int]]
SMALL: Rows = [(8, 1, 1, 4), (12, 2, 2, 4), (16, 2, 2, 4)]
MOBILENET_V2: Rows = [
    (16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6),
]  # fmt: skip
GATED: Rows = [(16, 1, 2, 1), (24, 2, 2, 4), (40, 3, 2, 4), (48, 2, 1, 4), (96, 3, 2, 6)]


class Mobile(nn.Module):
    """MobileNetV2 with ReLU6, or a squeeze-and-excite network with Hardswish."""

    def __init__(
        self, act: type[nn.Module], *, gate: bool, rows: Rows = SMALL, stem: int = 8, head: int = 32, classes: int = 10
    ) -> None:
        super().__init__()
        blocks, i = [], stem
        for o, count, stride, factor in rows:
            for k in range(count):
                blocks.append(Inverted(i, o, stride if k == 0 else 1, act, gate=gate, factor=factor))
                i = o
        self.stem, self.head = conv(3, stem, 3, 2, act=act()), conv(i, head, 1, act=act())
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean([2, 3]))


class Segmenter(nn.Module):
    """Two scales, PReLU, LeakyReLU, average pooling, concatenation, bilinear and nearest resize; a class per pixel."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 3, 2, act=nn.PReLU(8)), conv(8, 12, 3, 2, act=nn.LeakyReLU(0.1))
        self.wide = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.mix, self.head = conv(12 + 12 + 12 + 8, 16, 1, act=nn.ReLU()), nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        context = F.interpolate(F.avg_pool2d(b, 3, 2, 1), size=b.shape[2:], mode="nearest")
        y = torch.cat([b, torch.sigmoid(self.wide(b)), context, F.max_pool2d(a, 2)], 1)
        y = self.head(self.mix(y))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class Moves(nn.Module):
    """Everything that moves values or is rarely used, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding="same"), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.grouped, self.tokens = nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.Linear(8, 6)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(6 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.stem(x))
        left, right = x.chunk(2, 1)
        x = torch.cat([right.transpose(2, 3).transpose(3, 2), F.silu(left)], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        x = F.hardtanh(self.up(F.pad(x, (1, 1, 0, 0))), -2.0, 2.0)
        x = F.gelu(self.norm(x)) - x * 0.5
        x = torch.tanh(self.grouped(x))[:, :, 1:5, ::2]
        x = self.tokens(x.flatten(2).transpose(1, 2)[:, :8]).clamp(max=3.0)
        return self.fc(x.reshape(b, -1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet20": (lambda: nets.resnet20(10), (3, 16, 16)),
    "resnet18": (lambda: ResNet18(8), (3, 48, 48)),
    "mobilenet": (lambda: Mobile(nn.ReLU6, gate=False), (3, 24, 24)),
    "gated": (lambda: Mobile(nn.Hardswish, gate=True), (3, 24, 24)),
    "segmenter": (Segmenter, (3, 20, 28)),
    "moves": (Moves, (3, 10, 12)),
}


def teacher_of(name: str) -> tuple[Teacher, Tensor]:
    """An untrained teacher and images for it."""
    make, image = NETS[name]
    return settled(name, make, image)


def settled(
    name: str, make: Callable[[], nn.Module], image: tuple[int, int, int], *, count: int = 48, passes: int = 20
) -> tuple[Teacher, Tensor]:
    """An untrained teacher whose BatchNorms have the statistics of noise, and that noise."""
    torch.manual_seed(0)
    net, images = make(), torch.randn(count, *image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(passes):
            net.train()(images)
        classes = net.eval()(images[:2]).shape[1]
    net.requires_grad_(False)
    return Teacher(net, name, "classify", classes, image, (0.5,) * 3, (0.25,) * 3), images


def student_of(teacher: Teacher, images: Tensor, spec: QuantSpec) -> nn.Module:
    """A student with calibrated, fixed ranges."""
    student, _ = quantize(teacher.net, spec)
    with torch.no_grad():
        for part in images.split(16):
            student(part)
    freeze_ranges(student)
    return student.requires_grad_(False)
