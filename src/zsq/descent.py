"""The student's optimizer where a copy of the teacher must not be thrown off its course."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from zsq.adam import Adam
from zsq.quantizer import LearnedStep


def bounded_descent(
    student: nn.Module, *, optimizer: Literal["sgd", "adam"], lr: float, weight_decay: float, decay_all: bool,
    clip: float, steps: int, decay: Literal["cosine", "steps"], milestones: Sequence[int],
) -> tuple[Optimizer, LRScheduler]:  # fmt: skip
    """An optimizer whose gradient's norm is bounded, and its schedule.

    Args:
        student: gives the parameters.
        optimizer: ``"sgd"``, with momentum 0.9, or ``"adam"``.
        lr: learning rate at the start.
        weight_decay: of weights; SGD only.
        decay_all: of BatchNorm and bias too.
        clip: largest norm of the gradient over all parameters; 0 for none. Nothing is read back to the host.
        steps: updates of the run.
        decay: ``"cosine"``, with Nesterov momentum, along half a cosine; ``"steps"``: by 0.1 at the milestones.
        milestones: update numbers.

    Returns:
        Optimizer and schedule.
    """
    flat = [p for p in student.parameters() if p.dim() < 2]
    weights = [p for p in student.parameters() if p.dim() > 1]
    groups = [{"params": weights, "weight_decay": weight_decay},
              {"params": flat, "weight_decay": weight_decay if decay_all else 0.0}]  # fmt: skip
    chosen: Optimizer
    if optimizer == "adam":
        chosen = Adam([*weights, *flat], lr)
    else:
        chosen = SGD([group for group in groups if group["params"]], lr, momentum=0.9, nesterov=decay == "cosine")

    def bound(*_: Any) -> None:
        clip_grad_norm_(student.parameters(), clip)

    if clip:
        chosen.register_step_pre_hook(bound)
    if decay == "cosine":
        return chosen, CosineAnnealingLR(chosen, max(steps, 1))
    return chosen, MultiStepLR(chosen, list(milestones), gamma=0.1)


def steps_apart(student: nn.Module, *, lr: float, step_lr: float) -> list[dict[str, Any]]:
    """Parameters of a student for an optimizer: learned steps and offsets with a rate of their own, and all others.

    Args:
        student: with quantizers.
        lr: learning rate of everything but the quantizers.
        step_lr: learning rate of the parameters of `LearnedStep`.
    """
    own = {id(p): p for m in student.modules() if isinstance(m, LearnedStep) for p in m.parameters()}
    others = [p for p in student.parameters() if id(p) not in own]
    return [{"params": others, "lr": lr}, {"params": list(own.values()), "lr": step_lr}]
