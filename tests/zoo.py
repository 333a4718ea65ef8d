"""Small networks with every habit a quantizer stumbles over: what it must find in each of them is counted here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE = (3, 8, 8)


class FunctionalReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).clamp(min=0).mean((2, 3)))


class SharedReLU(nn.Module):
    """One in-place ReLU module, called three times, once without using its result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        y = self.conv2(x)
        self.relu(y)
        return self.fc(self.relu(self.conv3(y)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """MobileNet habits: ReLU6, Hardswish, SiLU, depthwise and grouped convolutions, a squeeze-and-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        return self.head(F.adaptive_avg_pool2d(self.project(x * self.squeeze(x)), 1)).flatten(1)


class Adds(nn.Module):
    """Residual additions in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        out = self.norms[0](self.convs[0](x))
        out += x
        x = F.relu_(out)
        x = F.relu(torch.add(self.norms[1](self.convs[1](x)), x))
        x = self.norms[2](self.convs[2](x)) + x
        return x.relu().mean(dim=[2, 3])


class Concat(nn.Module):
    """PReLU and BatchNorm behind a concatenation, two branches, bilinear resize to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)
        self.bn, self.act, self.head = nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = F.max_pool2d(x, 2)
        y = self.act(self.bn(torch.cat([self.a(small), self.b(small)], 1)))
        return F.interpolate(self.head(y), x.shape[2:], mode="bilinear", align_corners=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(x.size(0), -1))


class TwiceShared(nn.Module):
    """A block called twice, and two modules with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(F.relu(self.stem(x))))
        return F.relu(self.left(x)) + self.right(x)


class DictOutput(nn.Module):
    """Two inputs, outputs in a dictionary with a tuple, an optional argument, and a part the forward never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.extra = nn.Conv2d(3, 4, 3), nn.Linear(6, 4)
        self.head, self.auxiliary = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9))

    def forward(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> dict[str, object]:
        x = F.relu(self.image(x)).mean((2, 3)) * torch.sigmoid(self.extra(y))
        if labels is not None:
            x = x * labels
        return {"logits": self.head(x), "features": (x, x.shape[1])}


class Split(nn.Module):
    """Channel split, shuffle, dropout, pad, nearest resize: operations that keep values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1))
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ELU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.interpolate(self.stem(x), scale_factor=2), 0.5, self.training)
        x = torch.cat((x[:, 0::2], self.branch(F.pad(x[:, 1::2], (1, 1, 1, 1)))), 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.fc(x.flatten(2).amax(2))


class DenseNet(nn.Module):
    """Pre-activation: BatchNorm and ReLU before every convolution, concatenation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1, bias=False) for i in range(2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)), inplace=True)))
        x = F.relu(self.norms[2](torch.cat(features, 1)))
        return self.fc(torch.flatten(F.avg_pool2d(x, 8), 1))


class StandardisedConv(nn.Conv2d):
    """A convolution that standardises its weight first."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class SameConv(nn.Conv2d):
    """A convolution that pads for itself, with control flow no trace follows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.stride[0] == 0:
            x = F.pad(x, (1, 1, 1, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class OwnForward(nn.Module):
    """Layers with forwards of their own, a weight-normalised one, a transposed one, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = StandardisedConv(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn_b = SameConv(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.c = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.up, self.bn_up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)
        self.kernel, self.kernel_bias = nn.Parameter(torch.randn(6, 6, 1, 1)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_b(self.b(F.relu(self.bn_a(self.a(x))))))
        x = F.relu(self.bn_up(self.up(F.relu(self.c(x)))))
        return F.relu(F.conv2d(x, self.kernel, bias=self.kernel_bias)).sum((2, 3))


class HandWritten(nn.Module):
    """Activations composed of other operations, and gates that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 4, 1) for i in (3, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        x = self.convs[1](x * torch.sigmoid(x))
        x = self.convs[2](x * F.relu6(x + 3.0) / 6.0)
        x = self.convs[3](x * torch.tanh(F.softplus(x)))
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class NormAct(nn.BatchNorm2d):
    """BatchNorm, dropout and ReLU in one module with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected images")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(F.dropout(x, 0.0, self.training), inplace=True)


class Fused(nn.Module):
    """Functional BatchNorm, an identity in between, and a recurrent part that returns a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 1), NormAct(6)
        self.conv2, self.id, self.norm2 = nn.Conv2d(6, 4, 1, bias=False), nn.Identity(), NormAct(4)
        self.lstm, self.fc = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.id(self.conv2(self.norm1(self.conv1(x)))))
        y, (h, _) = self.lstm(x.flatten(2).transpose(1, 2))
        return self.fc(F.relu(y[:, -1] + h[-1]))


class ResNet20(nn.Module):
    """CIFAR ResNet-20 with projection shortcuts, ReLU modules."""

    class Unit(nn.Module):
        def __init__(self, i: int, o: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
                nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o),
            )  # fmt: skip
            self.identity = (
                nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else nn.Identity()
            )
            self.activ = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.activ(self.body(x) + self.identity(x))

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.init = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        widths = [16, 16, 16, 32, 32, 32, 64, 64, 64]
        steps = zip([16, *widths], widths, strict=False)
        self.units = nn.Sequential(*(self.Unit(i, o, 1 + (i != o)) for i, o in steps))
        self.pool, self.output = nn.AvgPool2d(2), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.units(self.init(x)))
        return self.output(x.view(x.size(0), -1))


class Case(NamedTuple):
    """A network, its input sizes without batch, and what `quantize` must find: weights, sites per placement."""

    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    weights: int
    paper: int
    deploy: int


CASES = {
    # deploy: input, relu, relu, clamp, mean, logits
    "functional relu": Case(FunctionalReLU, (IMAGE,), 3, 3, 6),
    # deploy: input, 3 relu, mean, logits
    "shared relu": Case(SharedReLU, (IMAGE,), 4, 3, 6),
    # deploy: input, relu6, depthwise, hardswish, pool, conv, silu, conv, hardsigmoid, mul, project, pool, head
    "inverted residual": Case(InvertedResidual, (IMAGE,), 6, 3, 13),
    # deploy: input, relu, 3 x (conv, relu behind the add), mean
    "adds": Case(Adds, (IMAGE,), 4, 4, 9),
    # deploy: input, 2 convs, cat, bn, prelu, head, resize
    "concat": Case(Concat, (IMAGE,), 3, 1, 6),
    # deploy: input, relu, linear, gelu, logits
    "mlp": Case(Mlp, ((3, 2, 2),), 3, 2, 5),
    # deploy: input, stem, 2 x block, left, right, add
    "shared modules": Case(TwiceShared, (IMAGE,), 4, 4, 7),
    # deploy: 2 inputs, relu, mean, linear, sigmoid, mul, logits
    "dict output": Case(DictOutput, (IMAGE, (6,)), 3, 1, 8),
    # deploy: input, stem, leaky, branch, elu, cat, logits
    "channel split": Case(Split, (IMAGE,), 3, 2, 7),
    # deploy: input, stem, 3 x (cat, relu behind the bn), 2 convs, pool, logits
    "dense": Case(DenseNet, (IMAGE,), 4, 3, 9),
    # deploy: input, 5 x relu, sum
    "own forward": Case(OwnForward, (IMAGE,), 5, 5, 7),
    # deploy: input; conv, sigmoid, mul; conv, relu6, mul, div; conv, softplus, tanh, mul; conv, mean, sigmoid, mul
    "hand-written": Case(HandWritten, (IMAGE,), 4, 3, 16),
    # deploy: input, 2 relu, both results of the LSTM, relu, logits
    "fused": Case(Fused, (IMAGE,), 3, 3, 7),
    # deploy: input, stem, 9 x (relu, conv, relu behind the add), 2 shortcuts, pool, logits
    "resnet20": Case(ResNet20, (IMAGE,), 22, 19, 33),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Make a network of the zoo with settled BatchNorm statistics, and a batch of inputs."""
    case = CASES[name]
    torch.manual_seed(0)
    net = case.make()
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
            with torch.no_grad():
                module.weight[0] = -module.weight[0]  # folding must survive a negative factor
    inputs = tuple(torch.randn(16, *size, generator=generator) for size in case.inputs)
    with torch.no_grad():
        for _ in range(3):
            net.train()(*inputs)
    return net.eval(), inputs


def tensors(value: object) -> list[Tensor]:
    """All tensors in a nested result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []
