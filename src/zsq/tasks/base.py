"""What a task is: what a network's raw output means, how two of them are compared, and how one is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Reduction = Literal["mean", "batchmean"]
Decode = Callable[[Any], Tensor]
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


class Part(NamedTuple):
    """Some channels of a raw output.

    Attributes:
        name: ``"class"``, ``"box"``, ``"objectness"`` or ``"other"``.
        width: number of channels.
        activation: what turns them into what they mean: ``"softmax"``, ``"sigmoid"`` or ``"none"``.
    """

    name: str
    width: int
    activation: str = "none"


class Boxes(NamedTuple):
    """Objects of one image.

    Attributes:
        corners: x1, y1, x2, y2 in units of the image's width and height, float32 [n, 4].
        classes: int64 [n].
        crowd: bool [n]: objects that count neither as found nor as missed (COCO's crowds, VOC's difficult ones).
        scores: float32 [n]; ones for labels.
    """

    corners: Tensor
    classes: Tensor
    crowd: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Score:
    """How well a network does; shares are fractions.

    Attributes:
        metric: key of the measure: ``top1``, ``miou``, ``map50``, ``agreement``.
        value: the measure.
        count: number of images.
        interval: 95 % Wilson interval, where every image is one independent trial; None elsewhere.
        extra: further measures by key; None where one says nothing.
    """

    metric: str
    value: float
    count: int
    interval: tuple[float, float] | None = None
    extra: dict[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        low, high = self.interval or (0.0, 0.0)
        bounds = f"  (95 %: {100 * low:.2f} to {100 * high:.2f})" if self.interval else ""
        rows = [(self.metric, f"{100 * self.value:.2f} %{bounds}")]
        rows += [(key, f"{100 * value:.2f} %") for key, value in self.extra.items() if value is not None]
        return table([*rows, ("images", str(self.count))])


class Meter(Protocol):
    """Adds up what a network gave, batch by batch."""

    def add(self, raw: Tensor, truth: Any) -> None:
        """Take a batch.

        Args:
            raw: the network's raw output.
            truth: labels of the task's form; of a comparison, the teacher's raw output.
        """
        ...

    def result(self) -> Score:
        """The measure over everything that was added."""
        ...


class Task(Protocol):
    """What a network is for, with the numbers of one network filled in.

    A raw output is one tensor [b, channels, ...]: everything behind the last learned layer (up-sampling, softmax,
    decoding of boxes) is the task's business and never quantized. Losses compare raw outputs; they never ask which task
    it is.

    Attributes:
        name: ``"classify"``, ``"segment"`` or ``"detect"``.
        metric: key of its main score in a summary.
        batch: images per forward of an evaluation.
        held_out: images that a comparison without labels takes.
        image_labels: whether an image has one class, so that images can be made for a class.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    batch: ClassVar[int]
    held_out: ClassVar[int]
    image_labels: ClassVar[bool]

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    @classmethod
    def of(cls, out: Tensor, facts: Outline, *, name: str) -> Task:
        """Understand a network's raw output.

        Args:
            out: the raw output for two black images.
            facts: what is known about it.
            name: of the network, for messages.

        Raises:
            BadInput: if it cannot be the output of this task, or facts are missing or contradict it.
        """
        ...

    def parts(self, raw: Tensor) -> dict[str, Tensor]:
        """The named parts of a raw output, each [b, channels, ...]; ``"class"`` holds logits over the classes."""
        ...

    def foreground(self, raw: Tensor) -> Tensor | None:
        """How far each position shows something that matters, 0..1, shape [b, ...]; None where all count the same."""
        ...

    def kl(
        self, student: Tensor, teacher: Tensor, *, temperature: float = 20.0, reduction: Reduction = "mean",
        through_teacher: bool = False,
    ) -> Tensor:  # fmt: skip
        """The distillation loss of the published methods, on raw outputs: T^2 KL over the classes, per position.

        Args:
            student: raw output [b, channels, ...].
            teacher: of the same images; detached unless `through_teacher`.
            temperature: T.
            reduction: as in `zsq.losses.kl`; positions are always averaged.
            through_teacher: let gradients flow into the teacher's output.

        Returns:
            0-dim tensor.
        """
        ...

    def image_logits(self, raw: Tensor) -> Tensor | None:
        """Logits of "this image shows class k", [b, classes], for making images; None where there are none."""
        ...

    def scored(self) -> Meter:
        """Measures raw outputs against labels.

        Raises:
            BadInput: if a package it needs is not installed.
        """
        ...

    def compared(self) -> Meter:
        """Measures a student's raw outputs against its teacher's.

        Raises:
            BadInput: if a package it needs is not installed.
        """
        ...


@dataclass(frozen=True)
class Outline:
    """What is known about a raw output before it was seen.

    Attributes:
        classes: number of classes; None if nobody said.
        parts: its channels in order; empty if they are not known.
        decode: of a detector, turns what the network itself returned (or the modules named by ``--raw``) into boxes.
        joined: whether `decode` takes one tensor, the parts with their activations; else a tuple of the raw parts.
    """

    classes: int | None = None
    parts: Sequence[Part] = ()
    decode: Decode | None = None
    joined: bool = True


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share.

    Args:
        right: number of hits.
        count: number of trials, at least 1.

    Returns:
        Lower and upper end, fractions in 0..1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA 1927).

    Example:
        >>> [round(end, 4) for end in wilson_interval(8, 10)]
        [0.4902, 0.9433]
    """
    share, z2 = right / count, Z95 * Z95
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    low, high = ((centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count))
    return (0.0 if right == 0 else low, 1.0 if right == count else high)  # exact ends, free of rounding


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def cut_parts(raw: Tensor, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Channels of a raw output by name.

    Example:
        >>> {k: list(v.shape) for k, v in cut_parts(torch.zeros(2, 7, 3), [Part("box", 4), Part("class", 3)]).items()}
        {'box': [2, 4, 3], 'class': [2, 3, 3]}
    """
    pieces = raw.split([part.width for part in parts], dim=1)
    return {part.name: piece for part, piece in zip(parts, pieces, strict=True)}


def probabilities(parts: Mapping[str, Tensor], layout: Sequence[Part]) -> list[Tensor]:
    """The parts with their activations, in order."""
    apply: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(1),
        "sigmoid": torch.sigmoid,
        "none": lambda x: x,
    }
    return [apply[part.activation](parts[part.name]) for part in layout]
