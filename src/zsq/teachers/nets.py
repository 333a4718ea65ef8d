"""Architectures of the embedded teachers. Module names give the state-dict keys, and those are a file format."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_block(c_in: int, c_out: int, kernel: int, stride: int, *, activate: bool) -> nn.Sequential:
    """Convolution without bias, BatchNorm and, if asked for, ReLU.

    Args:
        c_in: input channels.
        c_out: output channels.
        kernel: odd kernel size; padding keeps the size at stride 1.
        stride: stride of the convolution.
        activate: whether a ReLU follows.

    Returns:
        A sequence with modules ``conv``, ``bn`` and ``activ``.
    """
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False))
    block.add_module("bn", nn.BatchNorm2d(c_out))
    if activate:
        block.add_module("activ", nn.ReLU())
    return block


class ResidualUnit(nn.Module):
    """relu(body(x) + shortcut(x)): two 3x3 convolutions beside the input itself, or beside a 1x1 projection of it.

    Args:
        c_in: input channels.
        c_out: output channels.
        stride: of the first convolution and of the projection.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        first = conv_block(c_in, c_out, 3, stride, activate=True)
        self.body = nn.Sequential(OrderedDict(conv1=first, conv2=conv_block(c_out, c_out, 3, 1, activate=False)))
        # The attribute exists only where there are weights: the key names of the weights files follow it.
        self.projects = stride != 1 or c_in != c_out
        if self.projects:
            self.identity_conv = conv_block(c_in, c_out, 1, stride, activate=False)
        self.activ = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.identity_conv(x) if self.projects else x
        return self.activ(self.body(x) + shortcut)


class ResidualNet(nn.Module):
    """Residual BatchNorm network for small images; keys as in pytorchcv's CIFAR ResNets.

    A 3x3 stem, stages of residual units (the first unit of each later stage halves the size), global average pooling, a
    linear classifier.

    Args:
        channels: output channels of each stage; the stem has as many as the first.
        units: residual units per stage.
        classes: number of classes.
        c_in: channels of the image.

    Example:
        >>> ResidualNet((8, 16), units=1, classes=10, c_in=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: Sequence[int], *, units: int, classes: int, c_in: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("init_block", conv_block(c_in, channels[0], 3, 1, activate=True))
        width = channels[0]
        for number, c_out in enumerate(channels, 1):
            stage = nn.Sequential()
            for unit in range(1, units + 1):
                stride = 2 if number > 1 and unit == 1 else 1
                stage.add_module(f"unit{unit}", ResidualUnit(width, c_out, stride))
                width = c_out
            self.features.add_module(f"stage{number}", stage)
        self.features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x).flatten(1))


def resnet20(classes: int) -> ResidualNet:
    """CIFAR ResNet-20 with 1x1 projection shortcuts: [b, 3, 32, 32] to [b, classes], 272,474 parameters for 10 classes.

    Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section 4.2, shortcuts as in option B.
    """
    return ResidualNet((16, 32, 64), units=3, classes=classes)


def digits_net() -> ResidualNet:
    """The demo's network: [b, 1, 8, 8] to [b, 10], about 57,000 parameters."""
    return ResidualNet((16, 32, 48), units=1, classes=10, c_in=1)


class ShapesTrunk(nn.Module):
    """Features of a 64x64 image at strides 2, 4 and 8, with 16, 24 and 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 16, 3, 2, activate=True)
        self.stage1 = ResidualUnit(16, 24, 2)
        self.stage2 = ResidualUnit(24, 32, 2)
        self.context = ResidualUnit(32, 32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.stem(x)
        middle = self.stage1(fine)
        return fine, middle, self.context(self.stage2(middle))


class ShapesSegmenter(nn.Module):
    """[b, 3, h, w] to logits [b, 5, h, w], bilinearly up-sampled from half the size; about 63,000 parameters."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.trunk = ShapesTrunk()
        self.merge1 = conv_block(32 + 24, 24, 3, 1, activate=True)
        self.merge2 = conv_block(24 + 16, 16, 3, 1, activate=True)
        self.classifier = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, middle, coarse = self.trunk(x)
        y = self.merge1(torch.cat((F.interpolate(coarse, scale_factor=2.0), middle), 1))
        y = self.merge2(torch.cat((F.interpolate(y, scale_factor=2.0), fine), 1))
        return F.interpolate(self.classifier(y), x.shape[2:], mode="bilinear", align_corners=False)


class ShapesDetector(nn.Module):
    """[b, 3, h, w] to [b, 1 + 4 + classes, h/8, w/8]; about 54,000 parameters.

    Channels per cell: probability of an object's centre, four box terms (`grid_boxes`), class probabilities.
    """

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.trunk = ShapesTrunk()
        self.head = conv_block(32, 32, 3, 1, activate=True)
        self.objectness = nn.Conv2d(32, 1, 1)
        self.box = nn.Conv2d(32, 4, 1)
        self.classifier = nn.Conv2d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.trunk(x)[2])
        return torch.cat((self.objectness(y).sigmoid(), self.box(y), self.classifier(y).softmax(1)), 1)


def grid_boxes(out: Tensor) -> Tensor:
    """Boxes of a `ShapesDetector`.

    Args:
        out: [b, 1 + 4 + k, h, w]: objectness, then x, y, width and height before sigmoids (a place within the cell; a
            share of the image), then class probabilities.

    Returns:
        Shape [b, h * w, 6]: x1, y1, x2, y2 in units of the image's sides, score, class.
    """
    b, _, h, w = out.shape
    y, x = torch.meshgrid(torch.arange(h, device=out.device), torch.arange(w, device=out.device), indexing="ij")
    box = out[:, 1:5].sigmoid()
    centre = torch.stack(((box[:, 0] + x) / w, (box[:, 1] + y) / h), -1)
    half = torch.stack((box[:, 2], box[:, 3]), -1) / 2
    sure, kind = out[:, 5:].max(1)
    rows = torch.cat((centre - half, centre + half, (out[:, 0] * sure)[..., None], kind[..., None].to(out.dtype)), -1)
    return rows.reshape(b, h * w, 6)
