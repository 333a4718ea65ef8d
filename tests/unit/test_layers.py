"""Layers with a swapped class: folding, latent coordinates, bias rounding, and what the swap must not break."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.zoo import SameConv, StandardisedConv
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.errors import RunFailed
from zsq.grid import encode
from zsq.insert.layers import QuantizedFunction, is_plain, probe, swap_class
from zsq.insert.weight_path import WeightPath, exact
from zsq.quantizer import LiveMinMax, RunningMinMax

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2, padding_mode="reflect"), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), (2, 4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 2, 2, 2)),
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "same": (lambda: SameConv(4, 6, 3), (2, 4, 6, 6)),
    "standardised": (lambda: StandardisedConv(4, 6, 3), (2, 4, 6, 6)),
}


def swapped(layer: nn.Module, bits: int = 4, *, symmetric: bool = False) -> WeightPath:
    """Swap the layer's class as `quantize` does."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    path = WeightPath(
        LiveMinMax(bits, axis=int(transposed), symmetric=symmetric),
        transposed_groups=layer.groups if transposed else 0,  # type: ignore[arg-type]
    )
    path.derived, _ = probe(layer)
    swap_class(layer, path)
    return path


def norm_of(channels: int, dims: int) -> nn.Module:
    """A BatchNorm in which nothing is 0 or 1; the first factor is negative."""
    norm = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(dims, nn.BatchNorm1d)(channels)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight[0] = -norm.weight[0].abs()
    return norm.eval()


@pytest.mark.parametrize("name", LAYERS)
def test_the_swap_keeps_the_layer(name: str) -> None:
    make, size = LAYERS[name]
    layer, x = make(), torch.randn(size)
    kind, keys, want = type(layer), set(layer.state_dict()), layer(x)
    parameters = {name: id(p) for name, p in layer.named_parameters()}
    path = swapped(layer)
    assert isinstance(layer, kind) and type(layer).__name__ == f"Quantized{kind.__name__}"
    assert keys <= set(layer.state_dict())
    assert all(id(layer.get_parameter(key)) == value for key, value in parameters.items())
    assert not torch.equal(layer(x), want)
    with exact([path]):
        assert torch.equal(layer(x), want)
    assert not torch.equal(layer(x), want)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_that_counts_is_the_quantized_one(name: str) -> None:
    make, size = LAYERS[name]
    layer, x = make(), torch.randn(size)
    path = swapped(layer)
    got = layer(x)
    if not path.derived:
        with torch.no_grad():
            layer.weight.copy_(path.quantizer(layer.weight))  # type: ignore[operator, union-attr]
        with exact([path]):
            assert torch.equal(layer(x), got)
    else:  # a standardised weight does not change with the scale of its latent
        with torch.no_grad():
            layer.weight.mul_(3.0)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(layer(x), got, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv1d"])
def test_folding_equals_the_batch_norm(name: str, bias: bool) -> None:
    make, size = LAYERS[name]
    layer, x = make().double(), torch.randn(size).double()
    if not bias:
        layer.bias = None  # type: ignore[assignment]
    y = layer(x)
    norm = norm_of(y.shape[1], y.dim()).double()
    want = norm(y)
    path = swapped(layer)
    path.folded = (norm,)
    with exact([path]):
        torch.testing.assert_close(layer(x), want)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in (layer.weight, norm.weight, norm.bias))  # type: ignore[union-attr]
    assert len(list(layer.parameters())) == 1 + bias  # the BatchNorm is not registered a second time


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_latent_grid(name: str, symmetric: bool, affine: bool) -> None:
    make, size = LAYERS[name]
    layer = make()
    y = layer(torch.randn(size))
    path = swapped(layer, symmetric=symmetric)
    norm = norm_of(y.shape[1], y.dim())
    if not affine:
        norm.weight, norm.bias = None, None  # type: ignore[assignment]
    path.folded = (norm,)
    layer(torch.randn(size))
    latent: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
    used = path.seen if path.derived else latent
    assert used is not None
    want = path.quantizer.codes(path.fold(used, None)[0])
    got = encode(latent, path.latent_grid(latent))
    assert (want != got).float().mean() <= 0.02
    assert want.unique().numel() > 8


def test_a_dead_channel_folds_to_code_zero() -> None:
    layer, norm = nn.Conv2d(2, 3, 1), norm_of(3, 4)
    with torch.no_grad():
        norm.weight[1] = 0.0
    path = swapped(layer, symmetric=True)
    path.folded = (norm,)
    grid = path.latent_grid(layer.weight)
    assert encode(layer.weight, grid)[1].eq(0).all()
    assert ((encode(layer.weight, grid) + grid.zero) / grid.inv_step).isfinite().all()
    assert layer(torch.randn(1, 2, 4, 4)).isfinite().all()


@given(bits=st.integers(2, 8), scale=st.floats(1e-3, 1e3), groups=st.sampled_from([1, 2]))
def test_bias_lies_on_the_grid_of_input_and_weight(bits: int, scale: float, groups: int) -> None:
    for layer in (nn.Conv2d(4, 6, 1, groups=groups), nn.ConvTranspose2d(4, 6, 1, groups=groups), nn.Linear(4, 6)):
        source = RunningMinMax(bits, include_zero=True)
        x = source(torch.randn(3, 4, *([] if isinstance(layer, nn.Linear) else [2, 2])).relu() * scale)
        path = swapped(layer, bits, symmetric=True)
        path.sources = (source,)
        weight, bias = path(x, layer.weight, layer.bias, 0)
        inv_w = path.quantizer.grid(layer.weight).inv_step.flatten()
        inv_w = inv_w.repeat(groups) if isinstance(layer, nn.ConvTranspose2d) and groups > 1 else inv_w
        unit = 1 / (inv_w.double() * source.grid(x).inv_step.double())
        codes = bias.double() / unit
        assert torch.allclose(codes, codes.round(), atol=1e-3, rtol=1e-6)
        assert ((bias - layer.bias).abs() <= 0.5001 * unit + 1e-6).all()
        grad = torch.autograd.grad(bias.sum(), layer.bias)[0]
        assert torch.equal(grad, torch.ones(6))
        assert not torch.equal(weight, layer.weight)
        # No grid known at another call site: the bias stays as it is.
        assert torch.equal(path(x, layer.weight, layer.bias, 1)[1], layer.bias)


def test_functional_layer() -> None:
    x, weight, bias = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6)
    path = WeightPath(LiveMinMax(4, axis=0))
    layer = QuantizedFunction(F.conv2d, path)
    want = F.conv2d(x, path.quantizer(weight), bias, 2, 1)
    assert torch.equal(layer(x, weight, bias, 2, 1), want)
    assert "conv2d" in repr(layer)


def test_probe_tells_what_a_forward_does() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class TwoInputs(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    assert probe(nn.Conv2d(3, 4, 3)) == (False, True)
    assert probe(nn.ConvTranspose2d(3, 4, 3)) == (False, True)
    assert probe(SameConv(3, 4, 3)) == (False, True)
    assert probe(StandardisedConv(3, 4, 3)) == (True, True)
    assert probe(Scaled(3, 4)) == (False, False)
    assert probe(TwoInputs(3, 4)) == (False, False)
    assert probe(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) == (True, True)
    assert is_plain(nn.Conv2d(3, 4, 3)) and not is_plain(SameConv(3, 4, 3))

    layer, x = TwoInputs(3, 4), torch.randn(2, 3)
    want = layer(x, x)
    swapped(layer, bits=8)
    torch.testing.assert_close(layer(x, y=x), want, atol=0.05, rtol=0.05)


def test_what_cannot_be_computed_is_refused() -> None:
    layer = StandardisedConv(3, 4, 3)
    path = swapped(layer)
    with pytest.raises(RunFailed, match="after a forward"):
        path.latent_grid(layer.weight)
    linear = nn.Linear(4, 6)
    swapped(linear).folded = (norm_of(6, 2),)
    assert linear(torch.randn(3, 4)).shape == (3, 6)
    with pytest.raises(RunFailed, match="batch, features"):
        linear(torch.randn(3, 6, 4))
