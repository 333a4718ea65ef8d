"""A pool of images optimised from noise, made before the first draw as a stage of the run, and kept as a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.run import Run
from zsq.sources.base import Batch
from zsq.sources.generator import Loss, autocast, learning
from zsq.sources.noise import balanced_labels
from zsq.sources.pool import HELD_OUT, MadePool
from zsq.view import frozen, look

if TYPE_CHECKING:
    from zsq.teachers import Teacher

STAGE = "synthesise"
FACTOR, LOWEST = 0.1, 1e-4  # of the published learning-rate schedule


class Group(NamedTuple):
    """Images that are optimised together.

    Attributes:
        labels: their classes, int64 [b].
        rng: for what the loss draws once per group.
        images: finished images of earlier groups, [m, c, h, w].
        image_labels: their classes, int64 [m].
    """

    labels: Tensor
    rng: torch.Generator
    images: Tensor
    image_labels: Tensor


LossOf = Callable[[Group], Loss]
Augment = Callable[[Tensor, torch.Generator], Tensor]


class Synthesis:
    """Images optimised by Adam through the frozen teacher, group after group; all of its state fits into a checkpoint.

    Args:
        teacher: gives `net` and `image`.
        labels: the class of each image, int64 [n].
        loss_of: makes the loss of a group; asked again, with the same numbers, when a run resumes inside it.
        group: images optimised together; n are spread evenly over ceil(n / group) groups.
        iterations: Adam steps per group.
        lr: of Adam, in units of the teacher's normalised space.
        schedule: ``"cosine"`` to 0 along half a cosine, or ``"plateau"``: times 0.1, down to 1e-4, after
            `patience` steps without a new best loss.
        augment: changes the images in front of the teacher, e.g. random crops.
        features: modules whose outputs (``NAME:input``: inputs) the loss needs.
        precision: of the teacher, its own if not given; images, statistics and losses are float32.
        start: standard deviation of the normal noise that every image starts as.
        patience: of the plateau.
    """

    def __init__(
        self,
        teacher: Teacher,
        labels: Tensor,
        loss_of: LossOf,
        *,
        group: int,
        iterations: int,
        lr: float,
        schedule: Literal["cosine", "plateau"],
        augment: Augment | None = None,
        features: Sequence[str] = (),
        precision: Literal["bf16", "float32"] | None = None,
        start: float = 1.0,
        patience: int = 50,
    ) -> None:
        self._teacher, self._loss_of, self._features, self._augment = teacher, loss_of, tuple(features), augment
        self._iterations, self._lr, self._schedule = iterations, lr, schedule
        self._precision = precision or teacher.precision
        self._device = next(teacher.net.parameters()).device
        self._labels = list(labels.to(self._device).tensor_split(math.ceil(len(labels) / group)))
        self.total = len(self._labels) * iterations
        self.finished: dict[int, Tensor] = {}
        self._start, self._patience, self._group = start, patience, -1
        self._loss: Loss | None = None
        self._now: dict[str, Tensor] = {}  # images of the current group, Adam's moments, and the plateau's numbers

    def step(self, number: int, run: Run) -> dict[str, Tensor]:
        """One Adam step; the terms of the loss, detached."""
        group, iteration = divmod(number, self._iterations)
        if group != self._group or self._loss is None:
            self._open(group, run.rng(f"{STAGE}.group", group))
        rate = self._now["lr"]
        if self._schedule == "cosine":
            rate = rate * ((1 + math.cos(math.pi * iteration / self._iterations)) / 2)
        gradient, terms = self._gradient(self._labels[group], run.rng(STAGE, number))
        self._adam(gradient, rate, iteration + 1)
        if self._schedule == "plateau":
            self._watch(torch.stack(list(terms.values())).sum())
        if iteration + 1 == self._iterations:
            self.finished[group] = self._now["images"].clone()
        return terms

    def result(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the finished groups."""
        order = sorted(self.finished)
        empty = torch.empty(0, *self._teacher.image, device=self._device)
        images = torch.cat([empty, *(self.finished[group] for group in order)])
        return images, torch.cat([self._labels[0][:0], *(self._labels[group] for group in order)])

    def state_dict(self) -> dict[str, Any]:
        return {"finished": dict(self.finished), "group": self._group, "now": dict(self._now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.finished = {group: images.to(self._device) for group, images in state["finished"].items()}
        self._now = {name: value.to(self._device) for name, value in state["now"].items()}
        self._group, self._loss = state["group"], None

    def _open(self, group: int, rng: torch.Generator) -> None:
        """Begin a group, or, after a checkpoint was read, make its loss again from the same numbers."""
        start = torch.randn(len(self._labels[group]), *self._teacher.image, generator=rng)
        if group != self._group:
            images = start.to(self._device) * self._start
            numbers = {"lr": self._lr, "best": math.inf, "waited": 0.0}
            self._now = {"images": images, "first": torch.zeros_like(images), "second": torch.zeros_like(images)}
            self._now |= {name: torch.tensor(value, device=self._device) for name, value in numbers.items()}
        self._group = group
        self._loss = self._loss_of(Group(self._labels[group], rng, *self.result()))

    def _gradient(self, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        net, loss = self._teacher.net, self._loss
        if loss is None:
            raise ValueError("expected an open group")
        with learning(), frozen(net), autocast(self._device, "float32"):
            # The layout that tensor cores want; always from contiguous images, so that a resumed run has the same bits.
            x = self._now["images"].to(memory_format=torch.channels_last, copy=True).requires_grad_()
            seen = x if self._augment is None else self._augment(x, rng)
            with autocast(self._device, self._precision):
                view = look(net, seen, norms=True, features=self._features)
            view = view._replace(logits=view.logits.float())
            terms = dict(loss(view, Batch(seen, labels)))
            (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), x)
        return gradient.contiguous(), {name: term.detach() for name, term in terms.items()}

    def _adam(self, gradient: Tensor, rate: Tensor, count: int) -> None:
        """Adam with its usual betas; the rate stays on the device, which torch's class would read back."""
        now = self._now
        with torch.no_grad():
            now["first"].lerp_(gradient, 0.1)
            now["second"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            spread = (now["second"] / (1 - 0.999**count)).sqrt_().add_(1e-8)
            now["images"].sub_(rate * (now["first"] / (1 - 0.9**count)) / spread)

    def _watch(self, total: Tensor) -> None:
        """Lower the rate after `patience` steps without a new best; torch's scheduler would read the total back."""
        now = self._now
        better = total < now["best"] * (1 - 1e-4)
        now["best"] = torch.where(better, total, now["best"])
        now["waited"] = torch.where(better, 0.0, now["waited"] + 1)
        late = now["waited"] > self._patience
        now["lr"] = torch.where(late, (now["lr"] * FACTOR).clamp_min(LOWEST), now["lr"])
        now["waited"] = torch.where(late, 0.0, now["waited"])


class NoiseSource(MadePool):
    """Batches from a pool of optimised images. `prepare` makes the pool; `calibrate` and `fit` ask for it.

    An eighth more images than asked for are made and held out: `sample` reads only those.

    Args:
        teacher: what the images are optimised through.
        loss_of: makes the loss of a group of images.
        name: for logs and summaries.
        batch: images per draw.
        count: images to draw from; their classes are balanced.
        iterations, group, lr, schedule, augment, features, precision, start, patience: see `Synthesis`.
        labelled: whether the images belong to classes; if not, batches and file have no labels.

    Raises:
        BadInput: a count, number of iterations or batch below 1, or a learning rate that is none.
    """

    def __init__(
        self,
        teacher: Teacher,
        loss_of: LossOf,
        *,
        name: str,
        batch: int,
        count: int,
        iterations: int,
        group: int,
        lr: float,
        schedule: Literal["cosine", "plateau"],
        augment: Augment | None = None,
        features: Sequence[str] = (),
        precision: Literal["bf16", "float32"] | None = None,
        start: float = 1.0,
        patience: int = 50,
        labelled: bool = True,
    ) -> None:
        for option, value, least in (("--batch", batch, 1), ("--count", count, 8), ("--iterations", iterations, 1),
                                     ("--group", group, 2)):  # fmt: skip
            if value < least:
                raise BadInput(option, expected=f"a number from {least}", got=value, fix="Choose a larger one.")
        if schedule not in ("cosine", "plateau"):
            raise BadInput("--image-schedule", expected="cosine or plateau", got=repr(schedule), fix="Choose one.")
        facts = {"images": f"{count} and an eighth more, held out at the end", "iterations": iterations, "group": group,
                 "lr": lr, "schedule": schedule, "precision": precision or teacher.precision,
                 "start": start}  # fmt: skip
        super().__init__(teacher, name=name, batch=batch, facts=facts)
        self._count, self._labelled = count, labelled
        self._make: Callable[[Tensor], Synthesis] = lambda labels: Synthesis(
            teacher, labels, loss_of, group=group, iterations=iterations, lr=lr, schedule=schedule, augment=augment,
            features=features, precision=precision, start=start, patience=patience,
        )  # fmt: skip

    def prepare(self, run: Run) -> None:
        """Make the pool as stage `synthesise` of the run, and write it to ``pool.safetensors`` in its directory."""
        if self._pool is not None:
            return
        count = self._count + self._count // (HELD_OUT - 1)
        work = self._make(balanced_labels(self._teacher.classes, count, run.rng(f"{STAGE}.labels", 0)))
        for number in run.steps(STAGE, work.total, pool=work):
            run.log(**work.step(number, run))
        images, made_for = work.result()
        self._keep(images, made_for if self._labelled else None, run)
