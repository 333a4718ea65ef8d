"""The two loops that most recipes share: ranges from synthetic batches, then distillation into the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.insert import activation_quantizers, freeze_ranges, observe_ranges
from zsq.insert.integers import on_integers, require_small
from zsq.precision import trainable_at, view_at, wide
from zsq.run import Run
from zsq.run.stage import Stateful
from zsq.sources.base import Batch, Source, prepare
from zsq.view import View

if TYPE_CHECKING:
    from zsq.teachers import Teacher

StudentLoss: TypeAlias = Callable[[View, View, Batch], Mapping[str, Tensor]]
Gradient: TypeAlias = Callable[[Batch, float], Mapping[str, Tensor]]


class Schedule(Stateful, Protocol):
    """A learning-rate schedule, as in ``torch.optim.lr_scheduler``."""

    def step(self) -> Any:
        """Advance by one update."""


def calibrate(
    student: nn.Module,
    source: Source,
    *,
    steps: int,
    run: Run,
    observe_last: int | None = None,
    stage: str = "calibrate",
) -> None:
    """Let the source learn, and fix the student's activation ranges from its batches.

    Args:
        student: with quantizers; put into eval mode. Its ranges are frozen when this returns.
        source: read once per step.
        steps: number of batches.
        run: logs, saves and resumes.
        observe_last: only this many last batches pass through the student; None for all. A running range remembers
            about ten batches, so earlier forwards only cost time.
        stage: name of the stage.

    Raises:
        BadInput: if no batch would be observed although the student has activation ranges.
    """
    observed = steps if observe_last is None else min(observe_last, steps)
    if observed < 1 and activation_quantizers(student):
        fix = "Without one, activation ranges are unknown."
        raise BadInput(f"stage {stage}", expected="at least one observed batch", got=f"{observed}", fix=fix)
    prepare(source, run)
    student.eval()
    observe_ranges(student)
    for step in run.steps(stage, steps, student=student, source=source):
        batch = source.draw(run.rng(stage, step))
        if step >= steps - observed:
            with torch.no_grad():
                student(batch.images)
        run.log(**source.metrics)
    freeze_ranges(student)


def fit(
    student: nn.Module,
    teacher: Teacher,
    source: Source,
    loss: StudentLoss | None,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    run: Run,
    schedulers: Sequence[Schedule] = (),
    inundation: Stateful | None = None,
    features: Sequence[str] = (),
    stage: str = "fit",
    micro_batch: int | None = None,
    history_of: Callable[[], Mapping[str, Any]] | None = None,
    precision: Literal["float32", "bf16", "integers"] | None = None,
    gradient: Gradient | None = None,
) -> None:
    """Distil the teacher into the student on the source's images.

    BatchNorm statistics of both stay as they are. Nothing is read from the device between two logged lines.

    Args:
        student: with quantizers, its ranges fixed; put into eval mode.
        teacher: the float network; asked only where the batch does not bring its view along.
        source: read once per step; it may learn.
        loss: student's view, teacher's view (detached) and batch to named terms, which are summed. Each term is a mean
            over the batch. None if `gradient` is given.
        optimizer: of the student's parameters.
        steps: number of updates.
        run: logs, saves and resumes.
        schedulers: learning-rate schedules, advanced after every update.
        inundation: gradient inundation, already hooked to `optimizer`; only its state is handled here.
        features: names of modules whose outputs the loss needs, in student and teacher alike.
        stage: name of the stage.
        micro_batch: pass at most this many images at a time through the student; the gradient is the same.
        history_of: gives the tensors of one history snapshot.
        precision: of the student's products; quantizers and losses stay float32. bf16 becomes float32, with a note,
            where torch's gradients are wrong in it (`zsq.precision`). integers: of codes where both factors
            are on a grid (`zsq.insert.integers`), exact forwards, gradients rounded to bfloat16; the others in
            float32. bf16: convolutions and linear layers of both networks in bfloat16. None: integers if the
            teacher's precision is bf16, else float32.
        gradient: takes the place of forward, loss and backward: given a part of a batch and its share, adds the share's
            gradient to the student's parameters and returns the part's terms.

    Raises:
        BadInput: if the optimizer does not own the student's parameters, or an argument is out of range.
        RunFailed: if the loss or a weight is not finite.
        Interrupted: if a signal stopped the run.
    """
    wanted = precision or ("integers" if teacher.precision == "bf16" else "float32")
    _check(student, optimizer, micro_batch, wanted)
    chosen = trainable_at(student, wanted)
    if chosen != wanted:
        run.note(f"{stage}: float32 instead of {wanted}, whose gradient of grouped convolutions with dilation is wrong")
    add_gradient = gradient or partial(_loss_gradient, student, teacher.net, loss, features, chosen)
    prepare(source, run)
    student.eval()
    objects: dict[str, Stateful] = {"student": student, "source": source, "optimizer": optimizer}
    objects |= {f"scheduler{i}": schedule for i, schedule in enumerate(schedulers)}
    if inundation is not None:
        objects["inundation"] = inundation
    with on_integers(student) if chosen == "integers" else nullcontext(()) as plans:
        for step in run.steps(stage, steps, history_of=history_of, **objects):
            batch = source.draw(run.rng(stage, step))
            optimizer.zero_grad(set_to_none=True)
            terms: dict[str, Tensor] = {}
            for part, share in _parts(batch, micro_batch):
                for name, term in add_gradient(part, share).items():
                    terms[name] = terms.get(name, 0.0) + share * term.detach()
            optimizer.step()
            for schedule in schedulers:
                schedule.step()
            run.log(**terms, **_distinct(source, terms))
            if (step + 1) % run.log_every == 0 or step + 1 == steps:  # where a line is read back anyway
                require_small(plans)
    optimizer.zero_grad(set_to_none=True)


def _loss_gradient(
    student: nn.Module,
    teacher: nn.Module,
    loss: StudentLoss | None,
    features: Sequence[str],
    precision: str,
    part: Batch,
    share: float,
) -> Mapping[str, Tensor]:
    """One forward of each network, the loss, one backward."""
    if loss is None:
        raise ValueError("fit: expected a loss or a gradient, got neither")
    target = _teacher_view(teacher, part, features, precision)
    with torch.enable_grad():
        found = loss(view_at(student, part.images, features, precision), target, part)
        (share * torch.stack(list(found.values())).sum()).backward()
    return found


def _check(student: nn.Module, optimizer: torch.optim.Optimizer, micro_batch: int | None, precision: str) -> None:
    """Refuse what would train nothing, or something else."""
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise BadInput("optimizer of the student", expected="trainable parameters of the student", got="none of them",
                       fix="Create it from student.parameters(), after quantize().")  # fmt: skip
    if micro_batch is not None and micro_batch < 1:
        raise BadInput(
            "--micro-batch", expected="a whole number from 1", got=micro_batch, fix="Leave it out for no split."
        )
    if precision not in ("float32", "bf16", "integers"):
        raise BadInput("precision", expected="float32, bf16 or integers", got=repr(precision), fix="Choose one.")


def _parts(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """A batch in pieces, each with its share of the images."""
    count = len(batch.images)
    if size is None or count <= size:
        yield batch, 1.0
        return
    for start in range(0, count, size):
        cut = slice(start, start + size)
        labels = None if batch.labels is None else batch.labels[cut]
        view = batch.view
        if view is not None:  # statistics over a batch cannot be cut
            view = View(view.logits[cut], (), {name: value[cut] for name, value in view.features.items()})
        images = batch.images[cut]
        yield Batch(images, labels, view), len(images) / count


def _teacher_view(teacher: nn.Module, batch: Batch, features: Sequence[str], precision: str) -> View:
    """What the teacher saw: from the source if it brought everything along, else by asking the teacher."""
    if batch.view is not None and set(features) <= set(batch.view.features):
        return wide(batch.view.detach())
    with torch.no_grad():
        return view_at(teacher, batch.images, features, precision)


def _distinct(source: Source, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's terms under names that the student's terms do not have."""
    return {f"{source.name}_{name}" if name in taken else name: term for name, term in source.metrics.items()}
