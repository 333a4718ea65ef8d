"""Loss terms: published golden values, float64 formulas, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.losses import bn_gap, cross_entropy, kl
from zsq.view import Moments, channel_moments

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gdfq.json").read_text(encoding="utf-8"))


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    return (5 * k.sin()).to(dtype), (5 * (1.3 * k).cos()).to(dtype)


def norm(x: Tensor, mean: Tensor, var: Tensor) -> Moments:
    return Moments(*channel_moments(x), mean, var)


# ---- golden values


def test_kl_golden() -> None:
    assert float(kl(*logits())) == pytest.approx(GOLDEN["kl"], rel=1e-6)
    # The published number was measured in float32; float64 tells which formula it is.
    s, t = logits(torch.float64)
    p, q = (t / 20).softmax(1), (s / 20).softmax(1)
    assert float(kl(s, t)) == pytest.approx(float(400 * (p * (p / q).log()).mean()), rel=1e-12)
    assert float(kl(s, t)) == pytest.approx(GOLDEN["kl"], rel=1e-6)


def test_cross_entropy_golden() -> None:
    labels = torch.tensor(GOLDEN["labels"])
    assert float(cross_entropy(logits()[0], labels)) == pytest.approx(GOLDEN["cross_entropy"], rel=1e-6)
    soft = torch.nn.functional.one_hot(labels, 4).float()
    assert float(cross_entropy(logits()[0], soft)) == pytest.approx(GOLDEN["cross_entropy"], rel=1e-6)


def test_bn_gap_golden() -> None:
    x = torch.arange(24, dtype=torch.float32).sin().reshape(2, 3, 2, 2)
    layer = norm(x, torch.tensor(GOLDEN["running_mean"]), torch.tensor(GOLDEN["running_var"]))
    assert float(bn_gap([layer])) == pytest.approx(GOLDEN["bn_gap"], rel=1e-6)


# ---- kl


def test_batchmean_is_classes_times_mean() -> None:
    s, t = logits()
    assert float(kl(s, t, reduction="batchmean")) == pytest.approx(4 * float(kl(s, t)), rel=1e-6)


def test_kl_of_dense_logits_averages_over_positions() -> None:
    s, t = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (s, t)]
    for reduction in ("mean", "batchmean"):
        assert float(kl(s, t, reduction=reduction)) == pytest.approx(float(kl(*rows, reduction=reduction)), rel=1e-5)


def test_kl_gradient_goes_to_the_student_only() -> None:
    s, t = (x.requires_grad_() for x in logits(torch.float64))
    kl(s, t, temperature=2.0).backward()
    expected = 2.0 * ((s / 2).softmax(1) - (t / 2).softmax(1)).detach() / 12
    torch.testing.assert_close(s.grad, expected)
    assert t.grad is None


def test_half_precision_logits_are_widened() -> None:
    s, t = logits(torch.bfloat16)
    assert kl(s, t).dtype == cross_entropy(s, torch.tensor([0, 1, 2])).dtype == torch.float32
    assert float(kl(s, t)) == float(kl(s.float(), t.float()))


def test_kl_refuses() -> None:
    s, t = logits()
    with pytest.raises(BadInput, match=r"\[3, 4\] and \[3, 3\]"):
        kl(s, t[:, :3])
    with pytest.raises(BadInput, match="logits of one shape"):
        kl(s[0], t[0])
    with pytest.raises(BadInput, match="temperature"):
        kl(s, t, temperature=0)
    with pytest.raises(BadInput, match="batchmean"):
        kl(s, t, reduction="sum")  # type: ignore[arg-type]


# ---- cross entropy


def test_soft_targets() -> None:
    s = logits(torch.float64)[0]
    soft = torch.tensor([[0.3, 0.7, 0, 0], [0, 0, 0, 1.0], [0.25] * 4])
    expected = -(soft.double() * s.log_softmax(1)).sum(1).mean()
    assert float(cross_entropy(s, soft)) == pytest.approx(float(expected), rel=1e-9)


def test_dense_labels() -> None:
    s, y = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    expected = cross_entropy(s.movedim(1, -1).reshape(-1, 5), y.flatten())
    assert float(cross_entropy(s, y)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 4, dtype=torch.int64)],
)
def test_cross_entropy_refuses(labels: Tensor) -> None:
    with pytest.raises(BadInput, match="Match labels and logits"):
        cross_entropy(logits()[0], labels)


def test_cross_entropy_refuses_one_dimension() -> None:
    with pytest.raises(BadInput, match="cross_entropy"):
        cross_entropy(torch.zeros(3), torch.zeros(3))


# ---- bn_gap


def test_bn_gap_weighs_layers_and_not_channels() -> None:
    layers, expected = [], torch.zeros((), dtype=torch.float64)
    for channels in (2, 7, 16):
        x = torch.randn(6, channels, 3, 3, dtype=torch.float64)
        mean, var = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64)
        layers.append(norm(x, mean, var))
        seen = x.movedim(1, 0).flatten(1)
        expected += (seen.mean(1) - mean).square().mean() + (seen.var(1, correction=0) - var).square().mean()
    assert float(bn_gap(layers)) == pytest.approx(float(expected / 3), rel=1e-9)


def test_bn_gap_can_be_used_for_training_after_inference_mode() -> None:
    x = torch.randn(4, 11, 3, 3)
    with torch.inference_mode():
        bn_gap([norm(x, torch.zeros(11), torch.ones(11))])
    x.requires_grad_()
    bn_gap([norm(x, torch.zeros(11), torch.ones(11))]).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_bn_gap_refuses_a_network_without_norms() -> None:
    with pytest.raises(BadInput, match="BatchNorm"):
        bn_gap([])
