"""Convolutions on integers against the same ones in float: results, gradients, which layers qualify, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from zsq.errors import RunFailed
from zsq.insert import QuantSpec, freeze_ranges, integers, quantize, without_quantizers
from zsq.insert.integers import TOP, available, on_integers, plans, require_small
from zsq.quantizer import LearnedStep, LiveMinMax, Percentile

pytestmark = pytest.mark.skipif(not available(torch.device("cpu")), reason="this torch has no oneDNN integer kernels")


class Net(nn.Module):
    """Strides, groups, dilation, a bias, a padded and an unpadded convolution, a signed activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.dilated = nn.Conv2d(12, 6, 3, dilation=2)
        self.point = nn.Conv2d(6, 10, 1)
        self.after_signed = nn.Conv2d(10, 4, 1)
        self.output = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.strided(x))
        x = torch.relu(self.depthwise(x))
        x = torch.relu(self.dilated(x))
        x = nn.functional.hardswish(self.point(x))
        return self.output(self.after_signed(x).mean((2, 3)))


def student(bits: int = 4, seed: int = 0, **spec: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    made, _ = quantize(Net().eval(), QuantSpec(bits, bits, **{"weight": LiveMinMax, "act": Percentile, **spec}))
    x = torch.randn(6, 3, 12, 12).to(memory_format=torch.channels_last)
    made(x)
    freeze_ranges(made)
    return made, x


def names(net: nn.Module) -> list[str]:
    return [plan.name for plan in plans(net)]


def test_which_layers_qualify() -> None:
    # The first has float inputs, the last one signed ones; a linear layer has none of these kernels.
    assert names(student()[0]) == ["strided", "depthwise", "dilated", "point"]
    assert names(student(weight=LearnedStep)[0]) == []
    assert names(student(act=LearnedStep)[0]) == []
    assert names(student(8)[0]) == []  # 255 does not fit
    assert names(student(placement="deploy")[0]) == []
    observing, _ = quantize(Net().eval(), QuantSpec(4, 4, act=Percentile))
    assert names(observing) == []
    assert names(student()[0].double()) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_forward_is_exact(bits: int) -> None:
    """Sums of integers have no rounding: next to float64 they are as close as a float32 result can be."""
    net, x = student(bits)
    found: dict[str, Tensor] = {}
    net.strided.register_forward_hook(lambda *a: found.update(x=a[1][0].detach(), y=a[2].detach()))
    with on_integers(net) as chosen:
        assert [plan.name for plan in chosen] == ["strided", "depthwise", "dilated", "point"]
        on = net(x)
    grid = net.strided.weight_path.quantizer.grid(net.strided.weight)
    source = net.strided.weight_path.inputs[0].grid()
    whole_x = (found["x"].double() * source.inv_step).round()
    whole_w = net.strided.weight_path.quantizer.codes(net.strided.weight).double() + grid.zero
    sums = nn.functional.conv2d(whole_x, whole_w, stride=2, padding=1)
    exact = sums / (grid.inv_step.double().flatten() * source.inv_step.double())[:, None, None]
    assert float((found["y"] - exact).abs().max()) <= 4e-7 * float(exact.abs().max())
    torch.testing.assert_close(on, net(x), rtol=0, atol=2e-2)  # a sum on a rounding boundary may take another code
    assert names(net), "and behind the block nothing is left on"
    assert all(path.integers is None for path in (m.weight_path for m in net.modules() if hasattr(m, "weight_path")))


def test_rounding_gives_the_quantizers_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "_BLOCK", 5000)  # a few images at a time
    net, _ = student()
    (quantizer, *_) = net.strided.weight_path.inputs
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(9, 8, 12, 12).to(memory_format=layout).requires_grad_()
        plain = quantizer(x)
        with on_integers(net):
            y = quantizer(x)
            codes = quantizer.__dict__["forward"].codes(y)
            again = quantizer.__dict__["forward"].codes(y * 1)  # no longer the same tensor
        assert torch.equal(y, plain) and y.stride() == plain.stride()
        assert torch.equal(codes, quantizer.codes(x) + 8) and torch.equal(again, codes)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))


def test_a_layer_with_a_dead_channel_stays_float() -> None:
    """One step of Adam moves all of its weights to one side, by many times their range."""
    made, x = student()
    with torch.no_grad():
        made.get_parameter("strided.weight")[3] *= 1e-6
        made(x)
    assert names(made) == ["depthwise", "dilated", "point"]


def test_grouped_layers_with_dilation_stay_float() -> None:
    """Their gradient in bfloat16 holds numbers up to 1e34 in torch 2.13: found in a segmenter that learned nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ReLU(), nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1)
    ).eval()
    made, _ = quantize(net, QuantSpec(4, 4, weight=LiveMinMax, act=Percentile))
    x = torch.randn(8, 32, 32, 40).to(memory_format=torch.channels_last)
    made(x)
    freeze_ranges(made)
    assert names(made) == ["3"]

    def gradient() -> Tensor:
        made.zero_grad()
        made(x).square().mean().backward()
        return made.get_parameter("1.weight").grad.clone()  # type: ignore[union-attr]

    plain = gradient()
    with on_integers(made):
        fast = gradient()
    assert float((fast - plain).norm()) < 0.02 * float(plain.norm())


@pytest.mark.parametrize("layer", ["strided", "depthwise", "dilated", "point"])
def test_gradients_are_those_of_float_up_to_bfloat16(layer: str) -> None:
    """One layer at a time on the same input and the same incoming gradient."""
    net, x = student()
    module = net.get_submodule(layer)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda *a: seen.append(a[1][0].detach()))
    net(x)
    given = seen[0]
    rng = torch.Generator().manual_seed(1)

    def gradients() -> tuple[Tensor, ...]:
        leaf = given.clone().requires_grad_()
        y = module(leaf)
        upstream = torch.randn(y.shape, generator=rng.manual_seed(1))
        return torch.autograd.grad(y, [leaf, *module.parameters()], upstream)

    plain = gradients()
    with on_integers(net):
        fast = gradients()
    for index, (a, b) in enumerate(zip(fast, plain, strict=True)):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert float((a - b).norm()) <= 5e-3 * float(b.norm()), index
    assert not torch.equal(fast[1], plain[1])  # it did take the other path


def test_no_number_is_read_in_a_step() -> None:
    net, x = student()
    with on_integers(net), profile(activities=[ProfilerActivity.CPU]) as found:
        net(x).square().sum().backward()
    counts = {event.key: event.count for event in found.key_averages()}
    assert "aten::_local_scalar_dense" not in counts
    assert counts["onednn::qconv2d_pointwise"] == 4


def test_comparisons_with_the_float_network_stay_float() -> None:
    net, x = student()
    with on_integers(net), without_quantizers(net):
        inside = net(x)
    with without_quantizers(net):
        assert torch.equal(inside, net(x))
    with on_integers(net), without_quantizers(net, weights=()):  # exact activations are not integers
        inside = net(x)
    with without_quantizers(net, weights=()):
        assert torch.equal(inside, net(x))


def test_weights_far_from_zero_are_computed_in_float_or_refused() -> None:
    net, x = student()
    with torch.no_grad():
        net.strided.weight[0].mul_(0.01).add_(5)  # integers far beyond int8
    assert "strided" not in names(net)
    net, x = student()
    with on_integers(net) as chosen:
        net(x)
        require_small(chosen)
        with torch.no_grad():
            net.strided.weight[0].mul_(0.01).add_(5)
        net(x)
        with pytest.raises(RunFailed, match=f"strided: expected weights whose integers stay within {TOP}.*float32"):
            require_small(chosen)


class Normed(nn.Module):
    """Two convolutions with a BatchNorm behind each, the second between a sum; one whose BatchNorm is not alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.05, 0.2)
        with torch.no_grad():
            self.norm1.weight.copy_(torch.tensor([1.5, -0.7, 0.0, 1e-6, 0.3, 1.0, 2.0, -1e-3]))
            self.norm1.bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        y = self.relu(self.norm1(self.conv1(x)))
        z = self.conv3(self.relu(self.norm2(self.conv2(y)) + x))
        return self.norm3(z) + z


def normed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, _ = quantize(Normed().eval(), QuantSpec(4, 4, weight=LiveMinMax, act=Percentile))
    x = torch.randn(6, 3, 12, 12).to(memory_format=torch.channels_last)
    net(x)
    freeze_ranges(net)
    return net, x


def test_a_norm_that_alone_reads_a_convolution_is_part_of_it() -> None:
    net, _ = normed()
    assert {plan.name: plan.norm for plan in plans(net)} == {"conv1": net.norm1, "conv2": net.norm2, "conv3": None}
    with on_integers(net):
        assert "forward" in net.norm1.__dict__ and "forward" not in net.norm3.__dict__
    assert "forward" not in net.norm1.__dict__


@pytest.mark.parametrize(("conv", "norm"), [("conv1", "norm1"), ("conv2", "norm2")])
def test_results_and_gradients_with_a_norm_are_those_of_two_layers(conv: str, norm: str) -> None:
    """Factors of any sign, zero and tiny ones; results to the last bits, gradients to bfloat16's."""
    net, x = normed()
    first, second = net.get_submodule(conv), net.get_submodule(norm)
    seen: list[Tensor] = []
    handle = first.register_forward_hook(lambda *a: seen.append(a[1][0].detach()))
    net(x)
    handle.remove()

    def found() -> list[Tensor]:
        leaf = seen[0].clone().requires_grad_()
        before = first(leaf)
        y = second(before)
        assert (y is before) is (first.weight_path.integers is not None)
        factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        own = [*first.parameters(), *second.parameters()]
        return [y.detach(), *torch.autograd.grad(y, [leaf, *own], factors)]

    plain = found()
    with on_integers(net):
        fast = found()
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-5)
    for index, (a, b) in enumerate(zip(fast[1:], plain[1:], strict=True)):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert float((a - b).norm()) <= 5e-3 * float(b.norm()), index


def test_a_norm_that_is_watched_or_in_training_stays_apart() -> None:
    net, x = normed()
    given: list[Tensor] = []
    with on_integers(net):
        handle = net.norm1.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        watched = net(x)
        handle.remove()
        together = net(x)
        with without_quantizers(net):
            inside = net(x)
        net.norm1.train()
        net.norm1.momentum = 0.0
        net(x)
        net.norm1.eval()
    torch.testing.assert_close(watched, together, rtol=0, atol=2e-2)
    plain: list[Tensor] = []
    net.conv1.register_forward_hook(lambda *a: plain.append(a[2]))
    net(x)
    torch.testing.assert_close(given[0], plain[0], rtol=1e-5, atol=1e-5)
    with without_quantizers(net):
        assert torch.equal(inside, net(x))
