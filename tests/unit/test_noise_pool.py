"""The pool of optimised images: crops, the schedule, the file, resuming, bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tiny import tiny_teacher
from zsq import pipeline
from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.losses import bn_gap, cross_entropy
from zsq.run import Run
from zsq.sources.base import Batch, prepare
from zsq.sources.crops import CropSource, crop, crop_boxes, reinforce
from zsq.sources.noise_pool import Group, NoiseSource, Synthesis
from zsq.sources.pool import FILE, PoolSource
from zsq.teachers import Teacher
from zsq.view import View


def loss(view: View, batch: Batch) -> dict[str, Tensor]:
    return {"bn": bn_gap(view.norms), "class": cross_entropy(view.logits, batch.labels)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source(teacher: Teacher | None = None, **options: Any) -> NoiseSource:
    numbers = {"batch": 4, "count": 16, "iterations": 6, "group": 9, "lr": 0.2, "schedule": "cosine", **options}
    return NoiseSource(teacher or tiny_teacher(), lambda _: loss, name="noise", **numbers)


# ---- crops


def test_whole_images_stay_as_they_are() -> None:
    images = torch.randn(6, 3, 8, 8, generator=rng())
    boxes = crop_boxes(6, rng(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    flipped = boxes[:, 0, 0] < 0
    assert 0 < int(flipped.sum()) < 6
    assert torch.allclose(
        crop(images, boxes), torch.where(flipped[:, None, None, None], images.flip(3), images), atol=1e-5
    )


def test_boxes_lie_in_the_image_and_have_the_asked_area() -> None:
    boxes = crop_boxes(2000, rng(), scale=(0.5, 1.0))
    half = torch.stack([boxes[:, 0, 0].abs(), boxes[:, 1, 1]], 1)
    assert (boxes[:, :, 2].abs() + half <= 1 + 1e-6).all()
    area, ratio = half.prod(1), half[:, 0] / half[:, 1]
    assert area.max() <= 1 + 1e-6 and area.min() > 0.4 and 0.7 < area.mean() < 0.77
    assert ratio.min() >= 0.74 and ratio.max() <= 1.34


def test_a_crop_is_the_resized_window() -> None:
    images = torch.randn(2, 1, 8, 8, generator=rng())
    boxes = torch.tensor([[[0.5, 0.0, -0.5], [0.0, 0.5, 0.5]]]).repeat(2, 1, 1)  # left half, lower half
    window = nn.functional.interpolate(images[:, :, 4:, :4], size=(8, 8), mode="bilinear", align_corners=False)
    inner = (slice(None), slice(None), slice(1, 7), slice(1, 7))  # at the rim the window has no neighbours
    assert torch.allclose(crop(images, boxes)[inner], window[inner], atol=1e-5)


def test_one_coin_decides_for_the_whole_batch() -> None:
    images = torch.randn(4, 1, 8, 8, generator=rng())
    outcomes = [torch.equal(reinforce(images, rng(seed), scale=(0.5, 0.6)), images) for seed in range(60)]
    assert 15 < sum(outcomes) < 45


def test_crops_are_drawn_and_samples_are_whole() -> None:
    images = torch.randn(16, 1, 8, 8, generator=rng())
    plain = PoolSource(images, torch.arange(16) % 10, name="pool", batch=4, held_out=4)
    cropped = CropSource(plain, scale=(0.5, 0.6))
    cropped.batch = 5
    batch = cropped.draw(rng())
    assert plain.batch == 5 == len(batch.images) and batch.labels is not None
    assert not any(torch.equal(x, y) for x in batch.images for y in images)
    assert torch.equal(cropped.sample(3, rng()).images, plain.sample(3, rng()).images)
    prepare(cropped, Run(None, progress=False))  # a pool has nothing to prepare


# ---- the optimiser


def test_steps_are_those_of_torch_adam() -> None:
    teacher, labels = tiny_teacher(), torch.arange(6)
    with Run(None, progress=False) as run:
        work = Synthesis(teacher, labels, lambda _: loss, group=6, iterations=5, lr=0.3, schedule="cosine",
                         precision="float32")  # fmt: skip
        for number in range(5):
            work.step(number, run)
        x = torch.randn(6, 1, 8, 8, generator=run.rng("synthesise.group", 0)).requires_grad_()
    adam = torch.optim.Adam([x], 0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 5)
    from zsq.view import look

    for _ in range(5):
        adam.zero_grad()
        torch.stack(list(loss(look(teacher.net, x, norms=True), Batch(x, labels)).values())).sum().backward()
        adam.step()
        schedule.step()
    assert torch.allclose(work.result()[0], x, atol=1e-3)


def test_the_plateau_is_that_of_torch() -> None:
    values = [5.0, 4.0, 4.0, 4.5, 4.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.3, 3.4, 2.9, 2.95, 2.9, 2.9, 2.9, 2.9, 2.9]
    work = Synthesis(tiny_teacher(), torch.arange(2), lambda _: loss, group=2, iterations=1, lr=0.5, schedule="plateau",
                     patience=2)  # fmt: skip
    work._open(0, rng())
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], 0.5)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.1, patience=2, min_lr=1e-4)
    for value in values:
        work._watch(torch.tensor(value))
        torchs.step(value)
        assert work._now["lr"].item() == pytest.approx(adam.param_groups[0]["lr"], rel=1e-5)


def test_it_starts_as_asked() -> None:
    for start in (1.0, 0.0136):
        work = Synthesis(tiny_teacher(), torch.arange(64) % 10, lambda _: loss, group=64, iterations=1, lr=0.1,
                         schedule="cosine", start=start)  # fmt: skip
        work._open(0, rng())
        assert work._now["images"].std().item() == pytest.approx(start, rel=0.05)


def test_the_objective_falls_and_groups_see_the_finished() -> None:
    seen: list[Group] = []

    def loss_of(group: Group) -> Any:
        seen.append(group)
        return loss

    teacher = tiny_teacher()
    made = NoiseSource(teacher, loss_of, name="noise", batch=4, count=16, iterations=30, group=9, lr=0.3,
                       schedule="plateau")  # fmt: skip
    with Run(None, progress=False) as run:
        made.prepare(run)
    assert [(len(group.labels), len(group.images), len(group.image_labels)) for group in seen] == [(9, 0, 0), (9, 9, 9)]
    batch = made.draw(rng())
    assert batch.labels is not None and batch.images.shape == (4, 1, 8, 8)
    assert (teacher.net(seen[1].images).argmax(1) == seen[1].image_labels).float().mean() > 0.4  # chance is 0.1


# ---- the file


def test_the_pool_is_kept_and_read_back(tmp_path: Path) -> None:
    teacher, made = tiny_teacher(), source()
    with Run(tmp_path / "run", progress=False) as run:
        made.prepare(run)
    tree = load_tree(tmp_path / "run" / FILE)
    assert tree["images"].shape == (18, 1, 8, 8) and tree["labels"].shape == (18,)
    assert torch.bincount(tree["labels"], minlength=10).max() == 2  # balanced
    with safe_open(tmp_path / "run" / FILE, "pt") as file:
        facts = json.loads(file.metadata()["provenance"])
    assert facts.keys() == {"method", "teacher", "fingerprint", "seed", "pixels", "images", "iterations", "group", "lr",
                            "schedule", "precision", "start"}  # fmt: skip
    assert facts["method"] == "noise" and facts["fingerprint"] == teacher.fingerprint and facts["iterations"] == 6
    again = pipeline.load_pool(str(tmp_path / "run" / FILE), teacher)
    assert again is not None and again.sample(2, rng()).labels is not None
    held = {tuple(x.flatten().tolist()) for x in tree["images"][-2:]}
    drawn = torch.cat([made.draw(rng(seed)).images for seed in range(30)])
    assert not held & {tuple(x.flatten().tolist()) for x in drawn}
    assert {tuple(x.flatten().tolist()) for x in made.sample(9, rng()).images} == held


def test_a_pool_of_another_teacher_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path / "run", progress=False) as run:
        source().prepare(run)
    with pytest.raises(BadInput, match=r"shape \[n, 1, 16, 16\].*got .*\[18, 1, 8, 8\]"):
        pipeline.load_pool(str(tmp_path / "run" / FILE), tiny_teacher(16))


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    made = source(labelled=False)
    with Run(tmp_path / "run", progress=False) as run:
        made.prepare(run)
    assert made.draw(rng()).labels is None and set(load_tree(tmp_path / "run" / FILE)) == {"images"}


# ---- resuming


class _Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 6, 8, 11])
def test_an_interrupted_pool_goes_on(after: int, tmp_path: Path) -> None:
    crops = partial(reinforce, scale=(0.5, 1.0))

    def make(path: Path, *, stop: int | None = None, resume: bool = False) -> Tensor:
        made = source(augment=crops, schedule="plateau")
        with Run(path, resume=resume, checkpoint_every=1, progress=False) as run:
            real = run.log

            def log(**terms: Any) -> None:
                log.calls += 1  # type: ignore[attr-defined]
                if stop is not None and log.calls > stop:  # type: ignore[attr-defined]
                    raise _Stop
                real(**terms)

            log.calls = 0  # type: ignore[attr-defined]
            run.log = log  # type: ignore[method-assign]
            made.prepare(run)
        return load_tree(path / FILE)["images"]

    straight = make(tmp_path / "straight")
    with pytest.raises(_Stop):
        make(tmp_path / "broken", stop=after)
    assert not (tmp_path / "broken" / FILE).exists()
    with pytest.raises(BadInput, match="interrupted while it made it. Finish that run first"):
        pipeline.load_pool(str(tmp_path / "broken" / FILE), tiny_teacher())
    assert torch.equal(make(tmp_path / "broken", resume=True), straight)


def test_prepare_is_done_once_and_needed() -> None:
    made = source()
    with pytest.raises(ValueError, match="prepare"):
        made.draw(rng())
    with Run(None, progress=False) as run:
        made.prepare(run)
        first = made.draw(rng()).images
        made.prepare(run)
    assert torch.equal(first, made.draw(rng()).images)


# ---- what it refuses


@pytest.mark.parametrize(
    "option", [{"batch": 0}, {"count": 7}, {"iterations": 0}, {"group": 1}, {"schedule": "steps"}], ids=str
)
def test_numbers_that_cannot_be_meant(option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(option))}: expected"):
        source(**option)


def test_a_teacher_without_batchnorm(bn_free_net: nn.Module) -> None:
    teacher = Teacher(bn_free_net, "flat", "classify", 10, (3, 8, 8))
    with Run(None, progress=False) as run, pytest.raises(BadInput, match="BatchNorm"):
        source(teacher).prepare(run)
