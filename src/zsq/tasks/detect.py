"""Detection: classes, boxes and maybe objectness for every anchor, before they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq import losses
from zsq.errors import BadInput, RunFailed
from zsq.tasks.base import Boxes, Decode, Outline, Part, Reduction, Score, cut_parts, probabilities
from zsq.tasks.boxes import AveragePrecision, best_boxes

SURE = 0.3  # a teacher's box from this score on counts as an object when a student is compared with it
FLOOR = 0.05  # weight of a position that shows nothing, against 1 for one that surely shows an object


@dataclass(frozen=True)
class Detect:
    """Raw output [b, channels, ...positions]: channels are parts of logits; positions are cells or anchors.

    Attributes:
        classes: number of classes, without a background class.
        layout: the parts in order of their channels.
        decode: gives boxes [b, n, 6]: x1, y1, x2, y2 in units of the image's sides, score, class; None if nobody said.
        joined: what `decode` takes: one tensor, the parts with their activations side by side (what the network itself
            returns), or a tuple of the raw parts.
        background: number of channels of the class part in front of the classes (0 or 1).
    """

    name: ClassVar[str] = "detect"
    metric: ClassVar[str] = "map50"
    batch: ClassVar[int] = 16
    held_out: ClassVar[int] = 64
    image_labels: ClassVar[bool] = False
    classes: int
    layout: tuple[Part, ...]
    decode: Decode | None = None
    joined: bool = True
    background: int = 0

    @classmethod
    def of(cls, out: Tensor, facts: Outline, *, name: str) -> Detect:
        """Class, box and objectness channels, told apart by what is known of the network, else by their number."""
        subject = f"teacher {name}"
        if out.dim() < 3:
            raise BadInput(subject, expected="outputs per anchor of shape [batch, channels, ...]",
                           got=f"shape {list(out.shape)}",
                           fix="Name the modules that give them with --raw MODULE,MODULE.")  # fmt: skip
        layout = tuple(facts.parts) or _guess(out.shape[1], facts.classes, subject)
        if sum(part.width for part in layout) != out.shape[1]:
            raise BadInput(subject, expected=f"{sum(part.width for part in layout)} channels, the sum of its parts",
                           got=out.shape[1], fix="Correct --raw or --classes.")  # fmt: skip
        wide = next((part for part in layout if part.name == "class"), None)
        if wide is None and facts.classes is None:
            raise BadInput("--classes", expected=f"the number of classes of {name}", got="nothing",
                           fix="Give it: the class channels of a detector cannot be told from the others.")  # fmt: skip
        classes = facts.classes if facts.classes is not None else wide.width if wide is not None else 0
        background = 0 if wide is None else wide.width - classes
        if background not in (0, 1):
            raise BadInput("--classes", expected=f"{wide.width if wide else 0} or, with a background class, one less",
                           got=classes, fix="Correct the number, or leave it out.")  # fmt: skip
        return cls(classes, layout, facts.decode, facts.joined, background)

    def parts(self, raw: Tensor) -> dict[str, Tensor]:
        """Channels by name."""
        return cut_parts(raw, self.layout)

    def foreground(self, raw: Tensor) -> Tensor | None:
        """Probability of an object at every position, as far as the parts tell."""
        parts, kind = self.parts(raw), {part.name: part.activation for part in self.layout}
        if "objectness" in parts:
            return parts["objectness"].sigmoid().amax(1)
        if "class" in parts and kind["class"] == "sigmoid":
            return parts["class"].sigmoid().amax(1)
        if "class" in parts and self.background:
            return 1 - parts["class"].softmax(1)[:, 0]
        return None

    def kl(
        self, student: Tensor, teacher: Tensor, *, temperature: float = 20.0, reduction: Reduction = "mean",
        through_teacher: bool = False,
    ) -> Tensor:  # fmt: skip
        """T^2 KL of classes and objectness plus the L1 distance of boxes, where the teacher sees something.

        Positions weigh (foreground + 0.05), scaled to mean 1: with equal weights the many positions that show nothing,
        where classes and boxes mean nothing, would own the loss. The weights never carry gradients.
        """
        told = teacher if through_teacher else teacher.detach()
        weight = self.weights(teacher)
        ours, theirs = self.parts(student), self.parts(told)
        total = student.new_zeros(())
        for part in self.layout:
            pair = (ours[part.name], theirs[part.name])
            if part.name == "class" and part.activation != "sigmoid":
                total = total + losses.kl(
                    *pair, temperature=temperature, reduction=reduction, through_teacher=True, weight=weight
                )
            elif part.name in ("class", "objectness"):
                even = weight if part.name == "class" else None
                total = total + bernoulli_kl(*pair, temperature=temperature, reduction=reduction, weight=even)
            else:
                gap = (pair[0].float() - pair[1].float()).abs().mean(1)
                total = total + (gap if weight is None else gap * weight).mean()
        return total

    def weights(self, teacher: Tensor) -> Tensor | None:
        """Weights of the positions, [b, ...] with mean 1; None where all count the same."""
        seen = self.foreground(teacher.detach())
        if seen is None:
            return None
        weight = seen.float() + FLOOR
        return weight / weight.mean()

    def image_logits(self, raw: Tensor) -> Tensor | None:
        """Log of the summed evidence over positions: somewhere the image shows an object of class k."""
        parts = self.parts(raw)
        if "class" not in parts:
            return None
        logits = parts["class"].flatten(2).float()
        kind = next(part.activation for part in self.layout if part.name == "class")
        score = F.logsigmoid(logits) if kind == "sigmoid" else logits.log_softmax(1)
        if "objectness" in parts:
            score = score + F.logsigmoid(parts["objectness"].flatten(2).float().amax(1, keepdim=True))
        return score[:, self.background :].logsumexp(2)

    def objects(self, raw: Tensor, *, least: float) -> list[Boxes]:
        """Decode, drop what is unsure, and let the best of overlapping boxes of a class stand.

        Args:
            raw: raw output of a batch.
            least: smallest score.

        Raises:
            BadInput: if there is nothing to decode with.
            RunFailed: if decoding gives something else than boxes.
        """
        if self.decode is None:
            raise BadInput("--decode", expected="a function that turns the detector's output into boxes",
                           got="nothing", fix="Give it as --decode FILE.py:F, where F returns [b, n, 6]: x1, y1, x2, "
                           "y2 in units of the image's sides, score, class.")  # fmt: skip
        parts = self.parts(raw.float())
        given: Any = tuple(parts.values()) if len(parts) > 1 else raw.float()
        if self.joined:
            given = torch.cat(probabilities(parts, self.layout), 1)
        found: Any = self.decode(given)
        if not isinstance(found, Tensor) or found.dim() != 3 or len(found) != len(raw) or found.shape[2] != 6:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise RunFailed(f"--decode: expected boxes of shape [{len(raw)}, n, 6], got {got}. Correct the function.")
        return [best_boxes(rows.cpu(), least=least) for rows in found]

    def scored(self) -> Detections:
        """mAP@.5 and COCO's mAP."""
        return Detections(self)

    def compared(self) -> Detections:
        """mAP@.5 with the teacher's boxes as truth."""
        return Detections(self, against_teacher=True)


class Detections:
    """Average precision over a whole set.

    Args:
        task: decodes raw outputs.
        against_teacher: what is added as truth are the teacher's raw outputs. Its boxes from a score of 0.3 on count as
            objects; of an image without any, the best one.
    """

    def __init__(self, task: Detect, *, against_teacher: bool = False) -> None:
        self._task, self._against = task, against_teacher
        self._precision = AveragePrecision(task.classes)

    def add(self, raw: Tensor, truth: Any) -> None:
        """Take raw outputs and the objects of each image, or the teacher's raw outputs."""
        objects = [_sure(found) for found in self._task.objects(truth, least=0.0)] if self._against else truth
        for found, true in zip(self._task.objects(raw, least=0.001), objects, strict=True):
            self._precision.add(found, true)

    def result(self) -> Score:
        """MAP at an overlap of .5, and the mean over .5, .55 ... .95 beside it."""
        map50, mean = self._precision.result()
        return Score("agreement" if self._against else "map50", map50, self._precision.images, None, {"map": mean})


def _sure(found: Boxes) -> Boxes:
    keep = found.scores >= SURE
    if len(keep) and not bool(keep.any()):
        keep[found.scores.argmax()] = True
    return Boxes(*(field[keep] for field in found))


def _guess(width: int, classes: int | None, subject: str) -> tuple[Part, ...]:
    """Layout of an output about which nothing is known: the last channels are the classes, as everywhere."""
    if classes is None:
        raise BadInput("--classes", expected="the number of classes of a detector", got="nothing",
                       fix="Give it: its class channels cannot be told from the others.")  # fmt: skip
    if width < classes:
        raise BadInput(subject, expected=f"at least {classes} channels, one per class", got=width,
                       fix="Correct --classes, or name the raw outputs with --raw MODULE,MODULE.")  # fmt: skip
    rest = [Part("other", width - classes)] if width > classes else []
    return (*rest, Part("class", classes, "softmax"))


def name_parts(widths: Sequence[int], activations: Sequence[str], classes: int | None) -> tuple[Part, ...]:
    """Name tensors by how many channels they have and what follows them.

    Args:
        widths: channels of each.
        activations: what the network puts behind each, ``"none"`` if nothing.
        classes: number of classes, if known.

    Returns:
        Parts with different names, in order: classes are what a softmax follows or what has as many channels, boxes
        have four, objectness one; the others keep a number.

    Example:
        >>> [part.name for part in name_parts([1, 4, 4], ["sigmoid", "none", "softmax"], 4)]
        ['objectness', 'box', 'class']
    """
    names: list[str] = []
    by_width = "softmax" not in activations and classes is not None
    # Four classes or three are as wide as a box: then what a sigmoid follows are the classes.
    wide = {width for width, kind in zip(widths, activations, strict=True) if kind == "sigmoid"}
    told = bool(wide & {classes, (classes or 0) + 1})
    for width, activation in zip(widths, activations, strict=True):
        fits = {
            "class": activation == "softmax"
            or (by_width and width in (classes, (classes or 0) + 1) and (not told or activation == "sigmoid")),
            "box": width == 4 and activation == "none",
            "objectness": width == 1,
        }
        free = [name for name, fit in fits.items() if fit and name not in names]
        names.append(free[0] if free else f"other{len(names)}")
    meant = {"class": "softmax", "objectness": "sigmoid"}
    return tuple(
        Part(name, width, activation if activation != "none" else meant.get(name, "none"))
        for name, width, activation in zip(names, widths, activations, strict=True)
    )


def bernoulli_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 20.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """T^2 * KL(teacher || student) of independent yes/no probabilities, one per entry: sigmoid heads of detectors.

    Args:
        student_logits: shape [b, k, ...].
        teacher_logits: the same shape; gradients flow into it.
        temperature: T, above zero; both logits are divided by it.
        reduction: as in `zsq.losses.kl`.
        weight: of each sample and position, shape [b, ...] with mean 1; None counts all the same.

    Returns:
        0-dim tensor.

    Example:
        >>> x = torch.tensor([[0.0, 3.0]])
        >>> float(bernoulli_kl(x, x))
        0.0
    """
    s, t = student_logits.float() / temperature, teacher_logits.float() / temperature
    p = t.sigmoid()
    gap = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    rows = gap.sum(1) if weight is None else gap.sum(1) * weight
    return rows.mean() * (temperature**2 / (s.shape[1] if reduction == "mean" else 1))
