"""ZAQ's two objectives, which pull in opposite directions: the student's and the generator's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from zsq.discrepancy import excitation, task_gap
from zsq.insert.access import moving
from zsq.losses import bn_gap
from zsq.sources.base import Batch
from zsq.tasks import Task
from zsq.units import Unit
from zsq.view import View, look

Between = Callable[[Tensor, Tensor], Tensor]
BetweenStages = Callable[[Iterable[Tensor], Iterable[Tensor]], Tensor]


def adversary_loss(
    task: Task, *, alpha: float, beta: float, damped: bool, features: BetweenStages, anchor: float = 0.0
) -> Callable[[View, View], dict[str, Tensor]]:
    """L_DE, what the generator minimises: -D_o - alpha D_f + beta L_a.

    Args:
        task: of the outputs.
        alpha: weight of the stages' discrepancy.
        beta: weight of the activation regularisation.
        damped: log(1 + D) in place of D: the reward of one more difference falls, and nothing runs away.
        features: D_f of the stages of student and teacher.
        anchor: weight of the BatchNorm statistics; 0 for none.

    Returns:
        Maps views of student and teacher to named terms; those of stages only where the views show any.

    Source: ZAQ (arXiv 2103.15263), discrepancy estimation; damping for all tasks as DFAD (arXiv 1912.11006) for dense
        ones; the anchor is ours.
    """
    damp = torch.log1p if damped else torch.clone

    def loss(student: View, teacher: View) -> dict[str, Tensor]:
        terms = {"g_gap": -damp(task_gap(student.logits, teacher.logits, task=task))}
        shown = list(teacher.features.values())
        if shown:
            terms["g_stages"] = -alpha * damp(features(student.features.values(), shown))
            terms["g_excite"] = beta * excitation(shown[-1])
        return terms | ({"g_bns": anchor * bn_gap(teacher.norms)} if anchor else {})

    return loss


def transfer_gradient(
    student: nn.Module, teacher: nn.Module, stages: Sequence[Unit], *, outputs: dict[str, Between],
    features: BetweenStages, alpha: float, still: bool,
) -> Callable[[Batch, float], dict[str, Tensor]]:  # fmt: skip
    """L_KT, what the student minimises: D_o + alpha D_f, as `zsq.fit.fit` takes it.

    Args:
        student: with quantizers.
        teacher: the float network; its part carries no gradient.
        stages: what is compared besides the outputs.
        outputs: D_o of student's and teacher's raw output, by its name in the log.
        features: D_f of their stages.
        alpha: weight of the latter.
        still: the student's ranges and BatchNorm statistics do not move.

    Returns:
        Adds the gradient of a part of a batch, times its share, to the student's; gives the terms.

    Source: ZAQ (arXiv 2103.15263), knowledge transfer.
    """
    at_student, at_teacher = ([stage.within(net) for stage in stages] for net in (student, teacher))

    def gradient(part: Batch, share: float) -> dict[str, Tensor]:
        with torch.no_grad():
            t = look(teacher, part.images, features=at_teacher)
        with torch.enable_grad(), nullcontext() if still else moving(student):
            s = look(student, part.images, features=at_student)
            terms = {name: gap(s.logits, t.logits) for name, gap in outputs.items()}
            if stages:
                terms["stages"] = alpha * features(s.features.values(), t.features.values())
            (share * torch.stack(list(terms.values())).sum()).backward()
        return terms

    return gradient
