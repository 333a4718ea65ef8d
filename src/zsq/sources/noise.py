"""Images optimised from noise through the teacher, as ZeroQ and its successors do; and the fixed probe pool."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from zsq.adam import Adam
from zsq.errors import BadInput
from zsq.losses import bn_gap, cross_entropy
from zsq.sources.base import Batch
from zsq.sources.generator import Loss, autocast, learning
from zsq.sources.priors import total_variation
from zsq.view import View, frozen, look

if TYPE_CHECKING:
    from zsq.tasks import Task
    from zsq.teachers import Teacher

PROBE_SEED = 20030
# A full class term makes images of which the teacher is surer (0.997 on average) than of photographs (0.97), so that
# even coarse students agree on nearly all of them; a tenth of it brings confidence and agreement close to photographs'.
_PROBE_CLASS_WEIGHT = 0.1


def image_loss(task: Task, *, class_weight: float = 1.0, bn_weight: float = 1.0, smooth_weight: float = 1.0) -> Loss:
    """The usual objective of optimised images: their class, and looking natural to the teacher.

    Natural means the teacher's BatchNorm statistics where it has them, and smoothness where it has none.

    Args:
        task: reads "this image shows class k" off a raw output; a task that cannot gets no class term.
        class_weight: weight of the cross entropy.
        bn_weight: weight of `bn_gap`.
        smooth_weight: weight of the total variation, for teachers without BatchNorm only.

    Returns:
        A loss for `synthesise` or `GeneratorSource`.
    """

    def loss(view: View, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if view.norms:
            terms["bn"] = bn_weight * bn_gap(view.norms)
        else:
            terms["smooth"] = smooth_weight * total_variation(batch.images)
        logits = None if batch.labels is None else task.image_logits(view.logits)
        if logits is not None:
            terms["class"] = class_weight * cross_entropy(logits, batch.labels)
        return terms

    return loss


def synthesise(
    teacher: Teacher,
    labels: Tensor,
    loss: Loss,
    *,
    steps: int,
    rng: torch.Generator,
    batch: int,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    anneal: bool = True,
    precision: Literal["bf16", "float32"] = "bf16",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Optimise images from x ~ N(0, 1) by Adam through the frozen teacher, batch after batch.

    Args:
        teacher: gives `net` and `image`.
        labels: the class of each image, int64 [n] (or soft, [n, k]).
        loss: maps (view, batch) to named, already weighted terms; `view.norms` holds the BatchNorm statistics.
        steps: Adam steps per batch.
        rng: CPU generator of the start images.
        batch: images optimised together; the n images are spread evenly over ceil(n / batch) batches, because batch
            statistics of a small remainder would be poor.
        lr: of Adam, in units of the teacher's normalised space.
        betas: of Adam.
        anneal: lower the learning rate to 0 along half a cosine.
        precision: of the teacher, ``"bf16"`` or ``"float32"``; images, statistics and losses are float32.
        progress: called with (steps done, steps in all) after each step.

    Returns:
        Images [n, c, h, w], float32, on the teacher's device.

    Raises:
        BadInput: no labels, or a count below 1.
    """
    if min(len(labels), steps, batch) < 1:
        raise BadInput(
            "synthesise",
            expected="at least one label, one step and one image per batch",
            got=f"{len(labels)} labels, {steps} steps, batch {batch}",
            fix="Give positive counts.",
        )
    device = next(teacher.net.parameters()).device
    autocast(device, precision)
    parts = labels.to(device).tensor_split(math.ceil(len(labels) / batch))
    made = []
    with learning(), frozen(teacher.net), autocast(device, "float32"):  # backward too, inside a caller's autocast
        for index, part in enumerate(parts):
            x = torch.randn(len(part), *teacher.image, generator=rng)
            x = x.to(device, memory_format=torch.channels_last).requires_grad_()
            adam = Adam([x], lr, betas)
            for step in range(steps):
                if anneal:
                    adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                with autocast(device, precision):
                    view = look(teacher.net, x, norms=True)
                view = view._replace(logits=view.logits.float())
                total = torch.stack(list(loss(view, Batch(x, part)).values())).sum()
                total.backward(inputs=[x])  # x only
                adam.step()
                adam.zero_grad(set_to_none=True)
                if progress is not None:
                    progress(index * steps + step + 1, len(parts) * steps)
            made.append(x.detach())
        return torch.cat(made).contiguous()


def balanced_labels(classes: int, count: int, rng: torch.Generator) -> Tensor:
    """Every class equally often (spread over all classes if there are more classes than images), in random order.

    Args:
        classes: number of classes.
        count: number of labels.
        rng: of the order.

    Returns:
        Shape [count], int64.

    Example:
        >>> sorted(balanced_labels(3, 6, torch.Generator()).tolist())
        [0, 0, 1, 1, 2, 2]
    """
    labels = torch.arange(count) * classes // count
    return labels[torch.randperm(count, generator=rng)]


def probe_images(
    teacher: Teacher,
    count: int | None = None,
    *,
    steps: int = 40,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The fixed pool on which students of one teacher are compared: same seed, same labels, same schedule every time.

    Args:
        teacher: any teacher; without BatchNorm the images follow class and smoothness only.
        count: number of images, balanced over the classes; a quarter of what a comparison of this task takes if not
            given: 256 for a classifier.
        steps: Adam steps per batch.
        batch: images optimised together.
        progress: called with (steps done, steps in all).

    Returns:
        Images [count, c, h, w], float32, in the teacher's normalised space. The same bits each time on one machine.
    """
    rng = torch.Generator().manual_seed(PROBE_SEED)
    labels = balanced_labels(teacher.classes, count or teacher.outputs.held_out // 4, rng)
    loss = image_loss(teacher.outputs, class_weight=_PROBE_CLASS_WEIGHT)
    return synthesise(teacher, labels, loss, steps=steps, rng=rng, batch=batch, lr=0.2, progress=progress)
