"""ZAQ's discrepancies against the formulas, computed entry by entry in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zsq.discrepancy import channel_relations, excitation, feature_gap, output_gap, relation_gap, stage_gap, task_gap
from zsq.errors import BadInput
from zsq.tasks import Classify, Detect, Part, Segment


def features(*shape: int, seed: int = 0) -> Tensor:
    """What stands behind a ReLU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()


def relations_by_hand(z: Tensor) -> Tensor:
    z = z.double().flatten(2)
    found = torch.zeros(len(z), z.shape[1], z.shape[1], dtype=torch.float64)
    for n, i, j in torch.cartesian_prod(*(torch.arange(k) for k in found.shape)).tolist():
        norms = z[n, i].square().sum().sqrt() * z[n, j].square().sum().sqrt()
        found[n, i, j] = (z[n, i] * z[n, j]).sum() / norms if norms > 0 else 0
    return found


def released_by_hand(a: Tensor, b: Tensor) -> Tensor:
    """The released program's attention on features normalised over channels, in float64."""
    outputs = []
    for z in (a, b):
        x = (z.double() / z.double().square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)).flatten(2)
        by_position = torch.softmax(x.mT @ x, dim=-1)
        gram = x @ x.mT
        by_channel = torch.softmax(gram.amax(-1, keepdim=True) - gram, dim=-1)
        outputs.append((x + 0.1 * (x @ by_position.mT), x + 0.1 * (by_channel @ x)))
    return sum((p - q).abs().mean() for p, q in zip(*outputs, strict=True))  # type: ignore[return-value]


def test_output_gap_is_the_mean_absolute_difference() -> None:
    p, q = features(4, 10), features(4, 10, seed=1)
    by_hand = sum(abs(float(p[i, k]) - float(q[i, k])) for i in range(4) for k in range(10)) / 40
    assert float(output_gap(q, p)) == pytest.approx(by_hand, abs=1e-6)
    dense = torch.ones(2, 3, 4, 4)
    assert float(output_gap(dense, 3 * dense)) == 2


def test_relations_are_cosines_between_channels() -> None:
    z = features(2, 5, 3, 4)
    z[1, 2] = 0  # a dead channel
    assert torch.allclose(channel_relations(z).double(), relations_by_hand(z), atol=1e-6)
    assert channel_relations(z)[1, 2].abs().max() == 0


def test_relation_gap_by_hand() -> None:
    p, q = features(3, 5, 4, 4), features(3, 5, 4, 4, seed=1)
    by_hand = (relations_by_hand(p) - relations_by_hand(q)).abs().sum((1, 2)) / 25
    assert torch.allclose(relation_gap(q, p).double(), by_hand, atol=1e-6)


@given(seed=st.integers(0, 1000), channels=st.integers(1, 7))
def test_relations_do_not_feel_the_scale_of_a_channel(seed: int, channels: int) -> None:
    p, q = features(2, channels, 3, 3, seed=seed), torch.randn(2, channels, 3, 3) - 0.5
    factors = torch.rand(2, channels, 1, 1) * 10 + 0.1
    gap = relation_gap(q, p)
    assert torch.allclose(gap, relation_gap(q, factors * p), atol=1e-5)
    assert gap.min() >= 0 and gap.max() <= 2 + 1e-5


@pytest.mark.parametrize("gap", [relation_gap, feature_gap])
def test_dead_channels_and_positions_do_not_own_the_gradient(gap: Callable[[Tensor, Tensor], Tensor]) -> None:
    z = features(2, 4, 3, 3)
    z[:, 1], z[:, :, 2] = 0, 0  # 0/0, and a slope of one over epsilon, in the naive form
    z.requires_grad_()
    gap(z, features(2, 4, 3, 3, seed=1)).sum().backward()
    assert z.grad is not None and 0 < z.grad.abs().max() < 10


def test_feature_gap_is_the_released_loss_without_its_maps() -> None:
    p = features(4, 16, 8, 8)
    q = (p + 0.15 * features(4, 16, 8, 8, seed=1) - 0.05).relu()
    a, b = (z.double() / z.double().square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) for z in (p, q))
    assert float(feature_gap(q, p).mean()) == pytest.approx(float(2 * (a - b).abs().mean()), rel=1e-5)
    assert float(feature_gap(q, p).mean()) == pytest.approx(float(released_by_hand(p, q)), rel=0.03)


def test_stage_weights() -> None:
    p = [features(3, 4, 4, 4), features(3, 8, 2, 2, seed=1)]
    q = [features(3, 4, 4, 4, seed=2), features(3, 8, 2, 2, seed=3)]
    gaps = torch.stack([relation_gap(s, t).double() for s, t in zip(q, p, strict=True)], dim=1)
    by_hand = {
        "uniform": gaps.sum(1).mean(),
        "adaptive": (2 * gaps / gaps.sum(1, keepdim=True) * gaps).sum(1).mean(),
        "softmax": (2 * (gaps / 0.1).softmax(1) * gaps).sum(1).mean(),
    }
    for weighting, expected in by_hand.items():
        assert float(stage_gap(q, p, weighting=weighting)) == pytest.approx(float(expected), rel=1e-5)  # type: ignore[arg-type]
    assert float(stage_gap(p, p)) < 1e-6


def test_the_weights_carry_no_gradient_and_split_with_the_batch() -> None:
    p, q = features(4, 4, 4, 4), features(4, 4, 4, 4, seed=2)
    a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
    stage_gap([a], [p]).backward()  # one stage: its weight is 1 whatever the gap, if that is detached
    stage_gap([b], [p], weighting="uniform").backward()
    assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad)
    whole = stage_gap([q, p], [p, q.flip(1)])
    halves = [stage_gap([q[cut], p[cut]], [p[cut], q.flip(1)[cut]]) for cut in (slice(2), slice(2, 4))]
    assert float(whole) == pytest.approx(float(sum(halves)) / 2, rel=1e-6)


def test_excitation_rewards_large_features() -> None:
    z = features(2, 3, 4, 4)
    assert float(excitation(z)) == pytest.approx(-float(z.double().abs().mean()), rel=1e-6)
    assert excitation(2 * z) < excitation(z)


DETECT = Detect(3, (Part("objectness", 1, "sigmoid"), Part("box", 4), Part("class", 3, "softmax")))


def test_the_gap_of_a_detector_by_hand() -> None:
    p, q = (torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    by_hand = torch.zeros(2, dtype=torch.float64)
    for n in range(2):
        t, s = p[n].double().flatten(1), q[n].double().flatten(1)  # [8, 12]
        weight = t[0].sigmoid() + 0.05
        weight = weight / weight.mean()
        by_hand[n] += (s[0] - t[0]).abs().mean() / t[0].abs().mean()
        d = (s[1:5] - t[1:5]).abs()
        smooth = torch.where(d < 1, 0.5 * d * d, d - 0.5).mean(0)
        by_hand[n] += (smooth * weight).mean() / t[1:5].abs().mean()
        by_hand[n] += ((s[5:] - t[5:]).abs().mean(0) * weight).mean() / t[5:].abs().mean()
    assert float(task_gap(q, p, task=DETECT)) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    halves = [float(task_gap(q[cut], p[cut], task=DETECT)) for cut in (slice(1), slice(1, 2))]
    assert sum(halves) / 2 == pytest.approx(float(by_hand.mean()), rel=1e-5)


def test_one_part_is_compared_as_it_is() -> None:
    p, q = features(2, 5, 3, 3), features(2, 5, 3, 3, seed=1)
    assert torch.equal(task_gap(q, p, task=Segment(5)), output_gap(q, p))
    assert torch.equal(task_gap(q[:, :, 0, 0], p[:, :, 0, 0], task=Classify(5)), output_gap(q[..., 0, 0], p[..., 0, 0]))


def test_the_gap_reaches_the_image_through_the_teacher_too() -> None:
    p, q = torch.randn(2, 8, 3, 3).requires_grad_(), torch.randn(2, 8, 3, 3).requires_grad_()
    task_gap(q, p, task=DETECT).backward()
    assert p.grad is not None and q.grad is not None
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in (p.grad, q.grad))


def test_what_is_refused() -> None:
    z = features(2, 3, 4, 4)
    with pytest.raises(BadInput, match=r"outputs of one shape, got \[2, 3\] and \[2, 4\]"):
        output_gap(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(BadInput, match="crm or feature_l1, got 'gram'"):
        stage_gap([z], [z], form="gram")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="adaptive, uniform or softmax, got 'none'"):
        stage_gap([z], [z], weighting="none")  # type: ignore[arg-type]
