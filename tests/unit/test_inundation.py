"""Gradient inundation: golden values of the published search, any optimizer, schedules, what must stay untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from zsq.errors import BadInput
from zsq.grid import Grid, affine_grid, symmetric_grid
from zsq.inundation import GradientInundation, flip_count

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "inundation.json").read_text(encoding="utf-8"))
SHAPES = [(8, 4, 3, 3), (16, 9), (6, 5)]


class Weight:
    """Per-channel minimum and maximum of the values themselves."""

    def __init__(self, parameter: nn.Parameter, bits: int = 4) -> None:
        self.parameter, self.bits = parameter, bits

    def grid(self, values: Tensor | None = None) -> Grid:
        values = (self.parameter if values is None else values).detach()
        dims = tuple(range(1, values.dim()))
        return affine_grid(values.amin(dims, keepdim=True), values.amax(dims, keepdim=True), self.bits)


def codes(values: Tensor, grid: Grid) -> Tensor:
    return (values * grid.inv_step - grid.zero).round().clamp(grid.qmin, grid.qmax)


def parameters(shapes: list[tuple[int, ...]] = SHAPES, seed: int = 1) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng) * 0.1) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng) * 1e-2


# ---- published values


@pytest.mark.parametrize("case", GOLDEN["search"]["cases"])
def test_search_gives_the_published_factors(case: dict[str, Any]) -> None:
    index = torch.arange(216, dtype=torch.float64).view(4, 6, 3, 3)
    weight = nn.Parameter((torch.sin(1 + 0.7 * index) / 10).float())
    sgd = optim.SGD([weight], lr=1e-4, momentum=0.9, nesterov=True)
    inundation = GradientInundation(sgd, [Weight(weight)], flip_rate=case["flip_rate"], mode="search", cap=case["cap"])
    for step in (0, 1):
        weight.grad = (torch.cos(3 + 1.1 * index + step) * 1e-2).float()
        sgd.step()
        assert inundation.factors.tolist() == [case["factors"][step]]
        if case["sums"][step] is not None:
            assert weight.double().sum().item() == pytest.approx(case["sums"][step], abs=5e-8)


@pytest.mark.parametrize("case", GOLDEN["counts"]["cases"])
def test_counts_of_a_resnet20(case: dict[str, Any]) -> None:
    sizes = [432] + [2304] * 6 + [4608] + [9216] * 5 + [18432] + [36864] * 5 + [640, 512, 2048]
    counts = [flip_count(case["flip_rate"], size) for size in sizes]
    assert (sum(counts), counts.count(1)) == (case["sum"], case["ones"])


@pytest.mark.parametrize(
    ("flip_rate", "size", "count"), [(1e-3 * 0.1**2, 1_000_000, 10), (1.0, 7, 7), (1e-9, 7, 1), (0.5, 3, 2)]
)
def test_flip_count(flip_rate: float, size: int, count: int) -> None:
    assert flip_count(flip_rate, size) == count


def test_exact_agrees_with_the_search_on_gaussian_weights() -> None:
    ratios = []
    for seed in range(24):
        factors = {}
        for mode in ("exact", "search"):
            params = parameters([(16, 16, 3, 3)], seed)
            set_gradients(params, seed + 100)
            sgd = optim.SGD(params, lr=1e-5)
            inundation = GradientInundation(sgd, [Weight(params[0])], flip_rate=3e-3, mode=mode, search_steps=12)
            sgd.step()
            factors[mode] = inundation.factors.item()
        ratios.append(factors["search"] / factors["exact"])
    assert 0.9 < torch.tensor(ratios).median() < 1.1
    assert min(factors.values()) > 1


# ---- any optimizer: a factor of one is the plain step, and state never sees a factor


class _Subclass(optim.Adam):
    pass


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd nesterov decay": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd maximize dampening": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, maximize=True),
    "sgd foreach": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd fused": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": partial(optim.Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adam tensor lr": partial(optim.Adam, lr=torch.tensor(1e-2)),
    "adam fused": partial(optim.Adam, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw": partial(optim.AdamW, lr=1e-2, weight_decay=0.5),
    "adamw foreach": partial(optim.AdamW, lr=1e-2, weight_decay=0.5, foreach=True),
    "adamw fused": partial(optim.AdamW, lr=1e-2, weight_decay=0.5, fused=True),
    "nadam decoupled": partial(optim.NAdam, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": partial(optim.RAdam, lr=1e-2, weight_decay=0.1),
    "adamax": partial(optim.Adamax, lr=1e-2, weight_decay=0.1),
    "rmsprop": partial(optim.RMSprop, lr=1e-2, weight_decay=0.1, momentum=0.9, centered=True),
    "adagrad": partial(optim.Adagrad, lr=1e-2, weight_decay=0.1),
    "adadelta": partial(optim.Adadelta, weight_decay=0.1),
    "rprop": partial(optim.Rprop, lr=1e-2),
    "by difference": partial(optim.ASGD, lr=1e-2, weight_decay=0.1),
    "subclass": partial(_Subclass, lr=1e-2, weight_decay=0.1),
}


def tensors(state: dict[str, Any]) -> dict[tuple[int, str], Tensor]:
    return {(index, key): value for index, each in state["state"].items() for key, value in each.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["exact", "search"])
def test_a_factor_of_one_is_the_plain_step(name: str, mode: Any) -> None:
    plain, ours = parameters(), parameters()
    plain_optimizer, optimizer = OPTIMIZERS[name](plain), OPTIMIZERS[name](ours)
    inundation = GradientInundation(optimizer, [Weight(p) for p in ours[:2]], flip_rate=1e-9, mode=mode)
    for seed in range(4):
        set_gradients(plain, seed)
        set_gradients(ours, seed)
        for param in [*plain, *ours]:
            param.grad.add_(torch.sign(param.grad))  # large enough to change a code in any case
        gradients = [p.grad for p in ours]
        before = [g.clone() for g in gradients]
        plain_optimizer.step()
        optimizer.step()
        assert inundation.factors.tolist() == [1.0, 1.0]
        assert all(p.grad is g and torch.equal(g, b) for p, g, b in zip(ours, gradients, before, strict=True))
        for one, other in zip(plain, ours, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-7)
    assert torch.equal(plain[2], ours[2])  # not inundated: bit for bit


@pytest.mark.parametrize("name", ["sgd nesterov decay", "adam", "adamw", "adamw fused", "rmsprop", "by difference"])
def test_tiny_learning_rates_inundate_exactly(name: str) -> None:
    # 1e-9 is far below half a unit in the last place of the weights: the plain step moves (almost) nothing.
    params = parameters([(16, 16, 3, 3), (16, 9)])
    optimizer = OPTIMIZERS[name](params)
    optimizer.param_groups[0]["lr"] = 1e-9 if name != "by difference" else 1e-4
    optimizer.param_groups[0]["weight_decay"] = 0.01
    weights = [Weight(p) for p in params]
    inundation = GradientInundation(optimizer, weights, flip_rate=5e-3)
    for seed in range(3):
        set_gradients(params, seed)
        grids, start = [w.grid() for w in weights], [p.detach().clone() for p in params]
        optimizer.step()
        flips = [int((codes(p, g) != codes(s, g)).sum()) for p, g, s in zip(params, grids, start, strict=True)]
        assert flips == [12, 1]
        assert (inundation.factors > 1).all()


def test_momentum_is_that_of_the_plain_optimizer_bit_for_bit() -> None:
    runs = []
    for inundated in (False, True):
        params = parameters([*SHAPES, (5,), (5,)])
        groups = [{"params": params[:1], "lr": 1e-4}, {"params": params[1:4], "momentum": 0.5}, {"params": params[4:]}]
        sgd = optim.SGD(groups, lr=1e-6, momentum=0.9, nesterov=True)
        inundation = GradientInundation(sgd, [Weight(p) for p in params[:3]]) if inundated else None
        for seed in range(5):
            set_gradients(params, seed)
            sgd.step()
        runs.append((params, sgd.state_dict(), inundation))
    (plain, plain_state, _), (ours, state, inundation) = runs
    assert inundation is not None
    assert (inundation.factors > 1).all()
    assert tensors(state).keys() == tensors(plain_state).keys()
    assert all(torch.equal(tensors(state)[key], value) for key, value in tensors(plain_state).items())
    assert state["param_groups"] == plain_state["param_groups"]
    assert torch.equal(ours[3], plain[3])  # BatchNorm parameters and biases take the plain step
    assert torch.equal(ours[4], plain[4])
    assert not torch.equal(ours[0], plain[0])


def test_groups_keep_their_own_factors() -> None:
    # The same layer twice, in groups whose learning rates differ by 1000: so do the factors, and the result is one.
    params = parameters([(16, 9)]) + parameters([(16, 9)])
    set_gradients(params[:1], 3)
    set_gradients(params[1:], 3)
    sgd = optim.SGD([{"params": params[:1], "lr": 1e-4}, {"params": params[1:], "lr": 1e-7}])
    inundation = GradientInundation(sgd, [Weight(p) for p in params])
    sgd.step()
    assert inundation.factors[1].item() == pytest.approx(1000 * inundation.factors[0].item(), rel=1e-4)
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_bit_widths_may_differ(seed: int) -> None:
    together = parameters(seed=seed)
    alone = parameters(seed=seed)
    set_gradients(together, seed)
    set_gradients(alone, seed)
    bits = [3, 8, 4]
    optimizer = optim.SGD(together, lr=1e-6)
    GradientInundation(optimizer, [Weight(p, b) for p, b in zip(together, bits, strict=True)])
    optimizer.step()
    for param, width in zip(alone, bits, strict=True):
        single = optim.SGD([param], lr=1e-6)
        GradientInundation(single, [Weight(param, width)])
        single.step()
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


# ---- hard cases


@pytest.mark.parametrize("mode", ["exact", "search"])
@pytest.mark.parametrize("kind", ["zero", "none", "nan", "inf"])
@pytest.mark.parametrize("cap", [None, 100.0])
def test_unusable_gradients_give_a_factor_of_one(mode: Any, kind: str, cap: float | None) -> None:
    params = parameters()
    set_gradients(params, 1)
    if kind == "none":
        params[0].grad = None
    elif kind == "zero":
        params[0].grad.zero_()
    else:
        params[0].grad[0, 0] = float(kind)
    start = params[0].detach().clone()
    sgd = optim.SGD(params, lr=1e-6)
    inundation = GradientInundation(sgd, [Weight(p) for p in params], mode=mode, cap=cap, flip_rate=0.02)
    sgd.step()
    assert inundation.factors[0] == 1
    assert (inundation.factors[1:] > 1).all()
    assert torch.isfinite(params[1]).all()
    assert torch.equal(params[0], start) == (kind in ("zero", "none"))


class _Clipped:
    """A narrow fixed grid: most weights lie beyond its ends."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def grid(self, values: Tensor | None = None) -> Grid:
        return symmetric_grid(torch.tensor(0.05), 2)


@pytest.mark.parametrize(("cap", "factor"), [(None, 1.0), (7.0, 7.0)])
def test_too_few_movable_weights(cap: float | None, factor: float) -> None:
    weight = nn.Parameter(torch.full((1, 10), 0.2))
    weight.grad = -torch.ones(1, 10)  # all outwards from the upper end
    sgd = optim.SGD([weight], lr=1e-3)
    inundation = GradientInundation(sgd, [_Clipped(weight)], cap=cap)
    sgd.step()
    assert inundation.factors.tolist() == [factor]
    torch.testing.assert_close(weight, torch.full((1, 10), 0.2 + factor * 1e-3))


def test_a_factor_never_overflows_a_weight() -> None:
    # One weight could change its code with a factor of about 1e37; the other, already at the end, would go to infinity.
    weight = nn.Parameter(torch.tensor([[0.0, 0.2]]))
    weight.grad = torch.tensor([[1e-38, -1e4]])
    sgd = optim.SGD([weight], lr=1.0)
    inundation = GradientInundation(sgd, [_Clipped(weight)])
    sgd.step()
    assert inundation.factors.tolist() == [1.0]
    assert torch.isfinite(weight).all()


def test_inward_motion_of_a_clipped_weight_counts() -> None:
    weight = nn.Parameter(torch.full((1, 4), 0.2))
    weight.grad = torch.tensor([[1.0, 0, 0, 0]])
    sgd = optim.SGD([weight], lr=1e-3)
    inundation = GradientInundation(sgd, [_Clipped(weight)])
    sgd.step()
    assert inundation.factors.item() == pytest.approx((0.2 - 0.025) / 1e-3, rel=2e-3)  # boundary of codes 0 and 1


def test_the_cap_and_the_milestones_follow_the_optimizer_steps() -> None:
    params = parameters([(16, 16, 3, 3)])
    sgd = optim.SGD(params, lr=1e-9)
    inundation = GradientInundation(
        sgd, [Weight(params[0])], flip_rate=0.02, cap=5.0, cap_steps=2, milestones=(3, 4), decay=0.1
    )
    rates, capped, flips = [], [], []
    for seed in range(5):
        set_gradients(params, seed)
        grid, start = Weight(params[0]).grid(), params[0].detach().clone()
        rates.append(inundation.flip_rate)
        sgd.step()
        capped.append(inundation.factors.item() == 5)
        flips.append(int((codes(params[0], grid) != codes(start, grid)).sum()))
    assert rates == pytest.approx([0.02, 0.02, 0.02, 2e-3, 2e-4])
    assert capped == [True, True, False, False, False]
    assert flips[2:] == [47, 5, 1]


def test_a_resumed_run_is_bit_for_bit_the_same() -> None:
    def start() -> tuple[list[nn.Parameter], optim.Optimizer, GradientInundation]:
        params = parameters()
        sgd = optim.SGD(params, lr=1e-6, momentum=0.9)
        weights = [Weight(p) for p in params]
        return params, sgd, GradientInundation(sgd, weights, flip_rate=0.05, cap=300.0, cap_steps=3, milestones=(3,))

    def steps(params: list[nn.Parameter], sgd: optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            set_gradients(params, seed)
            sgd.step()

    whole, sgd, _ = start()
    steps(whole, sgd, range(5))
    first, sgd, inundation = start()
    steps(first, sgd, range(2))
    saved = json.loads(json.dumps(inundation.state_dict())), sgd.state_dict(), [p.detach().clone() for p in first]
    second, sgd, inundation = start()
    inundation.load_state_dict(saved[0])
    sgd.load_state_dict(saved[1])
    with torch.no_grad():
        for param, value in zip(second, saved[2], strict=True):
            param.copy_(value)
    steps(second, sgd, range(2, 5))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


def test_remove_leaves_a_plain_optimizer() -> None:
    plain, ours = parameters(), parameters()
    plain_sgd, sgd = optim.SGD(plain, lr=1e-4), optim.SGD(ours, lr=1e-4)
    inundation = GradientInundation(sgd, [Weight(p) for p in ours])
    inundation.remove()
    inundation.remove()
    set_gradients(plain, 0)
    set_gradients(ours, 0)
    plain_sgd.step()
    sgd.step()
    assert all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_sees_the_weights_and_is_called_once(as_keyword: bool) -> None:
    plain, ours = parameters(), parameters()
    calls = []

    def step(params: list[nn.Parameter], sgd: optim.Optimizer) -> Any:
        def closure() -> Tensor:
            sgd.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            calls.append(loss.item())
            return loss

        return sgd.step(closure=closure) if as_keyword else sgd.step(closure)

    sgd = optim.SGD(ours, lr=0.1)
    GradientInundation(sgd, [Weight(p) for p in ours], cap=1.0)
    expected, got = step(plain, optim.SGD(plain, lr=0.1)), step(ours, sgd)
    assert calls == [expected.item(), got.item()]
    assert calls[0] == calls[1] > 0
    torch.testing.assert_close(ours, plain)


def test_a_failed_step_leaves_weights_and_optimizer_usable() -> None:
    params = parameters()
    sgd = optim.SGD(params, lr=1e-6, momentum=0.9)
    GradientInundation(sgd, [Weight(p) for p in params])
    set_gradients(params, 0)
    sgd.step()
    start = [p.detach().clone() for p in params]
    sgd.param_groups[0]["momentum"] = "broken"
    with pytest.raises(TypeError):
        sgd.step()
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    sgd.param_groups[0]["momentum"] = 0.9
    sgd.step()
    assert [id(p) for p in sgd.param_groups[0]["params"]] == [id(p) for p in params]
    assert {id(p) for p in sgd.state} == {id(p) for p in params}
    assert not any(torch.equal(p, s) for p, s in zip(params, start, strict=True))


@pytest.mark.parametrize(
    "make", [optim.SGD, optim.AdamW, partial(optim.SGD, fused=True), partial(optim.AdamW, fused=True)]
)
@pytest.mark.parametrize("finite", [True, False])
def test_gradient_scaling(make: Any, finite: bool) -> None:
    results = []
    for scaled in (False, True):
        params = parameters()
        optimizer = make(params, lr=1e-6, weight_decay=0.1)
        inundation = GradientInundation(optimizer, [Weight(p) for p in params])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        set_gradients(params, 0)
        for param in params:
            param.grad = scaler.scale(param.grad)
        if scaled and not finite:
            params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        results.append((params, inundation.factors))
    (plain, factors), (ours, scaled_factors) = results
    if finite:
        torch.testing.assert_close(scaled_factors, factors, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
    else:  # skipped as a whole
        assert all(torch.equal(p, start) for p, start in zip(ours, parameters(), strict=True))
        assert (scaled_factors == 1).all()


def test_memory_format_is_kept() -> None:
    weight = nn.Parameter(parameters(SHAPES[:1])[0].detach().to(memory_format=torch.channels_last))
    other = parameters(SHAPES[:1])
    set_gradients([weight], 0)
    set_gradients(other, 0)
    weight.grad = weight.grad.to(memory_format=torch.channels_last)
    for param in (weight, other[0]):
        adam = optim.Adam([param], lr=1e-6)
        GradientInundation(adam, [Weight(param)])
        adam.step()
        assert adam.state[param]["exp_avg"].stride() == param.stride()
    assert torch.equal(weight, other[0])


# ---- cost


class _Calls(TorchDispatchMode):
    """Names of the operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "syncs"), [("exact", False), ("search", True)])
def test_only_the_search_waits_for_the_device(mode: Any, syncs: bool) -> None:
    params = parameters()
    sgd = optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    GradientInundation(sgd, [Weight(p, bits) for p, bits in zip(params, (3, 4, 4), strict=True)], mode=mode)
    set_gradients(params, 0)
    with _Calls() as calls:
        sgd.step()
    assert len(calls.names) > 20
    assert any(name in ("aten::_local_scalar_dense", "aten::is_nonzero") for name in calls.names) == syncs


# ---- refused


@pytest.mark.parametrize(
    "bad",
    [
        {"flip_rate": 0.0}, {"flip_rate": 1.5}, {"flip_rate": float("nan")}, {"mode": "fast"}, {"cap": 0.5},
        {"cap": float("inf")}, {"cap_steps": -1}, {"milestones": (-1,)}, {"decay": 0.0}, {"search_steps": 0},
    ],
)  # fmt: skip
def test_bad_numbers_are_refused(bad: dict[str, Any]) -> None:
    params = parameters()
    with pytest.raises(BadInput, match=next(iter(bad))):
        GradientInundation(optim.SGD(params, lr=0.1), [Weight(p) for p in params], **bad)


def test_bad_weights_are_refused() -> None:
    params = parameters()
    sgd = optim.SGD(params[:2], lr=0.1)
    half = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    for weights, message in [
        ([], "at least one"),
        ([params[0], params[0]], "repeats"),
        ([params[0], params[2]], r"number 1, \(6, 5\)"),
        ([half], "float32 or float64"),
        ([params[0], nn.Parameter(torch.zeros(2, dtype=torch.float64))], "one device"),
    ]:
        with pytest.raises(BadInput, match=message):
            GradientInundation(sgd, [Weight(p) for p in weights])
    assert not sgd._optimizer_step_pre_hooks


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": "2"}])
def test_bad_states_are_refused(state: dict[str, Any]) -> None:
    params = parameters()
    inundation = GradientInundation(optim.SGD(params, lr=0.1), [Weight(p) for p in params])
    with pytest.raises(BadInput, match="state"):
        inundation.load_state_dict(state)
