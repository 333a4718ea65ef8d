"""Bias correction: means of channels become the teacher's, and what cannot be corrected stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zsq import QuantSpec, load_teacher, quantize
from zsq.correction import correct_moments
from zsq.insert import freeze_ranges
from zsq.quantizer import MseRange


def noise(count: int, *image: int) -> Tensor:
    return torch.randn(count, *image, generator=torch.Generator().manual_seed(8))


def calibrated(net: nn.Module, images: Tensor, *, placement: str = "paper", bits: int = 3) -> nn.Module:
    student, _ = quantize(net, QuantSpec(bits, bits, placement=placement))
    student.eval()
    with torch.no_grad():
        student(images)
    freeze_ranges(student)
    return student


def per_channel(statistic: Callable[..., Tensor], net: nn.Module, name: str, images: Tensor) -> Tensor:
    """A statistic of every channel of what a module gives."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(statistic(out, (0, 2, 3))))
    with torch.no_grad():
        net(images)
    handle.remove()
    return seen[0]


means, spreads = partial(per_channel, torch.mean), partial(per_channel, torch.std)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_means_become_the_teachers(placement: str) -> None:
    teacher, images = load_teacher("digits"), noise(32, 1, 8, 8)
    student = calibrated(teacher.net, images, placement=placement)
    with torch.no_grad():
        before = (student(images) - teacher.net(images)).square().mean()
        corrected = correct_moments(student, teacher.net, images)
        after = (student(images) - teacher.net(images)).square().mean()
    assert after < 0.9 * before
    norms = [name for name, module in teacher.net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(corrected) >= len(norms)
    if placement == "paper":  # where BatchNorms are still called
        for name in norms:
            torch.testing.assert_close(
                means(student, name, images), means(teacher.net, name, images), atol=1e-4, rtol=1e-4
            )


class Odd(nn.Module):
    """A layer without a bias, one that is called twice, and one for which neither holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Conv2d(1, 4, 3, bias=False)
        self.twice = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.bare(x)).relu()).relu()
        return self.out(x.mean((2, 3)))


def test_only_what_is_called_once_and_has_a_bias() -> None:
    torch.manual_seed(0)
    net, images = Odd().eval(), noise(16, 1, 8, 8)
    student = calibrated(net, images)
    assert correct_moments(student, net, images) == ["out"]
    assert torch.equal(student.get_parameter("twice.bias"), net.twice.bias)
    with torch.no_grad():
        torch.testing.assert_close(student(images).mean(0), net(images).mean(0))


def test_the_teacher_stays_and_no_hook_is_left() -> None:
    teacher, images = load_teacher("digits"), noise(8, 1, 8, 8)
    before = {key: value.clone() for key, value in teacher.net.state_dict().items()}
    student = calibrated(teacher.net, images)
    correct_moments(student, teacher.net, images)
    assert all(torch.equal(before[key], value) for key, value in teacher.net.state_dict().items())
    hooked = [*teacher.net.modules(), *student.modules()]
    assert not any(module._forward_hooks for module in hooked)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_spreads_become_the_teachers_too(placement: str) -> None:
    teacher, images = load_teacher("digits"), noise(64, 1, 8, 8)
    gaps = []
    for also in (False, True):
        student = calibrated(teacher.net, images, placement=placement)
        correct_moments(student, teacher.net, images, spreads=also)
        with torch.no_grad():
            gaps.append(float((student(images) - teacher.net(images)).square().mean()))
    assert gaps[1] < gaps[0]
    if placement == "paper":
        for name, module in teacher.net.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                ours, theirs = spreads(student, name, images), spreads(teacher.net, name, images)
                ratio = torch.where(theirs > 1e-3, ours / theirs, 1.0)
                assert ((ratio - 1).abs() < 1e-3).float().mean() > 0.9  # all but those at the ends of the allowed ratio


def test_a_folded_norm_on_a_fixed_grid_keeps_its_factor() -> None:
    teacher, images = load_teacher("digits"), noise(32, 1, 8, 8)
    student, _ = quantize(teacher.net, QuantSpec(4, 4, placement="deploy", weight=MseRange))
    student.eval()
    with torch.no_grad():
        student(images)
    freeze_ranges(student)
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.weight.clone() for m in norms]
    correct_moments(student, teacher.net, images, spreads=True)
    assert norms and all(torch.equal(a, m.weight) for a, m in zip(before, norms, strict=True))
    assert any(float(m.bias.detach().abs().sum()) > 0 for m in norms)


def test_a_channel_that_is_constant_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    with torch.no_grad():
        net.get_parameter("1.weight")[1] = 0.0
    images = noise(16, 1, 8, 8)
    student = calibrated(net, images)
    correct_moments(student, net, images, spreads=True)
    assert student.get_parameter("1.weight")[1] == 0 and all(p.isfinite().all() for p in student.parameters())
