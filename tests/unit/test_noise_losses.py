"""Losses of optimised images: golden values by hand, float64 oracles, safe gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zsq import losses
from zsq.errors import BadInput


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_logits(*probabilities: float) -> Tensor:
    """Logits of two classes with these probabilities of the first."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], 1)


FIRST = torch.tensor([0, 0])


# ---- hard samples


def test_hard_sample_by_hand() -> None:
    logits = two_logits(0.5, 0.9)
    expected = (0.25 * math.log(2) - 0.01 * math.log(0.9)) / 2
    assert losses.hard_sample(logits, FIRST, gamma=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_without_exponent_it_is_cross_entropy() -> None:
    logits, labels = torch.randn(7, 5, generator=rng()), torch.randint(5, (7,), generator=rng(1))
    assert torch.allclose(losses.hard_sample(logits, labels, gamma=0.0), losses.cross_entropy(logits, labels))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradient_is_finite_and_right(gamma: float) -> None:
    logits = two_logits(0.3, 0.8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.hard_sample(x, FIRST, gamma=gamma), (logits,))
    sure = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    losses.hard_sample(sure, FIRST, gamma=gamma).backward()
    assert sure.grad is not None and sure.grad.isfinite().all() and sure.grad[0].abs().sum() < 1e-6 < sure.grad[1, 1]


def test_the_released_form_is_not_finite_there() -> None:
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    p = sure.softmax(1)[:, 0]
    ((1 - p) ** 0.5 * -p.log()).mean().backward()
    assert sure.grad is not None and sure.grad.isnan().any()


def test_difficulty_by_hand() -> None:
    assert losses.difficulty(two_logits(0.5, 0.9), FIRST).item() == pytest.approx(0.3, rel=1e-9)


# ---- inception


def test_inception_by_hand() -> None:
    targets = torch.tensor([1.0, 0.8], dtype=torch.float64)
    found = losses.inception(two_logits(0.5, 0.9), FIRST, targets)
    assert found.item() == pytest.approx((0.25 + 0.01) / 2, rel=1e-9)


def test_images_without_labels_are_refused() -> None:
    for loss in (
        lambda x: losses.hard_sample(x, None, gamma=1.0),
        lambda x: losses.difficulty(x, None),
        lambda x: losses.inception(x, None, torch.ones(2)),
    ):
        with pytest.raises(BadInput, match="expected a label per image"):
            loss(torch.zeros(2, 3))


# ---- class centres


def test_margins_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # cosine distances 0, 1 and 2 to the centre
    centres = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    known, zeros = torch.tensor([True, False]), torch.zeros(3, dtype=torch.int64)
    found = losses.marginal_distance(features, zeros, centres, known, low=0.05, high=0.8)
    assert found.item() == pytest.approx((0.05 + 0.2 + 1.2) / 3, rel=1e-5)
    assert losses.marginal_distance(features, zeros, centres, known, low=0.0, high=2.0).item() == pytest.approx(
        0, abs=1e-6
    )
    assert losses.marginal_distance(features, zeros + 1, centres, known, low=0.05, high=0.8).item() == 0


def test_unknown_classes_count_nothing() -> None:
    features = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    centres, known = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([True, False])
    found = losses.marginal_distance(features, torch.tensor([0, 1]), centres, known, low=0.0, high=0.8)
    assert found.item() == pytest.approx(0.2, rel=1e-5)


# ---- statistics of single images


def test_statistics_gap_is_the_released_loop() -> None:
    layers = []
    expected = torch.zeros((), dtype=torch.float64)
    for layer, channels in enumerate((3, 5)):
        x = torch.randn(4, channels, 6, 6, generator=rng(layer), dtype=torch.float64)
        mean, std = torch.randn(channels, generator=rng(9)).double(), torch.rand(channels, generator=rng(8)).double()
        layers.append((x, mean, std))
        for image in x:
            flat = image.reshape(channels, -1)
            spread = (((flat - flat.mean(1, keepdim=True)) ** 2).sum(1) / 35 + 1e-6).sqrt()
            expected += (((mean - flat.mean(1)) ** 2).sum() + ((std - spread) ** 2).sum()) / 4
    assert torch.allclose(losses.statistics_gap(layers), expected, rtol=1e-12)


def test_statistics_gap_needs_positions() -> None:
    with pytest.raises(BadInput, match="BatchNorm"):
        losses.statistics_gap([(torch.zeros(2, 3), torch.zeros(3), torch.ones(3))])


# ---- attention


def test_attention_by_hand() -> None:
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    student[0, 0], teacher[0, 1] = 3.0, 2.0  # attention (1, 0) and (0, 1)
    assert losses.attention_gap([student], [teacher]).item() == pytest.approx(1.0)
    assert losses.attention_gap([student, student], [teacher, student]).item() == pytest.approx(1.0)


def test_attention_is_a_float64_oracle() -> None:
    s, t = (torch.randn(3, 4, 5, 5, generator=rng(i)) for i in (0, 1))
    expected = 0.0
    for n in range(3):
        a = [(z[n].double() ** 2).mean((1, 2)) for z in (s, t)]
        expected += sum(((a[0] / a[0].norm() - a[1] / a[1].norm()) ** 2).tolist()) / 12
    assert losses.attention_gap([s], [t]).item() == pytest.approx(expected, rel=1e-5)
    x = t.clone().requires_grad_()
    losses.attention_gap([s], [x]).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0  # the teacher is not detached


def test_kl_through_the_teacher() -> None:
    s, t = torch.randn(3, 4, generator=rng()), torch.randn(3, 4, generator=rng(1)).requires_grad_()
    plain = losses.kl(s, t, reduction="batchmean")
    through = losses.kl(s, t, reduction="batchmean", through_teacher=True)
    assert torch.equal(plain, through) and not plain.requires_grad
    (found,) = torch.autograd.grad(through, t)
    p, q = F.softmax(t / 20, 1), F.softmax(s / 20, 1)
    (expected,) = torch.autograd.grad(400 * (p * (p / q).log()).sum() / 3, t)
    assert torch.allclose(found, expected, atol=1e-5)
