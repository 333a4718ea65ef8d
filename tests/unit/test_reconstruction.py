"""Reconstruction: formulas by hand, blocks of every kind of network, codes that reload, resuming to the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tiny import tiny_teacher
from zsq import pipeline
from zsq.errors import BadInput
from zsq.fit import calibrate
from zsq.grid import decode, encode
from zsq.insert import QuantSpec, codes_and_latents, freeze_ranges, quantize, quantized_weights
from zsq.insert.access import weight_paths
from zsq.quantizer import LearnedStep, LiveMinMax, MseRange
from zsq.reconstruction import find_blocks, reconstruct
from zsq.reconstruction.blocks import describe
from zsq.reconstruction.rounding import (
    Adam,
    LearnedRounding,
    indecision,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
)
from zsq.reconstruction.work import squared_error
from zsq.run import Run
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher

CUTTABLE = [name for name in zoo.CASES if name != "dict output"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_teacher(net: nn.Module) -> Teacher:
    return Teacher(net.requires_grad_(False), "net", "classify", 10, (3, 8, 8))


def calibrated(net: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    student, _ = quantize(net, QuantSpec(**{"weight": LearnedStep, "act": LearnedStep, **options}))
    student(x)
    freeze_ranges(student)
    return student


# ---- formulas


def test_rectified_sigmoid_by_hand() -> None:
    v = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    # 1.2 / (1 + e^-v) - 0.1, cut to [0, 1]
    expected = torch.tensor([0.0, 0.2227297056, 0.5, 0.7772702944, 1.0], dtype=torch.float64)
    assert torch.allclose(rectified_sigmoid(v), expected, atol=1e-9)
    assert rectified_sigmoid(torch.tensor(2.3979)).item() == pytest.approx(1.0, abs=1e-4)  # ln 11: where it saturates


def test_inverse_is_the_inverse() -> None:
    h = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-12)


def test_indecision_by_hand() -> None:
    h = torch.tensor([0.0, 0.1, 0.5, 0.75, 1.0], dtype=torch.float64)
    # 1 - |2h - 1|^b: 0, 1 - 0.8^b, 1, 1 - 0.5^b, 0
    assert indecision(h, 2.0).item() == pytest.approx(0.36 + 1 + 0.75, abs=1e-12)
    assert indecision(h, 20.0).item() == pytest.approx(1 - 0.8**20 + 1 + 1 - 0.5**20, abs=1e-12)
    h = h.clone().requires_grad_()
    assert torch.autograd.grad(indecision(h, 2.0), h)[0].isfinite().all()


def test_error_is_a_sum_over_channels_and_a_mean_over_the_rest() -> None:
    found, wanted = (torch.randn(3, 4, 5, 5, generator=rng(i), dtype=torch.float64) for i in (0, 1))
    weight = torch.rand(3, 4, 5, 5, generator=rng(2), dtype=torch.float64)
    expected = sum(
        weight[n, c, i, j] * (found[n, c, i, j] - wanted[n, c, i, j]) ** 2
        for n in range(3) for c in range(4) for i in range(5) for j in range(5)
    ) / 75  # fmt: skip
    assert torch.allclose(squared_error(found, wanted, weight), expected)
    assert squared_error(torch.zeros(2), torch.ones(2)).item() == 1.0


def test_adam_is_torchs_in_units_of_its_own() -> None:
    start = torch.randn(5, generator=rng())
    own, theirs = start.clone(), start.clone().requires_grad_()
    mine, torchs = Adam([own], [torch.tensor(0.5)]), torch.optim.Adam([theirs], 0.05)
    for step in range(6):
        gradient = torch.randn(5, generator=rng(step))
        theirs.grad = gradient.clone()
        torchs.step()
        mine.update([gradient], [0.1])
    assert torch.allclose(own, theirs, atol=1e-6)


# ---- one layer


def soft_layer(**options: Any) -> tuple[LearnedRounding, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()).double()
    student = calibrated(net, torch.randn(4, 3, 8, 8, generator=rng()).double(), **options)
    (entry,) = weight_paths(student).values()
    assert entry.latent is not None
    return LearnedRounding(entry.path, entry.latent), student


@pytest.mark.parametrize("rule", [LearnedStep, MseRange])
def test_the_soft_weight_starts_as_the_float_weight(rule: Any) -> None:
    rounding, _ = soft_layer(weight_bits=3, weight=rule)
    grid = rounding.path.quantizer.grid(rounding.latent)
    inside = ((rounding.latent * grid.inv_step - grid.zero) - (grid.qmin + grid.qmax) / 2).abs() < 3.5
    assert inside.float().mean() > 0.8
    assert torch.allclose(rounding.weight()[inside], rounding.latent[inside], atol=1e-6)
    assert rounding.step.requires_grad == (rule is LearnedStep)


def test_gradients_are_those_of_finite_differences() -> None:
    rounding, _ = soft_layer(weight_bits=3)

    def soft(v: Tensor, step: Tensor) -> Tensor:
        rounding.v, rounding.step = v, step
        return rounding.weight()

    v = torch.full_like(rounding.v, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(soft, (v, rounding.step.detach().double().requires_grad_()))


def test_hard_codes_are_those_of_the_rounding_and_the_quantizer_gives_them() -> None:
    rounding, _ = soft_layer(weight_bits=3)
    grid = rounding.path.quantizer.grid(rounding.latent)
    down = (rounding.latent * grid.inv_step - grid.zero).floor().detach()
    up = torch.randint(2, rounding.v.shape, generator=rng()).double()
    with torch.no_grad():
        rounding.v.copy_(20 * up - 10)
        rounding.step.mul_(1.07)
    expected = torch.clamp(down + up, grid.qmin, grid.qmax)
    rounding.harden()
    again = rounding.path.quantizer.grid(rounding.latent)
    assert torch.equal(encode(rounding.latent, again), expected)
    assert torch.equal(again.zero, grid.zero)
    assert torch.allclose(1 / again.inv_step, 1.07 / grid.inv_step)
    assert torch.equal(rounding.path.quantizer(rounding.latent), decode(expected, again))


# ---- blocks


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("name", CUTTABLE)
def test_blocks_are_the_network(name: str, placement: str) -> None:
    net, (x,) = zoo.build(name)
    student = calibrated(net, x, placement=placement)
    blocks = find_blocks(student)
    with torch.no_grad():
        expected, found = student(x), x
        for block in blocks:
            found = block.within(student)(found)  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert [block.end for block in blocks[:-1]] == [block.start for block in blocks[1:]]
    called = {place for block in blocks for place in block.layers}
    assert called == set(weight_paths(student)) and all(block.layers for block in blocks)


def test_blocks_of_a_residual_network() -> None:
    net, (x,) = zoo.build("resnet20")
    blocks = find_blocks(calibrated(net, x))
    assert [len(block.layers) for block in blocks] == [1, 2, 2, 2, 3, 2, 2, 3, 2, 2, 1]
    assert blocks[4].layers == ("units.3.body.0", "units.3.body.3", "units.3.identity.0") and blocks[4].whole
    assert describe(blocks) == "11 blocks, the largest of 3 layers (units.3.body.0 to units.3.identity.0)"
    assert not find_blocks(calibrated(zoo.build("mlp")[0], zoo.build("mlp")[1][0]))[0].whole


def test_straight_runs_are_cut_by_length() -> None:
    net, (x,) = zoo.build("mlp")
    student = calibrated(net, x)
    assert [len(block.layers) for block in find_blocks(student, run=2)] == [2, 1]
    assert [block.layers for block in find_blocks(student, run=1)] == [("net.0",), ("net.3",), ("net.5",)]
    with pytest.raises(BadInput, match="layers of a block"):
        find_blocks(student, run=0)


def test_what_cannot_be_cut_is_one_block_and_says_so() -> None:
    net, (x,) = zoo.build("concat")
    assert describe(find_blocks(calibrated(net, x))) == "1 block: no single tensor passes between its 3 layers"


def test_several_inputs_are_refused() -> None:
    net, _ = zoo.build("dict output")
    with pytest.raises(BadInput, match=r"one input, got x, y\. Wrap"):
        find_blocks(quantize(net)[0])


# ---- the whole


def errors_of(student: nn.Module, net: nn.Module, x: Tensor, **options: Any) -> list[tuple[float, float]]:
    """Reconstruct, and give each block's error before and after."""
    found: list[tuple[float, float]] = []

    class Listening(Run):
        def log(self, **terms: Any) -> None:
            if "before" in terms:
                found.append((float(terms["before"]), float(terms["after"])))
            super().log(**terms)

    with Listening(None, progress=False) as run:
        reconstruct(student, as_teacher(net), x, run=run, **{"steps": 25, "batch": 8, "lr": 0.1, **options})
    return found


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("name", ["resnet20", "inverted residual", "own forward", "channel split", "shared modules"])
def test_no_block_ends_worse_than_nearest_rounding(name: str, placement: str) -> None:
    net, (x,) = zoo.build(name)
    student = calibrated(net, x, weight_bits=3, act_bits=3, placement=placement)
    with torch.no_grad():
        start = squared_error(student(x), net(x))
    found = errors_of(student, net, x, drop=0.0)
    assert all(after <= before for before, after in found) and any(after < before for before, after in found)
    with torch.no_grad():
        end = squared_error(student(x), net(x))
        assert end <= start
        # The last block's error is the network's, computed with its own quantizers: the hard weights are in place.
        assert end.item() == pytest.approx(found[-1][1], rel=1e-4)


def test_a_step_that_only_harms_is_put_back() -> None:
    net, (x,) = zoo.build("mlp")
    student = calibrated(net, x)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    found = errors_of(student, net, x, lr=0.0, step_lr=3.0, steps=2)
    assert found[0][0] == found[0][1]
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_without_learning_rates_it_is_nearest_rounding() -> None:
    net, (x,) = zoo.build("resnet20")
    student = calibrated(net, x, weight_bits=3)
    codes = {weight.name: encode(weight.parameter, weight.grid()) for weight in quantized_weights(student)}
    found = errors_of(student, net, x, lr=0.0, step_lr=0.0, steps=1)
    assert all(after == pytest.approx(before, rel=1e-5) for before, after in found)
    assert all(torch.equal(encode(w.parameter, w.grid()), codes[w.name]) for w in quantized_weights(student))


def test_rounding_beats_nearest_where_errors_can_cancel() -> None:
    """One output, many inputs that are always equal: only the sum of the weights counts."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4, bias=False), nn.ReLU(), nn.Linear(4, 4))
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -1, 1)
    x = (torch.rand(64, 1, 1, 1, generator=rng()) + 0.5).expand(64, 3, 4, 4).clone()
    student = calibrated(net, x, weight_bits=2, act_bits=8)
    ((before, after),) = errors_of(student, net, x, drop=0.0, step_lr=0.0, steps=400, lr=0.05)
    assert after < 0.2 * before


@pytest.mark.parametrize("objective", ["mse", "fisher"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_objectives_and_drops(objective: str, drop: float) -> None:
    net, (x,) = zoo.build("inverted residual")
    student = calibrated(net, x, weight_bits=3, act_bits=3)
    found = errors_of(student, net, x, drop=drop, objective=objective, steps=6)
    assert len(found) == 3 and all(after <= before for before, after in found)


def test_steps_of_activations_and_weights_move_and_batchnorm_stays() -> None:
    net, (x,) = zoo.build("adds")
    student = calibrated(net, x, weight_bits=3, act_bits=3)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    errors_of(student, net, x, drop=0.0)
    moved = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in moved} >= {"weight", "step"}
    assert not [key for key in moved if key.startswith(("bn", "norms"))]


def test_history_and_codes_are_those_of_a_reloaded_student(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    student, report = quantize(teacher.net, QuantSpec(3, 3, weight=LearnedStep, act=LearnedStep))
    pool = PoolSource(torch.randn(64, 1, 8, 8, generator=rng()), None, name="pool", batch=8)
    with Run(tmp_path / "run", progress=False, history=2) as run:
        calibrate(student, pool, steps=2, run=run)
        blocks = reconstruct(student, teacher, pool, steps=40, batch=8, run=run, lr=0.1,
                             history_of=partial(codes_and_latents, student))  # fmt: skip
    assert len(blocks) == 1
    pipeline.write_student(tmp_path / "run", student, QuantSpec(3, 3), report.to_json())
    again = pipeline.read_student(tmp_path / "run", teacher)
    x = torch.randn(9, 1, 8, 8, generator=rng(1))
    with torch.no_grad():
        assert torch.equal(again(x), student(x))
    ours, theirs = codes_and_latents(student), codes_and_latents(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for weight in quantized_weights(again):  # a latent weight is the value of its code
        grid = weight.grid()
        assert torch.equal(decode(encode(weight.parameter, grid), grid), weight.parameter)


def test_parts_of_a_batch_are_the_same_step() -> None:
    net, (x,) = zoo.build("inverted residual")
    found = []
    for size in (None, 3):
        student = calibrated(net, x, weight_bits=3, act_bits=3)
        terms: list[float] = []

        class Listening(Run):
            def log(self, **given: Any) -> None:
                terms.extend(float(given[name]) for name in ("mse", "round"))  # noqa: B023 (called within the turn)

        with Listening(None, progress=False) as run:
            reconstruct(student, as_teacher(net), x, steps=3, batch=8, micro_batch=size, run=run, lr=1e-3)
        found.append(terms)
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 3 * 3 * 2


class _Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_interrupted_it_goes_on_to_the_same_bits(after: int, tmp_path: Path) -> None:
    net, (x,) = zoo.build("adds")

    def make(path: Path, *, stop: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        student = calibrated(net, x, weight_bits=3, act_bits=3)
        with Run(path, resume=resume, checkpoint_every=1, progress=False) as run:
            real, calls = run.log, [0]

            def log(**terms: Any) -> None:
                calls[0] += 1
                if stop is not None and calls[0] > stop:
                    raise _Stop
                real(**terms)

            run.log = log  # type: ignore[method-assign]
            reconstruct(student, as_teacher(net), x, steps=4, batch=8, run=run, lr=0.3, step_lr=0.01)
        return student.state_dict()

    straight = make(tmp_path / "straight")
    with pytest.raises(_Stop):
        make(tmp_path / "broken", stop=after)
    resumed = make(tmp_path / "broken", resume=True)
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())


# ---- what it refuses


def test_labels_are_not_used() -> None:
    images, runs = torch.randn(32, 1, 8, 8, generator=rng()), []
    for labels in (None, torch.randint(10, (32,), generator=rng(1))):
        teacher = tiny_teacher()
        student = calibrated(teacher.net, images[:8], weight_bits=3)
        with Run(None, progress=False) as run:
            reconstruct(student, teacher, PoolSource(images, labels, name="pool"), steps=4, batch=8, run=run, lr=0.3)
        runs.append(student.state_dict())
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


@pytest.mark.parametrize("rule", [LiveMinMax, LearnedStep])
def test_weights_whose_range_moves_are_refused(rule: Any) -> None:
    net, (x,) = zoo.build("mlp")
    student, _ = quantize(net, QuantSpec(weight=rule, act=LearnedStep))
    student(x)
    got = "LiveMinMax" if rule is LiveMinMax else "still observing"
    with pytest.raises(BadInput, match=f"ranges are fixed, got .*{got}.* calibrate first"):
        errors_of(student, net, x)


@pytest.mark.parametrize(
    "option",
    [{"steps": 0}, {"batch": 0}, {"count": 0}, {"micro_batch": 0}, {"drop": 1.5}, {"objective": "sum"}],
    ids=str,
)
def test_numbers_that_cannot_be_meant(option: dict[str, Any]) -> None:
    net, (x,) = zoo.build("mlp")
    with pytest.raises(BadInput, match=next(iter(option)).replace("_", "-")):
        errors_of(calibrated(net, x), net, x, **option)


def test_another_teacher_is_refused() -> None:
    net, (x,) = zoo.build("mlp")
    with pytest.raises(BadInput, match="the network that the student was made from"):
        errors_of(calibrated(net, x), zoo.build("adds")[0], x)
