"""What the instruments look at: the student of a run at every snapshot, images, labels, and the losses on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq import losses
from zsq.checkpoint import load_tree
from zsq.data import load_images
from zsq.errors import BadInput
from zsq.finished import open_run
from zsq.insert.access import QuantizedWeight, freeze_ranges, quantized_weights
from zsq.tasks import Task
from zsq.teachers import Teacher

CHUNK = 256  # images per forward without gradients
PART = 64  # the same where it is repeated hundreds of times: maps of small networks then stay in the cache
ASKED, TOLD = "labels asked for", "teacher's labels"


@dataclass(frozen=True)
class Arm:
    """One set of images to measure on.

    Attributes:
        name: what they are.
        images: shape [n, c, h, w], on the student's device.
        target: the teacher's logits on them, detached, [n, k] or [n, k, ...positions].
        labels: kind of label -> labels; the first kind is the one that counts.
    """

    name: str
    images: Tensor
    target: Tensor
    labels: dict[str, Tensor]

    @property
    def main_labels(self) -> Tensor:
        """The labels that count."""
        return next(iter(self.labels.values()))

    def split(self, size: int) -> Iterator[Arm]:
        """The same arm in batches of at most `size` images."""
        for at in range(0, len(self.images), size):
            part = slice(at, at + size)
            yield Arm(self.name, self.images[part], self.target[part], {k: v[part] for k, v in self.labels.items()})


@dataclass(frozen=True)
class Subject:
    """A finished run, opened for measuring.

    Attributes:
        path: the run directory.
        student: as it ended, ranges frozen.
        outputs: what its raw output means.
        weights: its quantized weights.
        arms: the run's synthetic images first; then real ones, if asked for.
        temperature: of the run's KL term; 20 if the run had none.
        as_trained: factor that turns the batch-mean KL into the term as trained: its weight, and 1 / classes if the run
            averaged over classes too.
    """

    path: Path
    student: nn.Module
    outputs: Task
    weights: list[QuantizedWeight]
    arms: list[Arm]
    temperature: float
    as_trained: float

    def facts(self) -> dict[str, Any]:
        """What every result file says about its inputs."""
        return {
            "temperature": self.temperature,
            "kl_as_trained": self.as_trained,
            "images": {arm.name: {"count": len(arm.images), "labels": list(arm.labels)} for arm in self.arms},
        }

    def logits(self, images: Tensor) -> Tensor:
        """The student's logits over the classes, [n, k] or [n, k, ...positions]: of a detector, its class channels."""
        return class_logits(self.student(images), self.outputs)

    def losses(self, arm: Arm) -> dict[str, Tensor]:
        """Cross entropy and the two batch-mean KLs of the student on an arm, from one forward.

        Returns:
            ``ce``, ``kl`` (temperature of the run) and ``kl_t1`` (temperature 1); multiply ``kl`` by `as_trained` for
            the term the run was trained with.
        """
        logits = self.logits(arm.images)
        return {
            "ce": losses.cross_entropy(logits, arm.main_labels),
            "kl": losses.kl(logits, arm.target, temperature=self.temperature, reduction="batchmean"),
            "kl_t1": losses.kl(logits, arm.target, temperature=1.0, reduction="batchmean"),
        }


def open_subject(
    path: Path, *, images: str | None = None, count: int = 128, device: torch.device | str = "cpu"
) -> Subject:
    """Open a finished run for measuring.

    Args:
        path: the run directory.
        images: DATA string of real images, or None.
        count: images per arm; fewer if there are fewer.
        device: where to compute.

    Raises:
        BadInput: if the run is not finished, or the images cannot be used.
    """
    teacher, student, summary = open_run(path, device)
    freeze_ranges(student)
    tree = load_tree(path / "images.safetensors")
    made = tree.get("labels", tree.get("soft_labels"))
    arms = [make_arm("synthetic images", tree["images"][:count], teacher, None if made is None else made[:count])]
    if images is not None:
        real = load_images(images, teacher)[:count]
        if len(real) == 0:
            raise BadInput(f"--images {images}", expected="at least one image", got="none", fix="Widen the slice.")
        arms.append(make_arm(f"real images ({Path(images).name})", real, teacher, None))
    plan = summary.get("plan", {})
    as_trained = float(plan.get("kl_weight", 1.0))
    if plan.get("kl_reduction", "mean") == "mean":
        as_trained /= teacher.classes
    with torch.no_grad():
        student(arms[0].images[:1])
    temperature = float(plan.get("temperature") or 20.0)
    return Subject(path, student, teacher.outputs, quantized_weights(student), arms, temperature, as_trained)


def class_logits(raw: Tensor, outputs: Task) -> Tensor:
    """The channels of a raw output that say which class.

    Raises:
        BadInput: if there are none.
    """
    parts = outputs.parts(raw)
    if "class" not in parts:
        raise BadInput("zsq analyse", expected="a network that gives logits over classes",
                       got=f"only {', '.join(parts)}", fix="Its losses are those of classes.")  # fmt: skip
    return parts["class"]


def losses_on(subject: Subject, arm: Arm) -> dict[str, Tensor]:
    """The losses on a whole arm, part by part: without gradients a pass over large maps would wait for memory."""
    total: dict[str, Tensor] = {}
    for part in arm.split(PART):
        for name, loss in subject.losses(part).items():
            total[name] = total.get(name, 0.0) + loss * (len(part.images) / len(arm.images))
    return total


def make_arm(name: str, images: Tensor, teacher: Teacher, made: Tensor | None) -> Arm:
    """Ask the teacher about images.

    Args:
        name: of the arm.
        images: normalised as the teacher expects.
        teacher: gives target and labels.
        made: labels the images were made for, or None.

    Raises:
        BadInput: if the teacher gives no logits over classes.
    """
    images = images.to(teacher.device)
    with torch.no_grad():
        target = torch.cat([class_logits(teacher.net(part), teacher.outputs) for part in images.split(CHUNK)])
    told = {TOLD: target.argmax(1)}
    # A class that a whole image was made for is no label of its positions.
    asked = {} if made is None or target.dim() > 2 else {ASKED: made.to(images.device)}
    return Arm(name, images, target, asked | told)


def history_files(path: Path) -> dict[int, Path]:
    """The snapshots of a run by step, in order; empty without a history."""
    return {int(file.stem): file for file in sorted((path / "history").glob("[0-9]*.safetensors"))}


def moments(path: Path, limit: int | None = None) -> dict[int | None, Path | None]:
    """At which steps to measure: those of the history, or only the end (step None) without one.

    Args:
        path: the run directory.
        limit: at most this many, evenly spaced, with the first and the last.
    """
    files = list(history_files(path).items())
    if not files:
        return {None: None}
    if limit is None or limit >= len(files):
        return dict(files)
    return dict(files[round(i * (len(files) - 1) / max(limit - 1, 1))] for i in range(limit))


@contextmanager
def at_snapshot(subject: Subject, file: Path | None) -> Iterator[Mapping[str, Tensor]]:
    """Give the student the weights of a snapshot within a ``with`` block; afterwards it is what it was, bit for bit.

    BatchNorm statistics and activation ranges do not change during training, so the student is exactly the one of
    that step. A history written before version 0.2 lacks BatchNorm factors and biases: those stay the final ones, and
    `is_complete` is false.

    Args:
        subject: whose student.
        file: of the history; None leaves the student as it is.

    Yields:
        The tensors of the snapshot.

    Raises:
        BadInput: if the snapshot belongs to another network.
    """
    if file is None:
        yield {}
        return
    tree: dict[str, Tensor] = load_tree(file)
    own = dict(subject.student.named_parameters())
    places = {f"{weight.name}.latent": weight.parameter for weight in subject.weights}
    places |= {k: own[k.removesuffix(".parameter")] for k in tree if k.removesuffix(".parameter") in own}
    foreign = {k for k in tree if k.endswith((".parameter", ".latent"))} ^ set(places)
    if foreign or any(tree[k].shape != parameter.shape for k, parameter in places.items()):
        raise BadInput(str(file), expected="a snapshot of this run's student", got="one of another network",
                       fix="The files were changed or mixed up: quantize again.")  # fmt: skip
    with restored(list(places.values())), torch.no_grad():
        for key, parameter in places.items():
            parameter.copy_(tree[key])
        _settle(subject)
        with torch.enable_grad():
            yield tree
    _settle(subject)


def is_complete(tree: Mapping[str, Tensor]) -> bool:
    """Whether a snapshot holds every trained parameter (or is the final student itself)."""
    return not tree or any(key.endswith(".parameter") for key in tree)


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put parameters back to what they were, bit for bit, when the ``with`` block ends, also after an error."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _settle(subject: Subject) -> None:
    """One forward: grids of computed weights and limits of the bias are known from the last one."""
    with torch.no_grad():
        subject.student(subject.arms[0].images[:1])
