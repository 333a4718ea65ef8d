"""Scores and agreement against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import Shared
from zsq.data import LabelledData, load_data
from zsq.errors import RunFailed
from zsq.evaluation import Agreement, agreement, label_free, score
from zsq.tasks.base import Score, wilson_interval
from zsq.tasks.classify import label_rank
from zsq.teachers import EMBEDDED, Teacher, load_teacher


class Table(nn.Module):
    """Returns a row of a table per image; which row, the image's only pixel says."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.drop = rows, nn.Dropout(0.5)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        return self.drop(self.rows[(x.flatten() * 255).round().long()])


def pixels(n: int) -> Tensor:
    return torch.arange(n).reshape(n, 1, 1, 1) / 255


def teacher_of(rows: Tensor) -> Teacher:
    return Teacher(Table(rows), "table", "classify", rows.shape[1], (1, 1, 1), (0.0,), (1.0,))


def labelled(tmp_path: Path, labels: list[int], classes: int) -> LabelledData:
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    teacher = Teacher(nn.Identity(), "test", "classify", classes, (1, 1, 1), (0.0,), (1.0,))
    return load_data(f"npz:{tmp_path / 'set.npz'}", teacher)


# ---- with labels


def test_top1_and_top5(tmp_path: Path) -> None:
    rows = torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 6)
    result = score(Table(rows), labelled(tmp_path, [0, 0, 1, 4, 5, 5], 6), batch=4)
    assert (result.value, result.extra["top5"], result.count) == (2 / 6, 4 / 6, 6)
    assert result.interval == wilson_interval(2, 6)
    assert result == score(Table(rows), labelled(tmp_path, [0, 0, 1, 4, 5, 5], 6), batch=1)


def test_top5_of_five_classes_says_nothing(tmp_path: Path) -> None:
    assert score(Table(torch.eye(5)), labelled(tmp_path, [0, 1, 2, 3, 3], 5)).extra["top5"] is None


def test_equal_logits_count_once(tmp_path: Path) -> None:
    result = score(Table(torch.zeros(6, 6)), labelled(tmp_path, [0, 1, 2, 3, 4, 5], 6))
    assert (result.value, result.extra["top5"]) == (1 / 6, 5 / 6)  # not 100 %: it knows one class


@given(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=9), st.integers(0, 6))
def test_rank_is_the_place_in_a_stable_sort(rows: list[list[int]], label: int) -> None:
    ranks = label_rank(torch.tensor(rows, dtype=torch.float32), torch.full((len(rows),), label))
    assert ranks.tolist() == [sorted(range(7), key=lambda c, row=row: -row[c]).index(label) for row in rows]


def test_a_network_is_scored_in_eval_mode_and_left_as_it_was(tmp_path: Path) -> None:
    net = Table(torch.eye(3) + 1).train()
    net.drop.eval()
    assert score(net, labelled(tmp_path, [0, 1, 2], 3), batch=2).value == 1
    assert net.training and not net.drop.training and net.calls == [(2, False), (1, False)]
    with pytest.raises(IndexError):
        score(net.train(), labelled(tmp_path, [0] * 9, 3))
    assert net.training and net.drop.training  # also after an error


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_logits_are_no_result(tmp_path: Path, value: float) -> None:
    rows = torch.eye(4)
    rows[2, 3] = value
    with pytest.raises(RunFailed, match="expected finite logits, got NaN or infinity on 1 of 4 images"):
        score(Table(rows), labelled(tmp_path, [0, 1, 2, 3], 4))
    with pytest.raises(RunFailed, match="on 1 of 4 images"):
        agreement(Table(rows), teacher_of(torch.eye(4)), pixels(4))


# ---- without labels


def test_agreement_by_hand() -> None:
    teacher = torch.tensor([[2.0, 0, 1], [0, 3, 0], [1, 0, 0], [0, 0, 5]])
    student = torch.tensor([[1.0, 0, 2], [0, 4, 0], [1, 0, 0], [0, 1, 5]])
    result = agreement(Table(student), teacher_of(teacher), pixels(4), batch=3)
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    noise, signal = (teacher - student).square().sum().item(), teacher.square().sum().item()
    assert result.share == 0.75 and result.count == 4 and result.interval == wilson_interval(3, 4)
    assert result.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-12)
    assert result.sqnr == pytest.approx(10 * math.log10(signal / noise), rel=1e-12)  # 40 / 4: exactly 10 dB
    assert result.sqnr == pytest.approx(10.0)


def test_a_network_agrees_with_itself() -> None:
    rows = torch.randn(20, 10)
    result = agreement(Table(rows), teacher_of(rows), pixels(20))
    assert (result.share, result.kl, result.sqnr) == (1.0, 0.0, math.inf)


def test_batches_do_not_change_the_result() -> None:
    a, b = torch.randn(2, 30, 10)
    whole, parts = (agreement(Table(a), teacher_of(b), pixels(30), batch=size) for size in (30, 7))
    a, b = ([r.share, r.kl, r.sqnr, r.count] for r in (whole, parts))
    assert a == pytest.approx(b, rel=1e-12)
    assert whole.interval == parts.interval


def test_crops_show_what_typical_images_hide() -> None:
    """A student that looks at the middle of an image only, which is all there is in the whole images here."""
    teacher = load_teacher("digits")

    class Middle(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen = torch.zeros_like(images)
            seen[:, :, 2:6, 2:6] = images[:, :, 2:6, 2:6]
            return teacher.net(seen)  # type: ignore[no-any-return]

    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    typical = torch.zeros_like(images)
    typical[:, :, 2:6, 2:6] = images[:, :, 2:6, 2:6]
    facts = label_free(Middle(), teacher, typical, "typical images")
    assert facts["agreement"] == 1.0 and facts["agreement_inputs"] == "typical images"
    assert facts["crop_agreement"] < 0.95
    assert facts == label_free(Middle(), teacher, typical, "typical images")
    assert label_free(teacher.net, teacher, images, "")["crop_agreement"] == 1.0


def test_kl_is_at_temperature_one_and_survives_large_logits() -> None:
    teacher, student = torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])
    assert agreement(Table(student), teacher_of(teacher), pixels(1)).kl == pytest.approx(300, rel=1e-12)


# ---- interval and tables; golden values: scipy.stats.binomtest(...).proportion_ci(method="wilson")


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (9085, 10000, 0.9026911, 0.9139952),
    ],
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=1e-7)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_equation(pair: tuple[int, int]) -> None:
    right, count = pair
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for end in (low, high):  # |share - p| = z sqrt(p (1 - p) / n)
        if 0 < end < 1:
            assert abs(right / count - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / count), rel=1e-6)


def test_results_print_as_tables() -> None:
    assert str(Score("top1", 0.9085, 10, (0.9, 0.92), {"top5": 0.5})) == (
        "top1    90.85 %  (95 %: 90.00 to 92.00)\ntop5    50.00 %\nimages  10"
    )
    assert "top5" not in str(Score("top1", 0.9, 10, (0.8, 0.95), {"top5": None}))
    assert str(Agreement(0.5, (0.4, 0.6), 0.01234, math.inf, 3)).splitlines()[1:] == [
        "KL          0.01234 nats", "logit SQNR  inf dB", "images      3",
    ]  # fmt: skip


# ---- real networks


def test_the_shipped_digits_network_reaches_what_is_said() -> None:
    teacher = load_teacher("digits")
    result = score(teacher.net, load_data("digits", teacher))
    assert result.count == 599 and result.value >= 0.98
    assert f"{100 * result.value:.2f} % on the {result.count} held out" in EMBEDDED["digits"].about


@pytest.mark.parametrize(("name", "file", "low"), [("resnet20-cifar10", "cifar10_test", 0.88),
                                                   ("resnet20-cifar100", "cifar100_test", 0.60)])  # fmt: skip
def test_cifar_teachers_on_some_real_images(shared: Shared, name: str, file: str, low: float) -> None:
    teacher = load_teacher(name)
    data = load_data(f"npz:{shared / f'data/{file}.npz'}[:400]", teacher)  # dev
    assert score(teacher.net, data, batch=100).value > low


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet20-cifar100"])
def test_cifar_teachers_reach_what_is_said(shared: Shared, name: str) -> None:
    teacher = load_teacher(name)
    data = load_data(f"npz:{shared / ('data/' + name.partition('-')[2] + '_test.npz')}[2000:]", teacher)
    result = score(teacher.net, data)
    assert f"top-1 {100 * result.value:.2f} % on {data.name}" in EMBEDDED[name].about
