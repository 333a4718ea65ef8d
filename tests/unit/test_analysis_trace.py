"""The Hessian trace against dense Hessians in float64, probe by probe, and its statistics."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from zsq.analysis.subject import open_subject
from zsq.analysis.trace import Estimate, hutchinson, rademacher, trace
from zsq.errors import BadInput
from zsq.grid import decode, encode
from zsq.insert import activation_quantizers, quantize, quantized_weights


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


def dense_hessian(net: nn.Module, values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    names, sizes = list(values), [v.numel() for v in values.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        given = {name: part.reshape(values[name].shape) for name, part in parts}
        return nn.functional.cross_entropy(functional_call(net, given, (x,)), y)

    start = torch.cat([v.flatten() for v in values.values()])
    return torch.autograd.functional.hessian(loss, start)


def test_probe_by_probe_the_hessian_at_the_dequantized_weights() -> None:
    net = small_net()
    student = weights_only(net)
    x, y = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = quantized_weights(student)
    parameters = [w.parameter for w in weights]
    at = {f"{w.name}.weight": decode(encode(w.parameter.detach(), w.grid()), w.grid()) for w in weights}
    hessian = dense_hessian(copy.deepcopy(net), at, x, y)

    def batch() -> dict[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(student(x), y)}

    found = hutchinson(parameters, [(1.0, batch)], probes=12, seed=5)["ce"]
    signs = [torch.cat([s.flatten() for s in rademacher(parameters, 5, i)]) for i in range(12)]
    want = [float(v @ hessian @ v) for v in signs]
    assert found.samples == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert sum(found.layers) == pytest.approx(found.mean, rel=1e-9)
    assert found.loss == pytest.approx(float(batch()["ce"].detach()))
    # the float weights have another Hessian: the check above can fail
    there = dense_hessian(net, {k: net.get_parameter(k) for k in at}, x, y)
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
