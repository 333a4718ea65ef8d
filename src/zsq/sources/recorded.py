"""A pool of the images that generators show while they learn, made before the first draw and kept as a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.run import Run
from zsq.sources.generator import GeneratorSource
from zsq.sources.pool import HELD_OUT, MadePool

if TYPE_CHECKING:
    from zsq.teachers import Teacher

STAGE = "record"

Build = Callable[[], GeneratorSource]


class Recording:
    """Generators that learn one after the other, and what they showed; all of its state fits into a checkpoint.

    Args:
        builds: each makes a generator; called when its turn comes.
        lead: first steps of each, whose images are not kept.
        steps: steps of each, warm-up included.
    """

    def __init__(self, builds: Sequence[Build], *, lead: int, steps: int) -> None:
        self._builds, self._lead, self._steps = list(builds), lead, steps
        self.total = len(self._builds) * steps
        self._turn = -1
        self._source: GeneratorSource | None = None
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []

    def step(self, number: int, run: Run) -> dict[str, Tensor]:
        """One step of the generator whose turn it is; the terms of its loss, detached."""
        turn, done = divmod(number, self._steps)
        if turn != self._turn or self._source is None:
            self._turn, self._source = turn, self._built(turn, run.rng(f"{STAGE}.generator", turn))
        batch = self._source.draw(run.rng(STAGE, number))
        if done >= self._lead and batch.labels is not None:
            self._images.append(batch.images.half().contiguous())
            self._labels.append(batch.labels)
        return self._source.metrics

    def result(self) -> tuple[Tensor, Tensor]:
        """What was kept, oldest first: images [n, c, h, w] in half precision, labels [n]."""
        return torch.cat(self._images), torch.cat(self._labels)

    def state_dict(self) -> dict[str, Any]:
        source = None if self._source is None else self._source.state_dict()
        return {"turn": self._turn, "source": source, "images": self._images, "labels": self._labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._turn, self._source = state["turn"], None
        self._images, self._labels = list(state["images"]), list(state["labels"])
        if state["source"] is not None:
            self._source = self._builds[self._turn]()
            self._source.load_state_dict(state["source"])

    def _built(self, turn: int, rng: torch.Generator) -> GeneratorSource:
        """A generator whose first weights are its own, whatever was drawn before: the same after a resume."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            return self._builds[turn]()


class RecordedSource(MadePool):
    """Batches from a pool of generators' images. `prepare` makes the pool; `calibrate` and `fit` ask for it.

    A generator that learns shows other images at every step, and none of them depends on the student: made once, they
    can be drawn many times and in any order, each time for a fraction of what a step of the generator costs.

    An eighth more images than asked for are made and, chosen at random, held out: `sample` reads only those.

    Args:
        teacher: what the generators learn from.
        builds: each makes a generator; they learn one after the other.
        name: for logs and summaries.
        batch: images per draw.
        count: images to draw from, at least.
        shown: images a generator shows per step; `builds` make it so.
        lead: first steps of each generator, whose images are not kept.

    Raises:
        BadInput: a count or batch below 1.
    """

    def __init__(
        self, teacher: Teacher, builds: Sequence[Build], *, name: str, batch: int, count: int, shown: int, lead: int
    ) -> None:
        for option, value, least in (("--batch", batch, 1), ("--count", count, 8), ("--shown", shown, 2)):
            if value < least:
                raise BadInput(option, expected=f"a number from {least}", got=value, fix="Choose a larger one.")
        kept = math.ceil((count + count // (HELD_OUT - 1)) / len(builds) / shown)
        facts = {"generators": len(builds), "images per step": shown, "lead": lead, "steps kept": kept}
        super().__init__(teacher, name=name, batch=batch, facts=facts)
        self._make = lambda: Recording(builds, lead=lead, steps=lead + kept)

    def prepare(self, run: Run) -> None:
        """Make the pool as stage `record` of the run, and write it to ``pool.safetensors`` in its directory."""
        if self._pool is not None:
            return
        work = self._make()
        for number in run.steps(STAGE, work.total, recording=work):
            run.log(**work.step(number, run))
        images, labels = work.result()
        order = torch.randperm(len(images), generator=run.rng(f"{STAGE}.order", 0)).to(images.device)
        self._keep(images[order], labels[order], run)
