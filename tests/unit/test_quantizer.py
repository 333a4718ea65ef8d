"""What is particular to each quantizer: golden range sequences, order statistics, searches, learned steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.grid import Grid, affine_grid, fake_quantize
from zsq.quantizer import LearnedStep, LiveMinMax, MseRange, Percentile, RunningMinMax
from zsq.quantizer.ranges import least_error, min_max, percentile

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "quantizer.json").read_text(encoding="utf-8"))


# ---- LiveMinMax


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_live_codes_are_golden(bits: int) -> None:
    want = GOLDEN["bits"][str(bits)]["codes"]
    w = torch.tensor([GOLDEN["rows"]["A"], GOLDEN["rows"]["B"]])
    assert LiveMinMax(bits, axis=0).codes(w).tolist() == [want["A"], want["B"]]


def test_live_range_follows_the_weight() -> None:
    quantizer, w = LiveMinMax(8, axis=0), torch.randn(3, 4)
    quantizer.freeze()
    assert torch.equal(quantizer.grid(w * 2).inv_step * 2, quantizer.grid(w).inv_step)
    assert quantizer.state_dict() == {}


def test_transposed_weight_has_one_range_per_output_channel() -> None:
    w = torch.randn(4, 6, 3, 3)
    assert torch.equal(LiveMinMax(4, axis=1)(w), LiveMinMax(4, axis=0)(w.transpose(0, 1).contiguous()).transpose(0, 1))
    assert LiveMinMax(4, axis=1).grid(w).inv_step.shape == (1, 6, 1, 1)


def test_channels_need_a_dimension() -> None:
    with pytest.raises(BadInput, match=r"a dimension 1 of channels, got shape \[3\]"):
        LiveMinMax(4, axis=1)(torch.ones(3))


# ---- RunningMinMax


def read(correction: str, values: Tensor, momentum: float = 0.9) -> Tensor:
    """`hi` after every batch of a sequence of maxima."""
    quantizer = RunningMinMax(4, momentum=momentum, correction=correction)
    read = []
    for value in values:
        quantizer(torch.stack([torch.zeros(()), value]))
        read.append(quantizer.hi.clone())
    return torch.stack(read)


def test_golden_activation() -> None:
    want = GOLDEN["activation"]
    quantizer = RunningMinMax(want["bits"])
    quantizer(torch.tensor(want["range"]))
    quantizer.freeze()
    torch.testing.assert_close(quantizer(torch.tensor(want["x"])), torch.tensor(want["values"]), rtol=0, atol=5.1e-7)


def test_official_recurrence_is_golden() -> None:
    sequence = read("official", torch.ones(250))
    want = torch.tensor(GOLDEN["official_recurrence"])
    torch.testing.assert_close(sequence[: len(want)], want, rtol=5e-6, atol=5.1e-4)
    assert sequence.argmax() == 20
    for step, value in GOLDEN["official_later"].items():
        assert sequence[int(step) - 1].item() == pytest.approx(value, rel=2e-3), step


def test_official_recurrence_is_the_released_formula() -> None:
    values = torch.rand(60) + 0.5
    hi, decay = torch.zeros(()), torch.ones(())
    for value, got in zip(values, read("official", values), strict=True):
        decay = decay * 0.9
        hi = (hi * 0.9 + value * (1 - 0.9)) / (1 - decay)
        torch.testing.assert_close(got, hi, rtol=1e-5, atol=0)


def test_constant_input_reads_exactly_itself() -> None:
    sequence = read("once", torch.full((300,), 0.7183))
    assert (sequence == torch.tensor(0.7183)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_average_equals_accumulators_divided_on_read(momentum: float) -> None:
    values = torch.randn(200).abs()
    total = 0.0
    for t, (value, got) in enumerate(zip(values.double(), read("once", values, momentum), strict=True), start=1):
        total = momentum * total + (1 - momentum) * value
        torch.testing.assert_close(got.double(), total / (1 - momentum**t), rtol=1e-6, atol=5e-7)


def test_both_corrections_have_the_same_limit() -> None:
    values = torch.rand(400) + 0.5
    torch.testing.assert_close(read("official", values)[-1], read("once", values)[-1], rtol=1e-4, atol=0)


def test_range_behind_a_relu_starts_exactly_at_zero() -> None:
    quantizer = RunningMinMax(4)
    for _ in range(20):
        quantizer(torch.randn(100).relu())
    assert quantizer.lo == 0
    assert quantizer.grid().zero == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "0 <= momentum < 1, got 1.0"),
        ({"momentum": -0.1}, "0 <= momentum < 1, got -0.1"),
        ({"correction": "twice"}, "'once' or 'official', got 'twice'"),
    ],
)
def test_bad_options_of_running_min_max(options: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        RunningMinMax(4, **options)


def test_other_number_of_channels_is_refused_on_load() -> None:
    one, two = RunningMinMax(4, axis=0), RunningMinMax(4, axis=0)
    one(torch.randn(3, 2))
    two(torch.randn(5, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        two.load_state_dict(one.state_dict())


# ---- Percentile


def test_percentile_leaves_out_outliers() -> None:
    x = torch.rand(100_000)
    x[::20_000] = 50.0
    quantizer = Percentile(4, share=0.999)
    quantizer(x)
    assert 0.99 < quantizer.hi < 1.0 and quantizer.lo < 0.01


def test_percentile_counts_exactly() -> None:
    x = torch.arange(20_000.0)[torch.randperm(20_000)]
    lo, hi = percentile(x, None, share=0.9999)  # exactly one value at each end
    assert (lo, hi) == (1.0, 19_998.0)
    assert percentile(x, None, share=1.0) == min_max(x, None) == (0.0, 19_999.0)


def test_percentile_per_channel() -> None:
    x = torch.stack([torch.arange(100.0), -torch.arange(100.0)])
    lo, hi = percentile(x, 0, share=0.9)
    assert lo.tolist() == [[5.0], [-94.0]]
    assert hi.tolist() == [[94.0], [-5.0]]


def test_percentile_of_more_values_than_torch_quantile_takes() -> None:
    x = torch.arange(2**24 + 100, dtype=torch.int32).to(torch.bfloat16)
    lo, hi = percentile(x, None, share=0.9999)
    assert lo.item() == pytest.approx(0.00005 * 2**24, rel=0.01)
    assert hi.item() == pytest.approx(0.99995 * 2**24, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_bad_share(share: float) -> None:
    with pytest.raises(BadInput, match="0 < share <= 1"):
        Percentile(4, share=share)


# ---- MseRange


def to_grid(bits: int) -> Callable[[Tensor, Tensor], Grid]:
    return lambda lo, hi: affine_grid(lo, hi, bits)


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_search_finds_the_best_candidate_of_every_channel(power: float) -> None:
    x = torch.randn(4, 300) * torch.tensor([[0.1], [1.0], [3.0], [9.0]])
    lo, hi = least_error(x, 0, to_grid(3), power=power, candidates=80)
    for c in range(4):
        errors = []
        for i in range(80):
            grid = affine_grid(x[c].min() * (1 - i / 100), x[c].max() * (1 - i / 100), 3)
            errors.append((fake_quantize(x[c], grid) - x[c]).abs().double().pow(power).mean())
        best = int(torch.stack(errors).argmin())
        assert best > 5  # shrinking pays at 3 bits
        torch.testing.assert_close(hi[c, 0], x[c].max() * (1 - best / 100))
        torch.testing.assert_close(lo[c, 0], x[c].min() * (1 - best / 100))


def test_search_shrinks_heavy_tails_and_keeps_uniform_data() -> None:
    tails, even = MseRange(4), MseRange(4)
    x = torch.randn(20_000)
    tails(x.pow(3))
    even(torch.linspace(-1, 1, 10_000))
    assert tails.hi < 0.7 * x.pow(3).max()
    assert even.hi > 0.9


def test_search_looks_at_a_spread_sample_of_large_tensors() -> None:
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    lo, hi = least_error(x, None, to_grid(4), power=2.0, candidates=80)
    sample_lo, sample_hi = least_error(x[:65_536], None, to_grid(4), power=2.0, candidates=80)
    # Same distribution, hence about the same optimum, though the extremes differ.
    assert hi.item() == pytest.approx(sample_hi.item(), rel=0.1)
    assert lo.item() == pytest.approx(sample_lo.item(), rel=0.1)


def test_search_honours_the_options_of_the_grid() -> None:
    x = torch.randn(1000).abs() + 1
    quantizer = MseRange(2, include_zero=True, candidates=10)
    quantizer(x)
    searched = least_error(x, None, lambda lo, hi: affine_grid(lo.clamp(max=0), hi, 2), power=2.4, candidates=10)
    assert torch.equal(quantizer.hi, searched[1])
    grid = quantizer.grid()
    assert grid.qmin <= -grid.zero <= grid.qmax


@pytest.mark.parametrize(
    ("options", "message"), [({"power": 0.0}, "power > 0, got 0.0"), ({"candidates": 0}, "candidates >= 1, got 0")]
)
def test_bad_options_of_the_search(options: dict, message: str) -> None:
    for kind in (MseRange, LearnedStep):
        with pytest.raises(BadInput, match=message):
            kind(4, **options)


# ---- LearnedStep


def test_learned_starts_at_the_searched_range() -> None:
    x = torch.randn(5000)
    learned, searched = LearnedStep(4), MseRange(4, power=2.0)
    assert torch.allclose(learned(x), searched(x))
    learned.freeze()
    assert torch.allclose(learned(x), searched(x))
    torch.testing.assert_close(learned.step, (searched.hi - searched.lo) / 15)
    assert torch.equal(learned.offset, searched.lo)


def test_learned_symmetric_has_no_offset() -> None:
    quantizer = LearnedStep(4, axis=0, symmetric=True)
    quantizer(torch.randn(3, 50))
    assert quantizer.offset is None
    assert quantizer.step.shape == (3, 1)
    assert set(quantizer.state_dict()) == {"step", "lo", "hi", "weight", "_extra_state"}


def test_optimizer_made_before_calibration_trains_the_step() -> None:
    quantizer = LearnedStep(4, axis=0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1, momentum=0.9)
    quantizer(torch.randn(3, 50))
    optimizer.step()  # no gradient yet
    before = quantizer.step.detach().clone()
    quantizer.freeze()
    x = torch.randn(3, 50) * 2
    for _ in range(3):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(quantizer.step, before)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"include_zero": True}])
def test_training_mends_a_bad_step(options: dict) -> None:
    x = torch.randn(2000)
    quantizer = LearnedStep(3, **options)
    quantizer(x)
    best = (quantizer(x) - x).square().mean()
    quantizer.freeze()
    with torch.no_grad():
        quantizer.step.mul_(0.3)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1.15 * best


def test_observing_again_starts_afresh() -> None:
    quantizer, x = LearnedStep(4, momentum=0.0), torch.randn(100)
    quantizer(x)
    want = quantizer.step.detach().clone()
    with torch.no_grad():
        quantizer.step.mul_(7)
    quantizer.observing = True
    quantizer(x)
    assert torch.equal(quantizer.step, want)


def test_zero_stays_representable_while_the_offset_trains() -> None:
    quantizer = LearnedStep(4, include_zero=True)
    quantizer(torch.rand(100))
    quantizer.freeze()
    with torch.no_grad():
        quantizer.offset.fill_(0.9)
    assert quantizer(torch.zeros(1)) == 0
