"""GDFQ with AIT, written plainly: eager float32, a Python call per quantizer, the published search; for benchmarks.

What a reader of the papers' formulas would write, and what `bench/speed.py` calls the reference. Nothing of zsq is used
here; `tests/unit/test_speed.py` holds the shipped path to the same losses, gradients and steps.

Left plain on purpose: the generator enlarges its grid before it convolves, statistics are two reductions per layer,
weight codes are computed anew by the forward and by every candidate of the search, and the search reads a number from
the device per candidate. What would be waste in any program is left out: the teacher's parameters ask for no gradient
(the released program's do), nothing is copied to the host for logging, and labels are drawn where they are used.

Sources: GDFQ (arXiv 2003.03603), AIT (arXiv 2203.17008), the quantizer of ZeroQ (arXiv 2001.00281).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

_SMALLEST = 1e-8


def codes(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes of x over [low, high], with the scale and the zero point they were made with."""
    scale = (2**bits - 1) / torch.clamp(high - low, min=_SMALLEST)
    zero = torch.round(scale * low) + 2 ** (bits - 1)
    q = torch.clamp(torch.round(scale * x - zero), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q, scale, zero


class RoundThrough(torch.autograd.Function):
    """Fake quantization whose gradient is the identity, clipped values included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
        q, scale, zero = codes(x, low, high, bits)
        return (q + zero) / scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def channel_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every output channel, shaped to broadcast."""
    rows = weight.detach().flatten(1)
    shape = (-1, *[1] * (weight.dim() - 1))
    return rows.min(dim=1).values.view(shape), rows.max(dim=1).values.view(shape)


class QuantConv(nn.Module):
    """A convolution that rounds its weight at every call."""

    def __init__(self, conv: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.weight, self.bias, self.bits = conv.weight, conv.bias, bits
        self.options = (_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation), conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, RoundThrough.apply(self.weight, *channel_range(self.weight), self.bits), self.bias,
                        *self.options)  # fmt: skip


class QuantLinear(nn.Module):
    """A linear layer that rounds its weight at every call."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, RoundThrough.apply(self.weight, *channel_range(self.weight), self.bits), self.bias)


class QuantReLU(nn.Module):
    """A ReLU whose output is rounded over a range that is averaged while `observing`, and fixed afterwards."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.bits, self.momentum, self.observing, self.power = bits, momentum, True, 1.0
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.observing:
            self.power *= self.momentum
            for end, value in ((self.low, x.detach().min()), (self.high, x.detach().max())):
                # the average of GDFQ, corrected once for its start
                end.copy_(end + (value - end) * (1 - self.momentum) / (1 - self.power))
        return RoundThrough.apply(x, self.low, self.high, self.bits)


def convert(net: nn.Module, bits: int) -> nn.Module:
    """A copy of a float network with every convolution, linear layer and ReLU quantized."""

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Conv2d):
            return QuantConv(module, bits)
        if isinstance(module, nn.Linear):
            return QuantLinear(module, bits)
        if isinstance(module, nn.ReLU):
            return QuantReLU(bits)
        for name, child in list(module.named_children()):
            setattr(module, name, replace(child))
        return module

    return replace(copy.deepcopy(net)).eval().requires_grad_(True)


class Generator(nn.Module):
    """GDFQ's generator for images up to 64 pixels: label embedding times noise, and two enlargements."""

    def __init__(self, classes: int, image: tuple[int, int, int], latent: int = 100) -> None:
        super().__init__()
        channels, self.height, self.width = image[0], image[1] // 4, image[2] // 4
        self.embedding = nn.Embedding(classes, latent)
        self.linear = nn.Linear(latent, 128 * self.height * self.width)
        self.norm0 = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(128, eps=0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(64, eps=0.8)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(self.embedding(labels) * z).view(-1, 128, self.height, self.width)
        x = F.interpolate(self.norm0(x), scale_factor=2)
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        x = F.interpolate(x, scale_factor=2)
        x = F.leaky_relu(self.norm2(self.conv2(x)), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


class SearchedSGD(torch.optim.SGD):
    """Nesterov SGD whose step on each weight is doubled and bisected until enough of its codes change."""

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float, bits: int, rate: float) -> None:
        super().__init__(weights, lr, momentum=momentum, nesterov=True)
        self.bits, self.rate = bits, rate
        self.factors: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of every weight."""
        self.factors = []
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                buffer = state.get("momentum_buffer")
                buffer = weight.grad.clone() if buffer is None else buffer.mul_(group["momentum"]).add_(weight.grad)
                state["momentum_buffer"] = buffer
                move = -group["lr"] * (weight.grad + group["momentum"] * buffer)
                factor = self._search(weight, move)
                self.factors.append(factor)
                weight.add_(move, alpha=factor)

    def _search(self, weight: Tensor, move: Tensor) -> float:
        before = codes(weight, *channel_range(weight), self.bits)[0]

        def changed(factor: float) -> float:
            moved = weight + factor * move
            after = codes(moved, *channel_range(moved), self.bits)[0]
            return (after != before).sum().item() / weight.numel()

        high = middle = 1.0
        while changed(high) < self.rate:
            high *= 2
            if high > 2.0**64:  # the published search does not end here
                return 1.0
        low, middle = high / 2, high
        for _ in range(5 if high > 1 else 0):
            middle = (low + high) / 2
            share = changed(middle)
            if abs(share - self.rate) < self.rate / 100:
                break
            if share < self.rate:
                low = middle
            else:
                high = middle
        return middle


class Reference:
    """Teacher, generator, student and their optimizers; `step` is one step of both.

    Args:
        teacher: a float network with BatchNorm and `nn.ReLU` modules, in eval mode.
        classes: number of classes.
        image: (c, h, w).
        batch: images per step.
        bits: of weights and activations.
        lr: of the student.
        rate: share of a layer's codes that must change per step.
    """

    def __init__(
        self, teacher: nn.Module, classes: int, image: tuple[int, int, int], *, batch: int, bits: int = 4,
        lr: float = 1e-4, rate: float = 1e-3,
    ) -> None:  # fmt: skip
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.classes, self.batch = classes, batch
        self.generator = Generator(classes, image)
        self.student = convert(teacher, bits)
        self.adam = torch.optim.Adam(self.generator.parameters(), 1e-3, betas=(0.5, 0.999))
        weights = [m.weight for m in self.student.modules() if isinstance(m, QuantConv | QuantLinear)]
        ours = {id(weight) for weight in weights}
        others = [p for p in self.student.parameters() if id(p) not in ours]
        self.plain = torch.optim.SGD(others, lr, momentum=0.9, nesterov=True)
        self.searched = SearchedSGD(weights, lr, 0.9, bits, rate)
        self.seen: list[tuple[Any, Tensor, Tensor]] = []  # in the order of the calls
        for norm in [m for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.register_forward_pre_hook(self._note)

    def _note(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append((norm, args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), unbiased=False)))

    def images(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, the teacher's logits, and the generator's loss, with gradients."""
        images = self.generator(z, labels)
        self.seen.clear()
        logits = self.teacher(images)
        gap = torch.zeros(())
        for norm, mean, var in self.seen:
            gap = gap + F.mse_loss(mean, norm.running_mean) + F.mse_loss(var, norm.running_var)
        return images, logits, F.cross_entropy(logits, labels) + 0.1 * gap / len(self.seen)

    def distil(self, images: Tensor, target: Tensor, temperature: float = 20.0) -> Tensor:
        """The student's loss."""
        ours = F.log_softmax(self.student(images) / temperature, dim=1)
        theirs = F.softmax(target / temperature, dim=1)
        # the mean over images and classes, which torch calls "mean"
        return temperature**2 * F.kl_div(ours, theirs, reduction="sum") / ours.numel()

    def observe(self, images: Tensor) -> None:
        """Average the activation ranges over one more batch."""
        with torch.no_grad():
            self.student(images)

    def freeze(self) -> None:
        """Fix the activation ranges."""
        for module in self.student.modules():
            if isinstance(module, QuantReLU):
                module.observing = False

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of generator and student on one batch; their losses."""
        z, labels = torch.randn(self.batch, 100), torch.randint(self.classes, (self.batch,))
        images, logits, loss = self.images(z, labels)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        kl = self.distil(images.detach(), logits.detach())
        self.plain.zero_grad()
        self.searched.zero_grad()
        kl.backward()
        self.plain.step()
        self.searched.step()
        return loss.detach(), kl.detach()
