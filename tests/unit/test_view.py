"""Observed forwards: statistics against float64, gradients, hooks that never stay behind."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.view import Moments, View, channel_moments, frozen, look

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_format = pytest.mark.parametrize("layout", FORMATS)


def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in float64, two passes."""
    rows = x.double().movedim(1, 0).flatten(1)
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().mean(1)


def hooks_of(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


# ---- moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_format
def test_moments_against_float64(layout: str, dtype: torch.dtype) -> None:
    # Several blocks of the CPU kernel, the last one smaller; the mean of each channel is far from zero.
    x = (
        torch.randn(37, 16, 32, 32) * torch.linspace(0.1, 3, 16)[:, None, None]
        + torch.linspace(-20, 20, 16)[:, None, None]
    )
    x = x.to(dtype).contiguous(memory_format=FORMATS[layout])
    mean, var = channel_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean.double(), oracle(x)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), oracle(x)[1], rtol=2e-5, atol=0)


@each_format
def test_no_cancellation_with_a_large_mean(layout: str) -> None:
    x = (100 + 0.1 * torch.randn(200, 3, 16, 16)).contiguous(memory_format=FORMATS[layout])
    mean, var = channel_moments(x)
    torch.testing.assert_close(mean.double(), oracle(x)[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), oracle(x)[1], rtol=1e-4, atol=0)
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert ((naive - oracle(x)[1]).abs() > 0.02 * oracle(x)[1]).any()  # what the shift is there for


def test_first_image_as_an_outlier() -> None:
    x = torch.randn(200, 2, 8, 8)
    x[0] += 1000
    torch.testing.assert_close(channel_moments(x)[1].double(), oracle(x)[1], rtol=1e-4, atol=0)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(lambda sizes: (sizes[0], 3, *sizes[1:])),
    seed=st.integers(0, 99),
)
def test_any_number_of_dimensions(shape: tuple[int, ...], seed: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for part in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        mean, var = channel_moments(part)
        torch.testing.assert_close(mean, oracle(x)[0])
        torch.testing.assert_close(var, oracle(x)[1])


def test_constant_channel_has_zero_variance() -> None:
    assert channel_moments(torch.full((4, 2, 8, 8), 0.1))[1].tolist() == [0, 0]


@pytest.mark.parametrize("layout", [*FORMATS, "sliced", "flat"])
def test_moments_gradient(layout: str) -> None:
    x = torch.randn(4, 3, 4, 5, dtype=torch.float64)
    if layout == "sliced":
        x = torch.randn(4, 6, 4, 5, dtype=torch.float64)[:, ::2]
    elif layout == "flat":
        x = x[:, :, 0, 0]
    else:
        x = x.contiguous(memory_format=FORMATS[layout])
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(channel_moments, (x,))


@each_format
def test_bfloat16_gradient(layout: str) -> None:
    x = torch.randn(20, 4, 8, 8).bfloat16().contiguous(memory_format=FORMATS[layout]).requires_grad_()
    wide = x.detach().double().requires_grad_()
    weight = torch.randn(4)
    for source, (mean, var) in ((x, channel_moments(x)), (wide, oracle(wide))):
        ((mean * weight.to(mean) + var * var).sum() * 1e3).backward(inputs=[source])
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0.01, atol=0.02 * float(wide.grad.abs().max()))


# ---- look


def test_look_records_batch_norm_inputs(bn_net: nn.Module) -> None:
    x = torch.randn(16, 3, 8, 8)
    view = look(bn_net, x, norms=True)
    first, second = bn_net[1], bn_net[4]
    inputs = [bn_net[:1](x), bn_net[:4](x)]
    assert torch.equal(view.logits, bn_net(x)) and len(view.norms) == 2
    for norm, layer, seen in zip(view.norms, (first, second), inputs, strict=True):
        torch.testing.assert_close(norm.mean.double(), oracle(seen)[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.var.double(), oracle(seen)[1], rtol=1e-5, atol=1e-6)
        assert torch.equal(norm.running_mean, layer.running_mean) and torch.equal(norm.running_var, layer.running_var)


def test_look_carries_gradients_to_the_images(bn_net: nn.Module) -> None:
    x = torch.randn(8, 3, 8, 8, requires_grad=True)
    view = look(bn_net, x, norms=True, features=["2"])
    parts = (view.logits, view.norms[1].mean, view.norms[1].var, view.features["2"])
    assert all(torch.autograd.grad(part.sum(), x, retain_graph=True)[0].abs().sum() > 0 for part in parts)
    loose = view.detach()
    assert not any(part.requires_grad for part in (loose.logits, *loose.norms[0], *loose.features.values()))
    assert torch.equal(loose.logits, view.logits) and isinstance(loose.norms[0], Moments)


def test_statistics_stay_float32_under_autocast(bn_net: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        view = look(bn_net, torch.randn(8, 3, 8, 8), norms=True)
    assert {part.dtype for norm in view.norms for part in norm} == {torch.float32}


def test_one_and_three_dimensional_norms_and_norms_without_memory() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.three = nn.BatchNorm1d(2), nn.BatchNorm3d(2)
            self.forgetful = nn.BatchNorm2d(2, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.three(input=self.forgetful(x)[..., None])[..., 0]
            return self.one(self.one(x.mean((2, 3))))

    view = look(Net().eval(), torch.randn(5, 2, 3, 4), norms=True)
    assert len(view.norms) == 3  # the shared one counts at every call, the one without running statistics never


def test_features_are_outputs(bn_net: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    view = look(bn_net, x, features=["0", "7"])
    assert list(view.features) == ["0", "7"] and torch.equal(view.features["0"], bn_net[0](x))
    assert not view.norms
    assert View(x).features == {} and View(x).norms == ()


def test_unknown_feature_names_near_ones(functional_net: nn.Module) -> None:
    with pytest.raises(BadInput, match="'bn1'"):
        look(functional_net, torch.randn(2, 3, 8, 8), features=["bn3"])
    assert hooks_of(functional_net) == 0


def test_feature_that_does_not_run(functional_net: nn.Module) -> None:
    functional_net.spare = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="did not run"):
        look(functional_net, torch.randn(2, 3, 8, 8), features=["spare"])


def test_network_that_returns_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(BadInput, match="one tensor, got tuple"):
        look(Pair(), torch.zeros(1))
    with pytest.raises(BadInput, match="feature '0'"):
        look(nn.Sequential(Pair()), torch.zeros(1), features=["0"])


def test_hooks_go_away(bn_net: nn.Module) -> None:
    look(bn_net, torch.randn(2, 3, 8, 8), norms=True, features=["0"])
    assert hooks_of(bn_net) == 0
    with pytest.raises(RuntimeError, match="channels"):
        look(bn_net, torch.randn(2, 4, 8, 8), norms=True, features=["0"])
    assert hooks_of(bn_net) == 0


def test_frozen_puts_every_flag_back() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    net[1][1].eval()
    net[1][0].bias.requires_grad_(False)

    def flags() -> list[bool]:
        return [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]

    before = flags()
    with pytest.raises(ValueError, match="stop"), frozen(net) as inside:
        assert inside is net and not any(flags())
        raise ValueError("stop")
    assert flags() == before and any(before) and not all(before)


class Norms(nn.Module):
    """A BatchNorm called twice, one without parameters, one in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.bare, self.line = nn.BatchNorm2d(6, affine=False), nn.BatchNorm1d(6)
        for norm in (self.twice, self.bare, self.line):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.3, 2)
        with torch.no_grad():
            self.twice.weight.uniform_(-1, 1)
            self.twice.bias.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(self.conv(x))))
        return self.line(input=torch.relu(self.bare(x)).flatten(2)).mean(2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_frozen_norms_are_one_node_with_the_same_result(layout: torch.memory_format) -> None:
    """A frozen BatchNorm takes the short way, one whose parameters ask for gradients the plain one."""
    torch.manual_seed(0)
    net = Norms().double().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=layout)

    def found() -> tuple[list[Tensor], Tensor, str]:
        images = x.clone().requires_grad_()
        view = look(net, images, norms=True)
        parts = [part for norm in view.norms for part in norm]
        total = view.logits.pow(3).sum() + sum((i + 1) * part.square().sum() for i, part in enumerate(parts))
        (gradient,) = torch.autograd.grad(total, images)
        return [view.logits.detach(), *(part.detach() for part in parts)], gradient, str(view.norms[0].mean.grad_fn)

    plain, plain_gradient, plain_node = found()
    net.requires_grad_(False)
    short, short_gradient, short_node = found()
    assert "ObservedNorm" in short_node and "ObservedNorm" not in plain_node
    assert len(short) == len(plain) == 1 + 4 * 4
    for a, b in zip(short, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short_gradient, plain_gradient, rtol=1e-11, atol=1e-11)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_a_norm_with_another_forward_keeps_it() -> None:
    torch.manual_seed(0)
    net = Norms().eval().requires_grad_(False)
    net.bare.__dict__["forward"] = lambda x: 2 * x
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(look(net, x, norms=True).logits, net(x))
    assert len(look(net, x, norms=True).norms) == 4
    assert net.bare.__dict__["forward"](1) == 2


def test_the_short_way_is_left_after_an_error() -> None:
    net = Norms().eval().requires_grad_(False)
    with pytest.raises(RuntimeError):
        look(net, torch.randn(2, 4, 5, 5), norms=True)  # four channels into three
    assert not any("forward" in module.__dict__ for module in net.modules())
