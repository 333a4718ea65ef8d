"""Layers with a quantized weight: the same modules with another class, so that names and state-dict keys stay.

A layer asks its `WeightPath` for the weight and bias to compute with; everything else is the layer's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from zsq.errors import RunFailed
from zsq.insert.weight_path import WeightPath

# Argument order and defaults of the functions that read a weight, after (input, weight, bias).
_CONV_REST = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
_TRANSPOSED_REST = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
WEIGHT_FUNCTIONS: dict[Callable[..., Any], Sequence[tuple[str, Any]]] = {
    F.conv1d: _CONV_REST, F.conv2d: _CONV_REST, F.conv3d: _CONV_REST, F.conv_transpose1d: _TRANSPOSED_REST,
    F.conv_transpose2d: _TRANSPOSED_REST, F.conv_transpose3d: _TRANSPOSED_REST, F.linear: (),
}  # fmt: skip


class _Substitute(TorchFunctionMode):
    """Hands a layer's own forward the quantized weight: replaces weight and bias where its convolution reads them."""

    def __init__(self, path: WeightPath | None, size: torch.Size, site: int) -> None:
        super().__init__()
        self.path, self.size, self.site = path, size, site
        self.weights: list[Tensor] = []
        self.results: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func not in WEIGHT_FUNCTIONS:
            return func(*args, **named)
        names = ("input", "weight", "bias")
        given = dict(zip(names, args, strict=False)) | {name: named.pop(name) for name in names if name in named}
        weight, bias = given["weight"], given.get("bias")
        if weight.shape != self.size:
            return func(*args, **(kwargs or {}))
        self.weights.append(weight)
        if self.path is not None:
            weight, bias = self.path(given["input"], weight, bias, self.site)
        result = func(given["input"], weight, bias, *args[3:], **named)
        self.results.append(result)
        return result


class _Quantized:
    """What every layer with swapped class has: a `weight_path`."""

    weight_path: WeightPath


class _QuantizedOwn(_Quantized):
    """A layer with a forward of its own."""

    def forward(self, *args: Any, site: int = 0, **named: Any) -> Any:  # the signature is the layer's own
        module: Any = self
        with _Substitute(self.weight_path, module.weight.shape, site):
            return super().forward(*args, **named)  # type: ignore[misc]


class _QuantizedConv(_Quantized):
    """A plain convolution."""

    def forward(self, input: Tensor, *, site: int = 0) -> Tensor:
        layer: Any = self
        integers = self.weight_path.integers
        found = None if integers is None else integers(input, site)
        if found is not None:
            return found
        return layer._conv_forward(input, *self.weight_path(input, layer.weight, layer.bias, site))


class _QuantizedLinear(_Quantized):
    """A plain linear layer."""

    def forward(self, input: Tensor, *, site: int = 0) -> Tensor:
        layer: Any = self
        path = self.weight_path
        if path.norm is not None and input.dim() != 2:
            size = list(input.shape)
            raise RunFailed(
                f"a BatchNorm is folded into this linear layer: its input must be [batch, features], not {size}"
            )
        return F.linear(input, *path(input, layer.weight, layer.bias, site))


class QuantizedFunction(nn.Module):
    """A functional convolution or linear call (``F.conv2d(x, self.kernel)``) with a quantized weight.

    Args:
        function: one of `WEIGHT_FUNCTIONS`.
        weight_path: from latent to quantized weight.
    """

    def __init__(self, function: Callable[..., Any], weight_path: WeightPath) -> None:
        super().__init__()
        self.function = function
        self.weight_path = weight_path

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, site: int = 0) -> Tensor:
        return self.function(input, *self.weight_path(input, weight, bias, site), *rest)

    def extra_repr(self) -> str:
        return self.function.__name__


@cache
def _swapped(cls: type[nn.Module], behaviour: type) -> type[nn.Module]:
    return type(f"Quantized{cls.__name__}", (behaviour, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def swap_class(layer: nn.Module, weight_path: WeightPath) -> None:
    """Make a convolution or linear layer compute with a quantized weight, in place.

    Args:
        layer: any subclass of a convolution, transposed convolution or linear layer.
        weight_path: becomes its submodule ``weight_path``.
    """
    layer.weight_path = weight_path
    behaviour: type = _QuantizedOwn
    if is_plain(layer):
        behaviour = _QuantizedLinear if isinstance(layer, nn.Linear) else _QuantizedConv
    layer.__class__ = _swapped(type(layer), behaviour)  # type: ignore[arg-type]


def is_plain_conv(layer: nn.Module) -> bool:
    """Whether a layer with a quantized weight is a convolution that does nothing else in its forward."""
    return isinstance(layer, _QuantizedConv)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's forward is torch's own and simple (transposed convolutions are not), reading ``weight``."""
    cls: Any = type(layer)
    if "weight" not in layer._parameters or isinstance(layer, _ConvTransposeNd):
        return False
    if isinstance(layer, nn.Linear):
        return cls.forward is nn.Linear.forward
    stock: Any = next(base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, base))
    return cls.forward is stock.forward and cls._conv_forward is stock._conv_forward


def probe(layer: nn.Module) -> tuple[bool, bool]:
    """Run a layer's own forward on a small input of zeros and watch its convolution.

    Args:
        layer: not yet swapped.

    Returns:
        Whether it computes with a tensor other than its parameter ``weight``; whether its output is the convolution's.
    """
    if is_plain(layer):
        return False, True
    derived = "weight" not in layer._parameters
    x = _small_input(layer)
    with torch.no_grad(), _Substitute(None, layer.weight.shape, 0) as watch:  # type: ignore[arg-type]
        try:
            result = layer(x)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return derived, False  # a signature of its own: nothing is folded into it
    derived = derived or any(weight is not layer.weight for weight in watch.weights)
    return derived, len(watch.results) == 1 and result is watch.results[0]


def _small_input(layer: Any) -> Tensor:
    if isinstance(layer, _ConvNd):
        sides = zip(layer.dilation, layer.kernel_size, layer.stride, strict=True)
        size = [layer.in_channels, *(d * k + s for d, k, s in sides)]
    else:
        size = [layer.in_features]
    return torch.zeros(2, *size, device=layer.weight.device, dtype=layer.weight.dtype)


def function_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a functional layer by position: input, weight, bias and the rest with its defaults."""
    rest = WEIGHT_FUNCTIONS[node.target]  # type: ignore[index]
    names = [("input", None), ("weight", None), ("bias", None), *rest]
    return tuple(node.args[i] if i < len(node.args) else node.kwargs.get(n, d) for i, (n, d) in enumerate(names))
