"""Another source's images, moved to where student and teacher differ more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zsq.precision import view_at
from zsq.sources.around import Around
from zsq.sources.base import Batch, Source
from zsq.sources.generator import autocast, learning
from zsq.view import frozen

if TYPE_CHECKING:
    from zsq.teachers import Teacher

Gap = Callable[[Tensor, Tensor], Tensor]


class HarderSource(Around):
    """Every image drawn is moved by one signed gradient step uphill on the gap between student and teacher.

    HAST moves all images by the same small step and learns from them beside the images themselves. Here an image's step
    is a share of `epsilon` drawn at random, so that a batch holds images moved hardly and images moved far, and only
    these are learned from (docs/findings.md compares the two). Neither network is changed. A draw costs a forward and a
    backward of each.

    Args:
        source: whose images.
        teacher: the float network.
        student: the network that learns; as it is at the time of the draw.
        gap: raw outputs of student and teacher to a scalar; larger is harder.
        epsilon: largest change of a pixel, in the teacher's normalised space.
        precision: of both networks' convolutions, float32 or bf16.

    Source: sample-difficulty promotion of HAST (arXiv 2303.13826), section 3.3, in the sense of its released program:
    uphill on the loss.
    """

    def __init__(
        self, source: Source, teacher: Teacher, student: nn.Module, gap: Gap, *, epsilon: float, precision: str
    ) -> None:
        super().__init__(source)
        self._teacher, self._student, self._gap = teacher, student, gap
        self._epsilon, self._precision = epsilon, precision

    def changed(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The batch, moved: as a whole, because in bfloat16 the signs of small gradients depend on its size."""
        length = self._epsilon * torch.rand(len(batch.images), 1, 1, 1, generator=rng)
        with learning(), autocast(batch.images.device, "float32"), frozen(self._teacher.net), frozen(self._student):
            x = batch.images.detach().clone().requires_grad_()
            teacher, student = (view_at(net, x, (), self._precision) for net in (self._teacher.net, self._student))
            (uphill,) = torch.autograd.grad(self._gap(student.logits, teacher.logits), x)
        return Batch(torch.addcmul(x.detach(), length.to(x.device, x.dtype), uphill.sign()), batch.labels)
