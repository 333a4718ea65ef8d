"""How far a student is from its teacher: at the output, and between the channels of each stage. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq.errors import BadInput

if TYPE_CHECKING:
    from zsq.tasks import Task

Form = Literal["crm", "feature_l1"]
Weighting = Literal["adaptive", "uniform", "softmax"]
_EPS = 1e-6  # a channel that is zero everywhere, as many are behind a ReLU, is related to nothing: 0, not 0/0
_FLOOR = 0.05  # weight of a position that shows nothing, against 1.05 for one that surely shows an object
_TAU = 0.1  # of the softmax weighting; channel relations differ by a few hundredths


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(z: Tensor, dim: int) -> Tensor:
    """Vectors of length 1; shorter than 1e-6 they become 0 and pass no gradient, which would be 1e6 times too large."""
    norm = torch.linalg.vector_norm(z, dim=dim, keepdim=True)
    return torch.where(norm > _EPS, z / norm.clamp_min(_EPS), 0.0)


def output_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """D_o: mean |O_P - O_Q| over batch and output entries.

    Args:
        student: raw output (logits, no softmax), any shape.
        teacher: of the same shape.

    Returns:
        0-dim tensor.

    Raises:
        BadInput: the shapes differ.

    Source: ZAQ (arXiv 2103.15263), output level, as in the released code.

    Example:
        >>> float(output_gap(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])))
        1.5
    """
    if student.shape != teacher.shape:
        raise BadInput("output gap", expected="outputs of one shape", got=f"{[*student.shape]} and {[*teacher.shape]}",
                       fix="Give both networks the same images.")  # fmt: skip
    return (_wide(student) - _wide(teacher)).abs().mean()


def task_gap(student: Tensor, teacher: Tensor, *, task: Task) -> Tensor:
    """D_o of a task's raw output: `output_gap` of a single part; of several, e.g. a detector's, the sum of their gaps.

    Of several parts each is divided by the mean magnitude of the teacher's, so that none owns the sum. Boxes count by
    smooth L1. Classes and boxes weigh (foreground + 0.05) at each position, scaled to mean 1: what a detector says of
    boxes on the background means nothing. Scales and weights belong to one image and carry no gradient.

    Args:
        student: raw output [b, channels, ...].
        teacher: of the same images.
        task: knows the parts.

    Returns:
        0-dim tensor.

    Source: for one part ZAQ (arXiv 2103.15263); its detection loss is not published, this one is ours.
    """
    ours, theirs = task.parts(_wide(student)), task.parts(_wide(teacher))
    if len(theirs) == 1:
        return output_gap(student, teacher)
    seen = task.foreground(teacher.detach())
    gaps = []
    for name, told in theirs.items():
        gap = F.smooth_l1_loss(ours[name], told, reduction="none") if name == "box" else (ours[name] - told).abs()
        gap = gap.mean(1).flatten(1)
        if seen is not None and name != "objectness":
            weight = seen.to(gap.dtype).flatten(1) + _FLOOR
            gap = gap * (weight / weight.mean(1, keepdim=True))
        gaps.append((gap.mean(1) / told.detach().abs().flatten(1).mean(1).clamp_min(_EPS)).mean())
    return torch.stack(gaps).sum()


def channel_relations(z: Tensor) -> Tensor:
    """Channel relation map: cosine between every two channels of every sample, over positions.

    R_ij = <z_i, z_j> / (||z_i|| ||z_j||), channels as rows of length h*w. Positive factors per channel drop out, so the
    value ranges of float and low-bit features do not matter. Memory is c*c per sample, never (h*w)^2.

    Args:
        z: features, shape [b, c, ...].

    Returns:
        Shape [b, c, c], values in [-1, 1]; rows of dead channels are 0.

    Source: ZAQ (arXiv 2103.15263), intermediate level.
    """
    rows = _unit(_wide(z).flatten(2), dim=2)
    return rows @ rows.mT


def relation_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """(1/c^2) ||R_P - R_Q||_1 of every sample.

    Args:
        student: features of one stage, shape [b, c, ...].
        teacher: of the same shape.

    Returns:
        Shape [b], values in [0, 2].

    Source: ZAQ (arXiv 2103.15263), intermediate level.
    """
    return (channel_relations(student) - channel_relations(teacher)).abs().mean((1, 2))


def feature_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """2 * mean |z_P - z_Q| of every sample, features L2-normalised over channels at each position.

    What the released program's "SCRM" amounts to: its two attention branches change the value by 2 % at most and build
    maps of (h*w)^2 entries.

    Args:
        student: features of one stage, shape [b, c, ...].
        teacher: of the same shape.

    Returns:
        Shape [b].

    Source: ZAQ, the released code (not the paper).
    """
    a, b = (_unit(_wide(z).flatten(2), dim=1) for z in (student, teacher))
    return 2 * (a - b).abs().mean((1, 2))


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"crm": relation_gap, "feature_l1": feature_gap}


def stage_gap(
    student: Iterable[Tensor], teacher: Iterable[Tensor], *, form: Form = "crm", weighting: Weighting = "adaptive"
) -> Tensor:
    """D_f: weighted sum of the stages' discrepancies, averaged over the batch.

    The weights are the same for student and teacher and carry no gradient. They belong to a sample, so that a batch can
    be split without changing the sum.

    Args:
        student: features of the L stages, each [b, c, ...].
        teacher: of the same shapes.
        form: per stage `relation_gap` (as the paper) or `feature_gap` (as the released code executes).
        weighting: ``"adaptive"``: w_l = L d_l / sum_k d_k, the widest gaps count most; ``"uniform"``: 1; ``"softmax"``:
            L softmax(d_l / 0.1).

    Returns:
        0-dim tensor.

    Raises:
        BadInput: form or weighting is unknown.

    Source: ZAQ (arXiv 2103.15263). The formula of its adaptive weights is not published; this one is ours.
    """
    if form not in FORMS:
        raise BadInput("stage gap", expected=" or ".join(FORMS), got=repr(form), fix="Choose one of them.")
    gaps = torch.stack([FORMS[form](s, t) for s, t in zip(student, teacher, strict=True)], dim=1)
    return (_weights(gaps.detach(), weighting) * gaps).sum(1).mean()


def _weights(gaps: Tensor, weighting: str) -> Tensor:
    count = gaps.shape[1]
    if weighting == "adaptive":
        return count * gaps / gaps.sum(1, keepdim=True).clamp_min(1e-12)
    if weighting == "softmax":
        return count * (gaps / _TAU).softmax(1)
    if weighting != "uniform":
        raise BadInput("stage weights", expected="adaptive, uniform or softmax", got=repr(weighting),
                       fix="Choose one of them.")  # fmt: skip
    return torch.ones_like(gaps)


def excitation(z: Tensor) -> Tensor:
    """L_a: minus the mean magnitude of the teacher's last stage. Minimised by images that excite its channels.

    Args:
        z: features, shape [b, c, ...].

    Returns:
        0-dim tensor, at most 0.

    Source: ZAQ (arXiv 2103.15263), activation regularisation, as in the released code.
    """
    return -_wide(z).abs().mean()
