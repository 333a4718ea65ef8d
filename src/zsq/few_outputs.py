"""A convolution to few channels, such as those of an image, without computing for channels that do not exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LANES = 16  # numbers in a processor's register: a convolution with fewer outputs computes the rest for nothing
_BAND = 4  # rows of an image computed at once, as so many outputs


class _FewOutputs(torch.autograd.Function):
    """A convolution to few channels that keeps the size, in forms that leave no register mostly empty."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # One output for each row of a band: the kernel once per row, shifted by it, in a window higher by the band.
        rows = [F.pad(weight, (0, 0, row, _BAND - 1 - row)) for row in range(_BAND)]
        kernel = torch.stack(rows, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        edge = weight.shape[2] // 2
        y = F.conv2d(x, kernel, bias.repeat_interleave(_BAND), stride=(_BAND, 1), padding=edge)
        return y.unflatten(1, (-1, _BAND)).transpose(2, 3).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        outputs, _, side, _ = weight.shape
        into_x = into_weight = into_bias = None
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            into_x = F.conv2d(grad, turned, padding=side // 2)
        if ctx.needs_input_grad[1]:
            # A matrix product with the gradient's windows, which a convolution with ones and zeros lays out.
            size = outputs * side * side
            pick = torch.eye(-(-size // _LANES) * _LANES, size, dtype=x.dtype).unflatten(1, (outputs, side, side))
            windows = F.conv2d(grad, pick.contiguous(memory_format=torch.channels_last), padding=side // 2)
            product = windows.movedim(1, -1).flatten(0, 2).t() @ x.movedim(1, -1).flatten(0, 2)
            into_weight = product[:size].unflatten(0, (outputs, side, side)).movedim(-1, 1).flip(2, 3)
        if ctx.needs_input_grad[2]:
            into_bias = grad.sum((0, 2, 3))
        return into_x, into_weight, into_bias


def conv_to_few(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with stride 1 that keeps the size, fast where its outputs are few.

    A processor's kernels compute at least 16 outputs. On a CPU, with an odd kernel, at most 4 outputs and a height
    divisible by 4, four rows are computed at once as outputs of their own (twice the products, of which then nearly all
    count), and the gradient of the weight is a matrix product. Exact up to rounding; no second derivatives. Elsewhere
    torch's own.

    Args:
        x: [b, inputs, h, w].
        weight: [outputs, inputs, k, k], k odd.
        bias: [outputs].

    Returns:
        [b, outputs, h, w]; bfloat16 under autocast to it.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    packed = x.device.type == "cpu" and len(weight) * _BAND <= _LANES and x.shape[2] % _BAND == 0
    if not packed:
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
    y: Tensor = _FewOutputs.apply(x.to(kind), weight.to(kind), bias.to(kind))
    return y


class FewConv(nn.Conv2d):
    """A padded 3x3 convolution to few channels (`conv_to_few`).

    Args:
        inputs: channels in.
        outputs: channels out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]."""
        assert self.bias is not None
        return conv_to_few(input, self.weight, self.bias)
