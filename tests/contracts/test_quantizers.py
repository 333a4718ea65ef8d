"""What every quantizer promises. A new subclass in `zsq.quantizer` is tested by existing."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zsq import quantizer as module
from zsq.errors import BadInput, RunFailed
from zsq.grid import decode
from zsq.quantizer import Quantizer


def discover() -> list[type[Quantizer]]:
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass)]
    return [c for c in classes if issubclass(c, Quantizer) and not inspect.isabstract(c)]


OPTIONS = {
    "tensor": {},
    "tensor-zero": {"include_zero": True, "clip_gradient": True},
    "channel": {"axis": 0},
    "channel-symmetric": {"axis": 0, "symmetric": True},
    "transposed": {"axis": 1, "include_zero": True},
}
CASES = [
    pytest.param(kind, options, id=f"{kind.__name__}-{name}")
    for kind in discover()
    for name, options in OPTIONS.items()
]
each_case = pytest.mark.parametrize(("kind", "options"), CASES)
each_kind = pytest.mark.parametrize("kind", discover())


def data(seed: int = 0) -> Tensor:
    """A weight-like tensor: positive and negative channels of different widths, one constant, one zero."""
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed))
    x = x * torch.tensor([0.1, 1.0, 5.0, 1.0, 1.0, 1.0]).reshape(6, 1, 1, 1)
    x[3] = x[3].abs() + 0.5
    x[4], x[5] = 0.25, 0.0
    return x


def observed(kind: type[Quantizer], options: dict, bits: int = 4) -> Quantizer:
    quantizer = kind(bits, **options)
    for seed in range(3):
        quantizer(data(seed))
    quantizer.freeze()
    return quantizer


def has_state(quantizer: Quantizer) -> bool:
    return bool(quantizer.state_dict())


def snapshot(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_all_kinds_are_found() -> None:
    names = {kind.__name__ for kind in discover()}
    assert {"LiveMinMax", "RunningMinMax", "Percentile", "MseRange", "LearnedStep"} <= names


@each_case
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_inside_and_decode_to_the_output(kind: type[Quantizer], options: dict, bits: int) -> None:
    quantizer = observed(kind, options, bits)
    x = data(7) * 3
    codes, grid = quantizer.codes(x), quantizer.grid(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert codes.min() >= grid.qmin and codes.max() <= grid.qmax
    assert grid.qmax - grid.qmin == 2**bits - (2 if quantizer.symmetric else 1)
    assert grid.inv_step.dtype == torch.float32 and (grid.inv_step > 0).all()
    assert torch.equal(grid.zero, grid.zero.round())
    assert torch.equal(decode(codes, grid), quantizer(x))


@each_case
def test_result_is_finite_and_of_the_same_shape(kind: type[Quantizer], options: dict) -> None:
    quantizer = observed(kind, options)
    for x in (data(7), data(7) * 1e4, torch.zeros_like(data())):
        y = quantizer(x)
        assert y.shape == x.shape and y.dtype == torch.float32
        assert torch.isfinite(y).all()


def narrow(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Where the codes are exact integers in float32: not in a channel of constants (see the grid's tests)."""
    return (quantizer.grid(x).zero.abs() < 2**20).expand(x.shape)


@each_case
def test_idempotent_on_its_grid(kind: type[Quantizer], options: dict) -> None:
    quantizer = observed(kind, options)
    x = data(7)
    grid, keep = quantizer.grid(x), narrow(quantizer, x)
    once = quantizer(x)
    again = decode(torch.clamp(torch.round(once * grid.inv_step - grid.zero), grid.qmin, grid.qmax), grid)
    assert torch.equal(again[keep], once[keep])
    if has_state(quantizer):
        assert torch.equal(quantizer(once)[keep], once[keep])


@each_case
def test_error_is_at_most_half_a_step_inside_the_window(kind: type[Quantizer], options: dict) -> None:
    quantizer = observed(kind, options)
    x = data(7)
    grid = quantizer.grid(x)
    inside = (x >= decode(torch.tensor(grid.qmin), grid)) & (x <= decode(torch.tensor(grid.qmax), grid))
    inside &= narrow(quantizer, x)
    assert inside.float().mean() > 0.3
    error = (quantizer(x) - x).abs()
    assert (error <= 0.5 / grid.inv_step * (1 + 1e-5))[inside].all()


@each_case
def test_input_gets_a_gradient(kind: type[Quantizer], options: dict) -> None:
    quantizer = observed(kind, options)
    x = data(7).requires_grad_()
    upstream = data(8)
    quantizer(x).backward(upstream)
    if quantizer.clip_gradient:
        passed = x.grad == upstream
        assert (passed | (x.grad == 0)).all() and passed.float().mean() > 0.3
    else:
        assert torch.equal(x.grad, upstream)


@each_case
def test_its_parameters_train_after_freeze_only(kind: type[Quantizer], options: dict) -> None:
    quantizer = kind(4, **options)
    (quantizer(data().requires_grad_()) * data(8)).sum().backward()
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    quantizer.freeze()
    (quantizer((data() * 3).requires_grad_()) * data(8)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


@each_case
def test_freeze_stops_every_update(kind: type[Quantizer], options: dict) -> None:
    quantizer = observed(kind, options)
    assert quantizer.observing is False
    before = snapshot(quantizer)
    out = quantizer(data(7))
    for scale in (0.01, 100.0):
        quantizer(data(9) * scale)
    assert same(snapshot(quantizer), before)
    assert torch.equal(quantizer(data(7)), out)


@each_case
def test_looking_changes_nothing(kind: type[Quantizer], options: dict) -> None:
    quantizer = kind(4, **options)
    quantizer(data())
    before = snapshot(quantizer)
    quantizer.grid(data(7) * 100)
    quantizer.codes(data(7) * 100)
    assert same(snapshot(quantizer), before)


@each_case
def test_observing_follows_the_data(kind: type[Quantizer], options: dict) -> None:
    quantizer = kind(4, **options)
    quantizer(data())
    before, zero = quantizer.grid(data()).inv_step, quantizer.grid(data()).zero
    kept = before.clone(), zero.clone()
    quantizer(data() * 10)
    assert torch.equal(before, kept[0]) and torch.equal(zero, kept[1])  # a grid handed out stays what it is
    x = data() * 10
    assert (quantizer.grid(x).inv_step < before)[before < 1e6].all()  # but the constant channels


@each_case
@pytest.mark.parametrize("frozen", [True, False])
def test_state_survives_a_round_trip(kind: type[Quantizer], options: dict, frozen: bool) -> None:
    quantizer = kind(4, **options)
    quantizer(data())
    quantizer(data(1) * 2)
    if frozen:
        quantizer.freeze()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(1.25)  # trained
    state = copy.deepcopy(quantizer.state_dict())
    assert all(isinstance(value, Tensor) or json.dumps(value) for value in state.values())
    fresh = kind(4, **options)
    fresh.load_state_dict(state)
    assert fresh.observing == quantizer.observing
    assert same(snapshot(fresh), state)
    for seed in (7, 8):  # and it goes on alike
        assert torch.equal(fresh(data(seed)), quantizer(data(seed)))
    assert same(snapshot(fresh), snapshot(quantizer))


@each_case
def test_state_of_a_fresh_one_survives_too(kind: type[Quantizer], options: dict) -> None:
    used = observed(kind, options)
    used.load_state_dict(kind(4, **options).state_dict())
    fresh = kind(4, **options)
    if has_state(fresh):
        with pytest.raises(RunFailed, match="no tensor was observed yet"):
            used.grid(data(7))
    assert torch.equal(used(data(7)), fresh(data(7)))


@each_case
def test_copies_are_independent(kind: type[Quantizer], options: dict) -> None:
    quantizer = kind(4, **options)
    quantizer(data())
    before = snapshot(quantizer)
    copy.deepcopy(quantizer)(data(7) * 50)
    assert same(snapshot(quantizer), before)


@each_kind
def test_no_range_before_any_observation(kind: type[Quantizer]) -> None:
    quantizer = kind(4)
    quantizer.freeze()
    if not has_state(quantizer):
        quantizer(data())
        return
    for call in (quantizer, quantizer.grid, quantizer.codes):
        with pytest.raises((RunFailed, BadInput), match=rf"{kind.__name__}: expected a range, got none.*Calibrate"):
            call(data())


@each_case
def test_deterministic(kind: type[Quantizer], options: dict) -> None:
    one, two = observed(kind, options), observed(kind, options)
    assert same(snapshot(one), snapshot(two))
    assert torch.equal(one(data(7)), two(data(7)))


@each_case
def test_arithmetic_stays_float32_under_autocast(kind: type[Quantizer], options: dict) -> None:
    want = observed(kind, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantizer = observed(kind, options)
        y = quantizer(data(7))
        half = quantizer(data(7).bfloat16())
    assert same(snapshot(quantizer), snapshot(want))
    assert y.dtype == half.dtype == torch.float32
    assert torch.equal(y, want(data(7)))
    assert torch.equal(half, want(data(7).bfloat16().float()))


@each_case
def test_half_precision_is_observed_like_its_float32_values(kind: type[Quantizer], options: dict) -> None:
    half, full = kind(4, **options), kind(4, **options)
    assert torch.equal(half(data().bfloat16()), full(data().bfloat16().float()))
    assert same(snapshot(half), snapshot(full))
    assert all(value.dtype in (torch.float32, torch.uint8) for value in half.state_dict().values())


@each_case
def test_range_contains_zero_on_demand(kind: type[Quantizer], options: dict) -> None:
    quantizer = kind(4, **{**options, "include_zero": True})
    x = data().abs() + 3
    quantizer(x)
    quantizer.freeze()
    grid = quantizer.grid(x)
    assert ((-grid.zero >= grid.qmin) & (-grid.zero <= grid.qmax)).all()
    assert (quantizer.codes(x * 0) == -grid.zero).all() or not has_state(quantizer)


@each_kind
@pytest.mark.parametrize("options", [{}, {"axis": 0, "symmetric": True}], ids=["tensor", "channel"])
def test_nothing_is_read_back_to_the_host(kind: type[Quantizer], options: dict) -> None:
    # A fake tensor has no values: `.item()`, `.cpu()` or `if tensor` would fail.
    with FakeTensorMode():
        quantizer = kind(4, **options)
        quantizer(torch.empty(6, 5, 3, 3))
        quantizer.freeze()
        x = torch.empty(6, 5, 3, 3, requires_grad=True)
        quantizer(x).sum().backward()
        quantizer.codes(x)


@each_case
def test_calibrated_in_inference_mode_then_trained(kind: type[Quantizer], options: dict) -> None:
    quantizer = kind(4, **options)
    with torch.inference_mode():
        quantizer(data())
        quantizer(data(1))
    quantizer(data(2))
    want = observed(kind, options)
    quantizer.freeze()
    x = data(7).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(y, want(data(7)))


@each_kind
def test_ignores_the_training_flag(kind: type[Quantizer]) -> None:
    net = nn.Sequential(kind(4))
    net(data())
    assert net[0].observing == has_state(net[0])
    net.eval()
    assert net[0].observing == has_state(net[0])


@each_kind
@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", True])
def test_other_bits_are_refused(kind: type[Quantizer], bits: object) -> None:
    with pytest.raises(BadInput, match="expected a whole number from 2 to 8, got"):
        kind(bits)


@each_kind
def test_other_axes_are_refused(kind: type[Quantizer]) -> None:
    with pytest.raises(BadInput, match="expected None, 0 or 1, got 2"):
        kind(4, axis=2)


@each_kind
@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_an_empty_tensor_is_refused(kind: type[Quantizer], shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="at least one value"):
        kind(4)(torch.empty(shape))


@each_kind
def test_its_description_names_the_options(kind: type[Quantizer]) -> None:
    text = repr(kind(3, axis=0, symmetric=True))
    assert text.startswith(f"{kind.__name__}(bits=3, axis=0, symmetric=True")
