"""A forward with convolutions in bfloat16, and float32 again behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zsq.view import View, look


def view_at(net: nn.Module, images: Tensor, features: Sequence[str] = (), precision: str = "float32") -> View:
    """Pass images through a network, its convolutions in bfloat16 if asked to; what it shows is float32 either way.

    Args:
        net: a network.
        images: shape [n, c, h, w].
        features: names of modules whose outputs are wanted.
        precision: bf16, or anything else for the precision of the caller.
    """
    if precision != "bf16":
        return look(net, images, features=features)
    images = images.contiguous(memory_format=torch.channels_last)  # a tenth faster, which float32 on a CPU is not
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        return wide(look(net, images, features=features))


def half_gradient_holds(layer: nn.Module) -> bool:
    """Whether a layer's weight gets the right gradient in bfloat16 on a CPU.

    Of grouped convolutions with a dilation it does not: torch 2.13 (oneDNN) leaves some of it unwritten, so that it
    holds whatever the memory did, up to 1e34. The gradient of the input is right.
    """
    dilation, groups = getattr(layer, "dilation", 1), getattr(layer, "groups", 1)
    return groups == 1 or max(dilation if isinstance(dilation, tuple) else (dilation,)) == 1


def trainable_at(net: nn.Module, precision: str) -> str:
    """A precision in which every layer of a network gets the right gradient: float32 where bf16 was asked for in vain.

    Args:
        net: a network that will be trained.
        precision: float32, bf16 or integers (whose layers are chosen one by one).
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in net.parameters())
    held = not on_cpu or all(half_gradient_holds(layer) for layer in net.modules())
    return "float32" if precision == "bf16" and not held else precision


def wide(view: View) -> View:
    """The same view in float32 where it was in half precision: losses are computed in float32."""
    features = {name: _widen(value) for name, value in view.features.items()}
    return View(_widen(view.logits), view.norms, features)


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
