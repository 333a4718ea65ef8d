"""Images moved to where student and teacher differ more: how far, which way, and that nothing else moves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_teacher
from zsq.insert import QuantSpec, freeze_ranges, quantize
from zsq.sources.harder import HarderSource
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher


def low_bit(teacher: Teacher) -> nn.Module:
    student, _ = quantize(teacher.net, QuantSpec(weight_bits=3, act_bits=3))
    student.eval()
    with torch.no_grad():
        student(pixels(64))
    freeze_ranges(student)
    return student


def pixels(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def gap_of(teacher: Teacher, student: Tensor, of: Tensor) -> Tensor:
    return teacher.outputs.kl(student, of, temperature=4.0, through_teacher=True)


def source(teacher: Teacher, student: nn.Module, *, epsilon: float, precision: str = "float32") -> HarderSource:
    plain = PoolSource(pixels(64), torch.arange(64) % 10, name="plain", batch=32)
    gap = partial(gap_of, teacher)
    return HarderSource(plain, teacher, student, gap, epsilon=epsilon, precision=precision)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_image_moves_by_its_own_share_of_epsilon(precision: str) -> None:
    teacher = tiny_teacher()
    made = source(teacher, low_bit(teacher), epsilon=0.3, precision=precision)
    plain, moved = made._source.draw(rng()), made.draw(rng())
    assert plain.labels is not None and moved.labels is not None and torch.equal(plain.labels, moved.labels)
    change = (moved.images - plain.images).abs().flatten(1)
    longest = change.amax(1)
    still = change < 1e-6  # where the gradient is exactly zero
    assert torch.allclose(torch.where(still, longest[:, None], change), longest[:, None], atol=1e-6)
    assert longest.max() <= 0.3 + 1e-6 and longest.unique().numel() > 16 and longest.std() > 0.05


def test_the_gap_grows() -> None:
    teacher = tiny_teacher()
    student = low_bit(teacher)

    def gap(images: Tensor) -> float:
        with torch.no_grad():
            return float(gap_of(teacher, student(images), teacher.net(images)))

    made = source(teacher, student, epsilon=0.2)
    plain, moved = made._source.draw(rng()).images, made.draw(rng()).images
    way = torch.where(torch.rand(plain.shape, generator=rng()) < 0.5, -1, 1)
    random, downhill = plain + way * (moved - plain).abs(), 2 * plain - moved
    assert gap(moved) > 1.05 * max(gap(plain), gap(random)) and gap(downhill) < gap(plain)


def test_without_length_nothing_moves() -> None:
    teacher = tiny_teacher()
    made = source(teacher, low_bit(teacher), epsilon=0.0)
    assert torch.equal(made.draw(rng()).images, made._source.draw(rng()).images)


def test_neither_network_is_touched() -> None:
    teacher = tiny_teacher()
    student = low_bit(teacher)
    before = [p.detach().clone() for net in (teacher.net, student) for p in net.parameters()]
    source(teacher, student, epsilon=0.3).draw(rng())
    after = [p for net in (teacher.net, student) for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after) and any(p.requires_grad for p in student.parameters())


def test_held_out_images_stay_as_they_are() -> None:
    teacher = tiny_teacher()
    made = source(teacher, low_bit(teacher), epsilon=0.3)
    assert torch.equal(made.sample(8, rng()).images, made._source.sample(8, rng()).images)
