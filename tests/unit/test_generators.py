"""The GDFQ generators: published sizes, the exact upsampling convolution, statistics of the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.errors import BadInput
from zsq.few_outputs import conv_to_few
from zsq.generators import AddingGenerator, BatchStatsNorm, ConditionalGenerator, UpConv, conv_of_doubled

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gdfq.json").read_text(encoding="utf-8"))


def inputs(count: int, classes: int = 10, latent: int = 100) -> tuple[Tensor, Tensor]:
    return torch.randn(count, latent), torch.randint(classes, (count,))


@pytest.mark.parametrize("size", GOLDEN["parameters"], ids=lambda size: f"{size['classes']}")
def test_parameter_counts(size: dict) -> None:
    with torch.device("meta"):
        net = ConditionalGenerator(size["classes"], tuple(size["image"]))
    assert sum(p.numel() for p in net.parameters()) == size["count"]
    assert not list(net.buffers())


# ---- upsampling convolution


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_up_conv_is_the_naive_graph(layout: torch.memory_format) -> None:
    conv = UpConv(3, 5).double().to(memory_format=layout)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    up = F.interpolate(x, scale_factor=2, mode="nearest")
    naive = F.conv2d(up, conv.weight, padding=1)
    fast = conv(x)
    assert (fast - naive).abs().max() < 1e-12
    weights = torch.randn_like(naive)
    wanted = (x, conv.weight)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (fast, naive)), strict=True):
        assert (a - b).abs().max() < 1e-12
    assert conv.bias is not None
    with_bias = conv_of_doubled(x, conv.weight, conv.bias)  # for those who train it
    (bias,) = torch.autograd.grad((with_bias * weights).sum(), conv.bias)
    assert (bias - weights.sum((0, 2, 3))).abs().max() < 1e-12


@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_conv_of_doubled_of_any_odd_kernel(side: int) -> None:
    """Values, gradients, and gradients of gradients."""
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, side, side, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    naive = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=side // 2)
    fast = conv_of_doubled(x, weight, bias)
    assert (fast - naive).abs().max() < 1e-12
    found = []
    for y in (fast, naive):
        first = torch.autograd.grad(y.sin().sum(), (x, weight, bias), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight, bias))
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_conv_of_doubled_in_bfloat16_is_as_close_as_the_naive_graph() -> None:
    conv = UpConv(32, 16)
    x = torch.randn(4, 32, 8, 8).to(torch.bfloat16)
    weight = conv.weight.detach().to(torch.bfloat16).double()
    exact = F.conv2d(F.interpolate(x.double(), scale_factor=2), weight, padding=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own, naive = conv(x), F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, padding=1)
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (own, naive)]
    assert own.dtype == torch.bfloat16 and errors[0] < 0.005 and errors[0] < 2 * errors[1]


def test_the_bias_before_a_norm_has_no_effect_and_is_not_trained() -> None:
    net = ConditionalGenerator(3, (3, 8, 8)).double()
    z, labels = inputs(8, classes=3)
    before = net(z.double(), labels)
    with torch.no_grad():
        for bias in (net.conv1.bias, net.conv2.bias):
            assert bias is not None
            bias.add_(torch.randn_like(bias))
    after = net(z.double(), labels)
    assert (after - before).abs().max() < 1e-9
    after.pow(3).sum().backward()
    assert net.conv1.bias.grad is None and net.conv2.bias.grad is None


def test_up_conv_on_the_smallest_grid() -> None:
    conv = UpConv(2, 2).double()
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    naive = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, padding=1)
    assert (conv(x) - naive).abs().max() < 1e-12


def test_up_conv_keeps_a_plain_convolution_weight() -> None:
    assert {name: tuple(p.shape) for name, p in UpConv(3, 5).named_parameters()} == {
        "weight": (5, 3, 3, 3),
        "bias": (5,),
    }


# ---- convolution to few channels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("outputs", "side", "height"), [(3, 3, 8), (1, 5, 4), (4, 3, 12), (5, 3, 8), (3, 3, 6)])
def test_conv_to_few_is_the_convolution(layout: torch.memory_format, outputs: int, side: int, height: int) -> None:
    x = torch.randn(2, 7, height, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(outputs, 7, side, side, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True)
    plain, fast = F.conv2d(x, weight, bias, padding=side // 2), conv_to_few(x, weight, bias)
    assert (plain - fast).abs().max() < 1e-12
    factors = torch.randn_like(plain)
    wanted = (x, weight, bias)
    for a, b in zip(*(torch.autograd.grad((y * factors).sum(), wanted) for y in (plain, fast)), strict=True):
        assert (a - b).abs().max() < 1e-12
    packed = outputs <= 4 and height % 4 == 0  # or the two would be compared with themselves
    assert ("FewOutputs" in type(fast.grad_fn).__name__) is packed


def test_conv_to_few_in_bfloat16_is_as_close_as_the_convolution() -> None:
    x, weight, bias = torch.randn(8, 32, 16, 16), torch.randn(3, 32, 3, 3), torch.randn(3)
    factors = torch.randn(8, 3, 16, 16)

    def found(conv: Callable[..., Tensor], kind: torch.dtype, *, cast: bool) -> list[Tensor]:
        given = [v.to(torch.bfloat16).to(kind).requires_grad_() for v in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = conv(*given)
        return [y.detach(), *torch.autograd.grad((y * factors.to(y.dtype)).sum(), given)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    exact = found(plain, torch.float64, cast=False)
    fast, torchs = (found(conv, torch.float32, cast=True) for conv in (conv_to_few, plain))
    for a, b, c in zip(fast, torchs, exact, strict=True):
        own, theirs = (float((v.double() - c).norm() / c.norm()) for v in (a, b))
        assert own < 0.01 and own < 1.5 * theirs


# ---- the network against the published graph, written down with plain modules


class Plain(nn.Module):
    """Embedding form, straight from the layer table."""

    def __init__(self, net: ConditionalGenerator) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        net = self.net
        x = net.linear(net.embedding(labels) * z).view(-1, 128, *(side // 4 for side in net.image[1:]))
        x = F.batch_norm(x, None, None, net.norm0.weight, net.norm0.bias, training=True, eps=1e-5)
        for conv, norm in ((net.conv1, net.norm1), (net.conv2, net.norm2)):
            x = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)
            x = F.leaky_relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=0.8), 0.2)
        return F.batch_norm(torch.tanh(net.conv3(x)), None, None, training=True, eps=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_embedding_form(layout: torch.memory_format) -> None:
    net = ConditionalGenerator(10, (3, 12, 8)).double().to(memory_format=layout)
    z, y = inputs(6)
    torch.testing.assert_close(net(z.double(), y), Plain(net)(z.double(), y), rtol=0, atol=1e-11)


def test_added_labels_are_in_the_mean_of_the_latent_and_multiplied_ones_are_not() -> None:
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(4000, 16, generator=rng), torch.arange(2).repeat_interleave(2000)
    added = AddingGenerator(2, (3, 8, 8), latent=16, strength=3.0, rng=rng)
    assert not added.conditional and AddingGenerator(4, (3, 68, 8), latent=8).conditional is False
    assert added.embedding is not None
    means = added.embed(z, y).unflatten(0, (2, 2000)).mean(1)
    assert torch.allclose(means, 3 * added.embedding.weight, atol=0.15)
    plain = ConditionalGenerator(2, (3, 8, 8), latent=16, rng=rng)
    assert plain.embed(z, y).unflatten(0, (2, 2000)).mean(1).abs().max() < 0.15
    soft = F.one_hot(y, 2).float()
    torch.testing.assert_close(added.embed(z, soft), added.embed(z, y))


def test_conditional_form_starts_like_an_unconditional_one_and_uses_labels() -> None:
    net = ConditionalGenerator(7, (3, 8, 8), conditional=True).double()
    z, y = inputs(5, classes=7)
    z = z.double()
    assert net.embedding is None and torch.equal(net.embed(z, y), z)
    assert torch.equal(net(z, y), net(z, (y + 1) % 7))  # all classes start with scale 1 and offset 0
    with torch.no_grad():
        for norm in (net.norm0, net.norm1, net.norm2):
            norm.weight += 0.3 * torch.randn_like(norm.weight)
            norm.bias += 0.3 * torch.randn_like(norm.bias)
    assert (net(z, y) - net(z, (y + 1) % 7)).abs().max() > 0.01


def test_conditional_norm_formula() -> None:
    norm = BatchStatsNorm(4, eps=0.8, classes=3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(3, 4))
        norm.bias.copy_(torch.randn(3, 4))
    x, y = torch.randn(5, 4, 2, 2, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 0.8).sqrt()
    expected = norm.weight[y][:, :, None, None] * plain + norm.bias[y][:, :, None, None]
    torch.testing.assert_close(norm(x, y), expected)
    torch.testing.assert_close(norm(x, F.one_hot(y, 3).double()), expected)


@pytest.mark.parametrize(("image", "form"), [((1, 8, 8), False), ((3, 64, 64), False), ((3, 68, 8), True)])
def test_form_follows_the_size(image: tuple[int, int, int], form: bool) -> None:
    assert ConditionalGenerator(4, image, latent=8).conditional is form
    assert ConditionalGenerator(4, image, latent=8, conditional=not form).conditional is not form


@pytest.mark.parametrize("conditional", [False, True])
def test_soft_labels_mix_classes(conditional: bool) -> None:
    net = ConditionalGenerator(3, (3, 8, 8), latent=8, conditional=conditional)
    z, y = inputs(4, classes=3, latent=8)
    torch.testing.assert_close(net(z, F.one_hot(y, 3).float()), net(z, y))


# ---- images


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("image", [(3, 32, 32), (1, 8, 8), (4, 12, 20)])
def test_images_have_unit_statistics(image: tuple[int, int, int], conditional: bool) -> None:
    net = ConditionalGenerator(5, image, conditional=conditional)
    x = net(*inputs(32, classes=5))
    assert x.shape == (32, *image) and x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(image[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(image[0]), rtol=0, atol=0.01)


@pytest.mark.parametrize("conditional", [False, True])
def test_modes_agree_and_nothing_is_stored(conditional: bool) -> None:
    net = ConditionalGenerator(5, (3, 8, 8), conditional=conditional)
    z, y = inputs(8, classes=5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(net.train()(z, y), net.eval()(z, y))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("conditional", [False, True])
def test_bfloat16_stays_close_and_gives_float32(conditional: bool) -> None:
    net = ConditionalGenerator(5, (3, 8, 8), conditional=conditional)
    z, y = inputs(32, classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(z, y)
    assert half.dtype == torch.float32
    assert (half - net(z, y)).square().mean() < 1e-3  # images have variance 1


def test_every_parameter_learns() -> None:
    for conditional in (False, True):
        net = ConditionalGenerator(3, (3, 8, 8), conditional=conditional)
        net(*inputs(8, classes=3)).pow(3).sum().backward()
        inert = {net.conv1.bias, net.conv2.bias}
        learning = [p for p in net.parameters() if p not in inert]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)


def test_initial_weights_follow_rng() -> None:
    def make(seed: int) -> Tensor:
        net = ConditionalGenerator(3, (3, 8, 8), rng=torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in net.parameters()])

    before = torch.random.get_rng_state()
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("image", "near"), [((3, 30, 32), "28x32 or 32x32"), ((3, 2, 2), "4x4."), ((3, 33, 35), "32x32 or 36x36")]
)
def test_sizes_it_refuses(image: tuple[int, int, int], near: str) -> None:
    with pytest.raises(BadInput, match=near):
        ConditionalGenerator(10, image)


def test_counts_it_refuses() -> None:
    for wrong in ({"classes": 0}, {"latent": 0}, {"image": (0, 8, 8)}):
        with pytest.raises(BadInput, match="positive"):
            ConditionalGenerator(**{"classes": 2, "image": (3, 8, 8), **wrong})
