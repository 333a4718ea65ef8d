"""Presets become numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zsq.errors import BadInput
from zsq.presets import adversary_by_subject, choose, feed, generator_budget, settle, student_milestones
from zsq.sources.pool import PoolSource

SMALL, EDGE, LARGE = (3, 32, 32), (3, 64, 64), (3, 224, 224)


def test_the_published_schedule() -> None:
    # 400 epochs of 200 iterations; 4 (up to 64 pixels) or 50 (above) train only the generator
    for image, warmup, batch in ((SMALL, 4, 200), (EDGE, 4, 200), (LARGE, 50, 16)):
        row = generator_budget("paper", image)
        assert row == {"warmup": 200 * warmup, "steps": 200 * (400 - warmup), "batch": batch}


@pytest.mark.parametrize("image", [SMALL, LARGE])
def test_budgets_grow(image: tuple[int, int, int]) -> None:
    quick, standard, paper = (generator_budget(name, image) for name in ("quick", "standard", "paper"))
    assert quick["steps"] < standard["steps"] < paper["steps"]
    assert quick["warmup"] <= standard["warmup"] <= paper["warmup"]


def test_milestones_are_the_published_moments() -> None:
    # with the warm-up before them: epochs 100, 200, 300 of 400
    assert [800 + m for m in student_milestones(79_200, SMALL)] == [20_000, 40_000, 60_000]
    assert [10_000 + m for m in student_milestones(70_000, LARGE)] == [20_000, 40_000, 60_000]


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 300])
def test_milestones_of_short_runs(steps: int) -> None:
    found = student_milestones(steps, SMALL)
    assert list(found) == sorted(found) and min(found) >= 1


def test_later_tables_win_and_given_values_win_over_all() -> None:
    plan = settle({"a": 1, "b": 1, "c": 1}, {"b": 2, "c": 2}, c=3, a=None, d=None, e=False)
    assert vars(plan) == {"a": 1, "b": 2, "c": 3, "d": None, "e": False}


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf")])
def test_numbers_that_cannot_be_meant(value: float) -> None:
    with pytest.raises(BadInput, match=r"--weight-decay: expected a number from 0, got .*\. Correct it"):
        settle({}, weight_decay=value)


def test_an_unknown_preset_names_the_known_ones() -> None:
    assert choose("--budget", "a", {"a": 1, "b": 2}) == 1
    with pytest.raises(BadInput, match="--budget: expected one of a, b, got 'c'. Choose one of these."):
        choose("--budget", "c", {"a": 1, "b": 2})
    with pytest.raises(BadInput, match="one of quick, standard, paper, got 'slow'"):
        generator_budget("slow", SMALL)


def test_feed() -> None:
    pool = PoolSource(torch.zeros(16, 1, 4, 4), None, name="pool", batch=2)
    made: list[Any] = []
    assert feed(pool, lambda: made.append(1) or pool, batch=5) is pool and pool.batch == 5 and not made
    assert feed(None, lambda: made.append(1) or pool, batch=7) is pool and pool.batch == 5 and made
    with pytest.raises(BadInput, match="--batch"):
        feed(pool, lambda: pool, batch=0)


@pytest.mark.parametrize("image", [SMALL, LARGE])
def test_an_update_is_measured_in_steps_of_the_grid(image: tuple[int, int, int]) -> None:
    rates = {bits: adversary_by_subject(image, (bits, 4))["lr"] for bits in (3, 4, 8)}
    assert rates[3] == rates[4] == 16 * rates[8]


def test_drawn_images_take_no_more_than_a_quarter_of_a_gigabyte() -> None:
    sizes = (32, 32), (192, 192), (512, 512), (4096, 4096)
    counts = [adversary_by_subject((3, *size), (4, 4))["leaves"] for size in sizes]
    assert counts == [1024, 384, 85, 8]


def test_ranges_of_few_bits_are_narrow() -> None:
    kinds = [(image, (4, bits)) for image in (SMALL, LARGE) for bits in (4, 8)]
    found = [adversary_by_subject(*kind)["ranges"] for kind in kinds]
    assert found == ["cubed", "widening", "mse", "widening"]
