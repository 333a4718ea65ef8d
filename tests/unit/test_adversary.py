"""The adversarial source: what its steps do, its memory, its restarts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import tiny_teacher
from zsq import recipes
from zsq.discrepancy import output_gap
from zsq.errors import BadInput
from zsq.insert import QuantSpec, freeze_ranges, quantize
from zsq.sources.adversary import AdversarySource
from zsq.sources.replay import Replay
from zsq.teachers import Teacher


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def teacher() -> Teacher:
    return tiny_teacher()


def make(teacher: Teacher, *, calibrated: bool = True, batch: int = 16, **options: Any) -> AdversarySource:
    torch.manual_seed(5)
    student, _ = quantize(teacher.net, QuantSpec(weight_bits=3, act_bits=3))
    student.eval()
    if calibrated:
        with torch.no_grad():
            student(torch.randn(64, *teacher.image, generator=rng(4)))
        freeze_ranges(student)

    source: AdversarySource = recipes.module("zaq").source(teacher, student=student, batch=batch, width=8, **options)
    return source


def gap(source: AdversarySource, teacher: Teacher) -> float:
    x = source.sample(128, rng(99)).images
    with torch.no_grad():
        return float(output_gap(source._student(x), teacher.net(x)))


# ---- its steps


def test_it_widens_the_gap(teacher: Teacher) -> None:
    source = make(teacher, turns=1, features="off")
    before = gap(source, teacher)
    for step in range(60):
        source.draw(rng(step))
    assert gap(source, teacher) > 1.3 * before


def test_five_batches_for_every_step(teacher: Teacher) -> None:
    source = make(teacher)
    learned = []
    for step in range(12):
        before = copy.deepcopy(source.generator.state_dict())
        source.draw(rng(step))
        after = source.generator.state_dict()
        learned.append(any(not torch.equal(before[key], after[key]) for key in before))
    assert learned == [step in (5, 10) for step in range(12)]


def test_while_ranges_are_observed_it_does_not_learn(teacher: Teacher) -> None:
    source = make(teacher, calibrated=False, turns=1)
    before = copy.deepcopy(source.generator.state_dict()), copy.deepcopy(source._student.state_dict())
    for step in range(3):
        source.draw(rng(step))
    after = source.generator.state_dict(), source._student.state_dict()
    assert all(torch.equal(old[key], new[key]) for old, new in zip(before, after, strict=True) for key in old)


@pytest.mark.parametrize(("damping", "low", "high"), [("on", 3.8, 4.2), ("off", 45, 60)])
def test_damping_bounds_the_reward(teacher: Teacher, damping: str, low: float, high: float) -> None:
    """A student that is about 50 away everywhere: log(51) instead of 50."""
    source = make(teacher, damping=damping, features="off")
    with torch.no_grad():
        source._student.get_parameter("8.bias").add_(50)
    for step in range(6):
        source.draw(rng(step))
    reward = -float(source.metrics["g_gap"])
    assert low < reward < high


def test_statistics_only_on_request(teacher: Teacher) -> None:
    source = make(teacher, bns_weight=0.1, turns=1)
    assert source.name == "zaq+bns" and make(teacher).name == "zaq"
    source.draw(rng())
    source.draw(rng(1))
    assert source.metrics["g_bns"] > 0


# ---- its memory


def test_a_quarter_of_each_batch_is_remembered(teacher: Teacher) -> None:
    source = make(teacher)
    first = source.draw(rng()).images
    again = source.draw(rng(1)).images[12:]
    distance = (again[:, None] - first[None]).flatten(2).abs().amax(2)
    assert distance.amin(1).max() < 0.03  # 8 bits per pixel
    alone = make(teacher, replay=0.0)
    alone.draw(rng())
    assert (alone.draw(rng(1)).images[12:, None] - first[None]).flatten(2).abs().amax(2).min() > 0.1


def test_first_in_first_out() -> None:
    memory = Replay(5)
    for value in range(4):
        memory.push(torch.full((2, 1, 1, 2), float(value)) + torch.tensor([0.0, 0.5]))
    assert len(memory) == 5
    kept = {float(x) for x in memory.pick(200, rng())[:, 0, 0, 0]}
    assert kept == {1.0, 2.0, 3.0}
    other = Replay(5)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(memory.pick(9, rng(1)), other.pick(9, rng(1)))
    memory.push(torch.arange(14.0).reshape(7, 1, 1, 2))  # more than fit: the last ones
    assert {float(x) for x in memory.pick(200, rng())[:, 0, 0, 0]} == {4.0, 6.0, 8.0, 10.0, 12.0}


def test_an_empty_memory_gives_nothing() -> None:
    with pytest.raises(ValueError, match="images to have been pushed"):
        Replay(3).pick(1, rng())


# ---- its restarts


def collapse(source: AdversarySource) -> None:
    with torch.no_grad():
        source.generator.linear.weight.zero_()  # type: ignore[union-attr, operator]


def test_a_collapsed_generator_starts_afresh_and_says_so(teacher: Teacher) -> None:
    said: list[str] = []
    source = make(teacher, say=said.append, generator_lr=0.0)
    collapse(source)
    images = [source.draw(rng(step)).images for step in range(22)]
    assert images[19].std(0).mean() < 0.5 and images[20].std(0).mean() > 0.5
    assert len(said) == 1 and "restarted after 20 batches" in said[0]
    assert float(source.metrics["g_restarts"]) == 1
    assert float(make(teacher, say=said.append).draw(rng()).images.std(0).mean()) > 0.5 and len(said) == 1


def test_a_restart_is_resumed_to_the_bit(teacher: Teacher) -> None:
    whole = make(teacher)
    collapse(whole)
    expected = [whole.draw(rng(step)).images for step in range(30)][-1]
    first, second = make(teacher), make(teacher)
    collapse(first)
    for step in range(17):
        first.draw(rng(step))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(17, 30):
        resumed = second.draw(rng(step)).images
    assert torch.equal(expected, resumed)
    assert float(second.metrics["g_restarts"]) == float(whole.metrics["g_restarts"]) >= 1


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_restarts_and_poisons_nothing(teacher: Teacher, broken: float) -> None:
    said: list[str] = []
    source = make(teacher, turns=1, say=said.append)
    real = source._loss
    source._loss = lambda s, t: {name: term * broken for name, term in real(s, t).items()}
    for step in range(20):
        images = source.draw(rng(step)).images
        assert images.isfinite().all()
        assert all(term.isfinite() for term in source.metrics.values())
    source._loss = real
    source.draw(rng(20))
    assert len(said) == 1 and "not finite" in said[0]
    assert all(p.isfinite().all() for p in source.generator.parameters())


def test_weights_that_are_not_finite_give_grey_images_until_the_restart(teacher: Teacher) -> None:
    source = make(teacher)
    with torch.no_grad():
        source.generator.last.weight.fill_(float("inf"))  # type: ignore[union-attr, operator]
    images: list[Tensor] = [source.draw(rng(step)).images for step in range(21)]
    assert all(x.isfinite().all() for x in images)
    assert images[20].std(0).mean() > 0.5


def test_without_the_switch_nothing_restarts(teacher: Teacher) -> None:
    source = make(teacher, restart="off", generator_lr=0.0)
    collapse(source)
    assert all(float(source.draw(rng(step)).images.std(0).mean()) < 0.5 for step in range(41))


# ---- what it refuses


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch": 1}, "--batch: expected at least 2 images, got 1"),
        ({"turns": 0}, "--turns: expected a whole number from 1, got 0"),
        ({"replay": 1.0}, "--replay: expected a share from 0, below 1, got 1.0"),
    ],
)
def test_numbers_that_cannot_be_meant(teacher: Teacher, option: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(teacher, **option)


def test_an_empty_sample_is_refused(teacher: Teacher) -> None:
    with pytest.raises(BadInput, match="sample: expected at least 1 image"):
        make(teacher).sample(0, rng())
