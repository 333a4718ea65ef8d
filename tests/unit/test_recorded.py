"""The pool that generators leave behind: what is kept, the file, and a kill between any two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tiny import tiny_teacher
from zsq import pipeline
from zsq.errors import BadInput
from zsq.generators import ConditionalGenerator
from zsq.losses import bn_gap, cross_entropy
from zsq.run import Run
from zsq.sources.base import Batch
from zsq.sources.generator import GeneratorSource
from zsq.sources.pool import FILE
from zsq.sources.recorded import RecordedSource, Recording
from zsq.teachers import Teacher
from zsq.view import View


def loss(view: View, batch: Batch) -> dict[str, torch.Tensor]:
    return {"ce": cross_entropy(view.logits, batch.labels), "bns": 0.1 * bn_gap(view.norms)}


def generator(teacher: Teacher) -> GeneratorSource:
    net = ConditionalGenerator(teacher.classes, teacher.image, latent=8)
    return GeneratorSource(teacher, net, loss, name="test", batch=6)


def recorded(teacher: Teacher, generators: int = 2, **options: Any) -> RecordedSource:
    numbers = {"batch": 4, "count": 32, "shown": 6, "lead": 2, **options}
    return RecordedSource(teacher, [lambda: generator(teacher)] * generators, name="test", **numbers)


def pool_of(path: Path | None, *, seed: int = 0, resume: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    source = recorded(tiny_teacher(), **options)
    with Run(path, seed=seed, progress=False, resume=resume, checkpoint_every=1) as run:
        source.prepare(run)
    drawn, held = source.pick(10**6, torch.Generator()), source.sample(10**6, torch.Generator())
    assert drawn.labels is not None
    return {"drawn": drawn.images, "labels": drawn.labels, "held": held.images}


def test_what_is_kept_is_what_the_generators_showed_after_their_warm_up() -> None:
    teacher = tiny_teacher()
    work = Recording([lambda: generator(teacher)] * 2, lead=2, steps=5)
    with Run(None, progress=False) as run:
        shown = []
        real = GeneratorSource.draw

        def draw(source: GeneratorSource, rng: torch.Generator) -> Batch:
            shown.append(real(source, rng))
            return shown[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GeneratorSource, "draw", draw)
            for number in run.steps("record", work.total):
                run.log(**work.step(number, run))
    images, labels = work.result()
    expected = [shown[i] for i in (2, 3, 4, 7, 8, 9)]
    assert torch.equal(images, torch.cat([batch.images for batch in expected]).half())
    assert torch.equal(labels, torch.cat([batch.labels for batch in expected if batch.labels is not None]))
    assert not torch.equal(shown[0].images, shown[5].images)  # the second generator begins as another network


def test_enough_images_are_made_and_one_in_nine_is_held_out() -> None:
    found = pool_of(None)
    assert len(found["drawn"]) >= 32 and len(found["held"]) == (len(found["drawn"]) + len(found["held"])) // 9
    assert found["drawn"].dtype == torch.float32
    both = torch.cat([found["drawn"], found["held"]]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_the_file_says_how_it_was_made_and_feeds_any_recipe(tmp_path: Path) -> None:
    found = pool_of(tmp_path / "run")
    with safe_open(tmp_path / "run" / FILE, "pt") as file:
        facts = json.loads(file.metadata()["provenance"])
    assert (facts["method"], facts["generators"], facts["images per step"], facts["lead"]) == ("test", 2, 6, 2)
    pool = pipeline.load_pool(str(tmp_path / "run" / FILE), tiny_teacher())
    assert pool is not None
    held = pool.sample(10**6, torch.Generator()).images
    assert sorted(held.flatten(1).sum(1).tolist()) == pytest.approx(sorted(found["held"].flatten(1).sum(1).tolist()))


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", [1, 5, 6, 9])  # in the first generator, at its end, in the second
def test_a_killed_run_ends_with_the_same_bits(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pool_of(tmp_path / "whole")
    count, real = 0, Run.log

    def log(run: Run, **terms: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        real(run, **terms)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "log", log)
        pool_of(tmp_path / "cut")
    again = pool_of(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_seeds_make_other_images() -> None:
    assert not torch.equal(pool_of(None)["drawn"], pool_of(None, seed=1)["drawn"])


@pytest.mark.parametrize(("option", "value"), [("count", 0), ("shown", 1), ("batch", 0)])
def test_numbers_that_cannot_be_meant_are_refused(option: str, value: int) -> None:
    with pytest.raises(BadInput, match=f"--{option}: expected a number from"):
        recorded(tiny_teacher(), **{option: value})
