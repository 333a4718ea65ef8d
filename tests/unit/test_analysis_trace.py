"""The Hessian trace against dense Hessians in float64, probe by probe, and its statistics."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from zsq import losses
from zsq.analysis import probes
from zsq.analysis.probes import Estimate, gauss_newton, hutchinson, rademacher
from zsq.analysis.straight import bend
from zsq.analysis.subject import open_subject
from zsq.analysis.trace import trace
from zsq.errors import BadInput
from zsq.grid import decode, encode
from zsq.insert import QuantSpec, activation_quantizers, quantize, quantized_weights


def small_net() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    return net.double().eval().requires_grad_(False)


def weights_only(net: nn.Module) -> nn.Module:
    """A student whose activations stay float."""
    student, _ = quantize(net)
    for quantizer in activation_quantizers(student).values():
        quantizer.__dict__["forward"] = nn.Identity().forward
    return student.double().eval()


def dense_hessian(
    net: nn.Module, values: dict[str, Tensor], x: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> Tensor:
    names, sizes = list(values), [v.numel() for v in values.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        given = {name: part.reshape(values[name].shape) for name, part in parts}
        return loss_of(functional_call(net, given, (x,)))

    start = torch.cat([v.flatten() for v in values.values()])
    return torch.autograd.functional.hessian(loss, start)


def dequantized(student: nn.Module) -> dict[str, Tensor]:
    weights = quantized_weights(student)
    return {f"{w.name}.weight": decode(encode(w.parameter.detach(), w.grid()), w.grid()) for w in weights}


def test_probe_by_probe_the_hessian_at_the_dequantized_weights() -> None:
    net = small_net()
    student = weights_only(net)
    x, y = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = quantized_weights(student)
    parameters = [w.parameter for w in weights]
    at = dequantized(student)
    hessian = dense_hessian(copy.deepcopy(net), at, x, lambda z: F.cross_entropy(z, y))

    def batch() -> dict[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(student(x), y)}

    found = hutchinson(parameters, [(1.0, batch)], probes=12, seed=5)["ce"]
    signs = [torch.cat([s.flatten() for s in rademacher(parameters, 5, i)]) for i in range(12)]
    want = [float(v @ hessian @ v) for v in signs]
    assert found.samples == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert sum(found.layers) == pytest.approx(found.mean, rel=1e-9)
    assert found.loss == pytest.approx(float(batch()["ce"].detach()))
    # the float weights have another Hessian: the check above can fail
    there = dense_hessian(net, {k: net.get_parameter(k) for k in at}, x, lambda z: F.cross_entropy(z, y))
    assert abs(float(torch.trace(there)) / float(torch.trace(hessian)) - 1) > 1e-3


def test_mean_and_standard_error() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix = root @ root.T
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    found = hutchinson([w], [(1.0, lambda: {"q": w @ matrix @ w / 2})], probes=400)["q"]
    spread = math.sqrt(2 * float(matrix.square().sum() - matrix.diag().square().sum()) / 400)
    assert found.stderr == pytest.approx(spread, rel=0.15)
    assert abs(found.mean - float(matrix.trace())) < 4 * spread


def test_batches_count_by_their_share() -> None:
    student = weights_only(small_net())
    x, y = torch.randn(5, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    parameters = [w.parameter for w in quantized_weights(student)]

    def part(a: int, b: int) -> dict[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(student(x[a:b]), y[a:b])}

    whole = hutchinson(parameters, [(1.0, lambda: part(0, 5))], probes=3)["ce"]
    split = hutchinson(parameters, [(0.6, lambda: part(0, 3)), (0.4, lambda: part(3, 5))], probes=3)["ce"]
    assert split.samples == pytest.approx(whole.samples, rel=1e-9) and split.loss == pytest.approx(whole.loss)


def test_stops_when_good_enough() -> None:
    w = torch.ones(4, requires_grad=True)
    losses = {"even": lambda: (w**2).sum(), "odd": lambda: (w.sum()) ** 2}
    ticks: list[int] = []
    found = hutchinson([w], [(1.0, lambda: {"even": losses["even"]()})], probes=50, tolerance=0.05, tick=ticks.append)
    assert len(found["even"].samples) == 10 and found["even"].mean == 8.0 and ticks == [10]
    both = hutchinson([w], [(1.0, lambda: {k: f() for k, f in losses.items()})], probes=25, tolerance=0.05)
    assert [len(e.samples) for e in both.values()] == [25, 25]  # the same probes for all


def test_a_linear_loss_and_few_probes() -> None:
    w = torch.ones(3, requires_grad=True)
    assert hutchinson([w], [(1.0, lambda: {"sum": w.sum()})], probes=2)["sum"].samples == [0.0, 0.0]
    assert (
        Estimate(1.0, [2.0], [2.0]).stderr == math.inf
        and Estimate(0.0, [1.0], [1.0]).to_json()["trace_over_loss"] is None
    )
    with pytest.raises(BadInput, match="--probes: expected at least 1, got 0"):
        hutchinson([w], [], probes=0)


TEMPERATURES = {"ce": 1.0, "kl": 4.0, "kl_t1": 1.0}


def test_without_second_derivatives_the_same_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sign patterns of three classes once, images apart: the exact expectation, not an estimate of it."""
    net = small_net()
    student = weights_only(net)
    assert bend(student) is None
    x, target = torch.randn(6, 1, 5, 5, dtype=torch.float64), 3 * torch.randn(6, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    monkeypatch.setattr(probes, "_signs", lambda logits, seed, i, group: patterns[i].expand_as(logits))
    weights = quantized_weights(student)
    parameters = [w.parameter for w in weights]
    groups = [lambda i=i: student(x[i : i + 1]) for i in range(6)]
    found = gauss_newton(parameters, groups, TEMPERATURES, dict.fromkeys(TEMPERATURES, 1.0), probes=8)
    wanted: dict[str, Callable[[Tensor], Tensor]] = {
        "ce": lambda z: F.cross_entropy(z, y),
        "kl": lambda z: losses.kl(z, target, temperature=4.0, reduction="batchmean"),
        "kl_t1": lambda z: losses.kl(z, target, temperature=1.0, reduction="batchmean"),
    }
    sizes = [p.numel() for p in parameters]
    for name, loss_of in wanted.items():
        hessian = dense_hessian(copy.deepcopy(net), dequantized(student), x, loss_of)
        blocks = [float(part.sum()) for part in hessian.diag().split(sizes)]
        assert found[name].layers == pytest.approx(blocks, rel=1e-9, abs=1e-12), name
        assert found[name].mean == pytest.approx(sum(blocks), rel=1e-9)
    assert found["ce"].samples == found["kl_t1"].samples != found["kl"].samples


def test_groups_of_images_are_unbiased_and_small_ones_less_noisy() -> None:
    student = weights_only(small_net())
    parameters = [w.parameter for w in quantized_weights(student)]
    x, y = torch.randn(1, 1, 5, 5) + 0.3 * torch.randn(12, 1, 5, 5, dtype=torch.float64), torch.arange(12) % 3
    plain = hutchinson(parameters, [(1.0, lambda: {"ce": F.cross_entropy(student(x), y)})], probes=400)["ce"]
    spread = []
    for size in (12, 2):
        groups = [lambda part=part: student(part) for part in x.split(size)]
        found = gauss_newton(parameters, groups, {"ce": 1.0}, {"ce": plain.loss}, probes=400, seed=1)["ce"]
        assert abs(found.mean - plain.mean) < 4 * math.hypot(found.stderr, plain.stderr)
        spread.append(found.stderr)
    assert spread[1] < spread[0] / 1.5


@pytest.mark.parametrize("classes", [10, 100])
def test_published_kl_is_small_because_of_its_mean_over_classes(classes: int) -> None:
    """The scale trap: at T = 20 the averaged KL is nearly (z - t) / C^2, and C times flatter than the batch mean."""
    z = torch.randn(4, classes, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, classes, dtype=torch.float64)
    (found,) = torch.autograd.grad(losses.kl(z, target, temperature=20.0), z)
    soft = (z.detach() / 20).softmax(1) - (target / 20).softmax(1)
    assert torch.allclose(found, 20 / (4 * classes) * soft, rtol=1e-9)
    gap = z.detach() - target
    near = (gap - gap.mean(1, keepdim=True)) / (4 * classes**2)
    assert float((found - near).norm() / near.norm()) < 0.15


def test_curvature_of_confident_logits() -> None:
    """100 classes, margin 10: T = 20 is more curved than cross entropy, and the published mean hides it."""
    z = torch.zeros(1, 100, dtype=torch.float64)
    z[0, 0] = 10
    target, label = z + torch.randn_like(z), torch.tensor([0])

    def curvature(loss_of: Callable[[Tensor], Tensor]) -> float:
        hessian: Tensor = torch.autograd.functional.hessian(loss_of, z)
        return float(hessian.reshape(100, 100).trace())

    hot = curvature(lambda x: losses.kl(x, target, temperature=20.0, reduction="batchmean"))
    published = curvature(lambda x: losses.kl(x, target, temperature=20.0))
    plain = curvature(lambda x: losses.kl(x, target, temperature=1.0, reduction="batchmean"))
    assert (hot, published) == (pytest.approx(0.99, abs=0.001), pytest.approx(0.0099, abs=1e-5))
    assert curvature(lambda x: F.cross_entropy(x, label)) == pytest.approx(plain, rel=1e-9) and plain < 0.07


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(F.relu(self.conv(x)))).mean((2, 3)))


class Gate(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.conv, self.fc, self.scale = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.fc((x * (self.scale or x.mean((2, 3), keepdim=True))).amax((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(F.relu(self.first(x))).mean((2, 3)))


def plain_net(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("net", "what"),
    [
        (plain_net(nn.ReLU()), None), (plain_net(nn.ReLU6()), None), (plain_net(nn.LeakyReLU()), None),
        (Gate(2.0), None),
        (plain_net(nn.GELU()), "gelu"), (plain_net(nn.Hardswish()), "hardswish"), (plain_net(nn.SiLU()), "silu"),
        (nn.Sequential(plain_net(nn.ReLU()), nn.Softmax(1)), "softmax"), (Gate(), "mul"),
        (Twice(), "the weight of conv, used more than once"), (Tied(), "used more than once"),
        (nn.Sequential(plain_net(nn.ReLU()), weight_norm(nn.Linear(3, 3))), "computed weight"),
    ],
)  # fmt: skip
def test_what_is_not_a_straight_line_is_named(net: nn.Module, what: str | None) -> None:
    student, _ = quantize(net, QuantSpec(placement="deploy"))
    found = bend(student)
    assert found is None if what is None else what in str(found)


def test_networks_of_the_tests_are_straight(bn_net: nn.Module, functional_net: nn.Module) -> None:
    assert bend(quantize(bn_net)[0]) is None and bend(quantize(functional_net)[0]) is None
    assert bend(nn.Sequential()) == "a network without a graph"


def test_a_bent_network_takes_second_derivatives(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(finished_run, count=16)
    straight = trace(subject, probes=60)
    monkeypatch.setattr(importlib.import_module("zsq.analysis.trace"), "bend", lambda student: "gelu (act)")
    bent = trace(subject, probes=60)
    assert (straight.method, straight.bend) == ("gauss_newton", None)
    assert (bent.method, bent.bend) == ("hutchinson", "gelu (act)")
    for kind, values in straight.arms["synthetic images"].items():
        for one, other in zip(values, bent.arms["synthetic images"][kind], strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert abs(one.mean - other.mean) < 4 * math.hypot(one.stderr, other.stderr)


def test_scalings_of_a_run(finished_run: Path) -> None:
    subject = open_subject(finished_run, count=16)
    before = {key: value.clone() for key, value in subject.student.state_dict().items()}
    result = trace(subject, probes=2)
    kinds = result.arms["synthetic images"]
    assert (
        list(kinds) == ["ce", "kl_as_trained", "kl_batchmean", "kl_t1"] and result.steps == [0, 3] and result.complete
    )
    for trained, mean in zip(kinds["kl_as_trained"], kinds["kl_batchmean"], strict=True):
        assert trained.mean == pytest.approx(mean.mean / 10) and trained.loss == pytest.approx(mean.loss / 10)
        assert trained.to_json()["trace_over_loss"] == pytest.approx(mean.to_json()["trace_over_loss"])
    assert result.sizes == [w.parameter.numel() for w in subject.weights]
    assert all(torch.equal(before[key], value) for key, value in subject.student.state_dict().items())
    assert all(w.parameter.grad is None for w in subject.weights)
    again = trace(subject, probes=2)
    assert again == result  # the same probes
