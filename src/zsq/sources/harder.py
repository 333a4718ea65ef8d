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
        micro_batch: pass at most this many images at a time through the networks; they move the same way.

    Source: sample-difficulty promotion of HAST (arXiv 2303.13826), section 3.3, in the sense of its released program:
    uphill on the loss.
    """

    def __init__(
        self, source: Source, teacher: Teacher, student: nn.Module, gap: Gap, *, epsilon: float, precision: str,
        micro_batch: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(source)
        self._teacher, self._student, self._gap = teacher, student, gap
        self._epsilon, self._precision, self._micro_batch = epsilon, precision, micro_batch

    def changed(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The batch, moved."""
        images = batch.images.detach()
        length = self._epsilon * torch.rand(len(images), 1, 1, 1, generator=rng)
        with learning(), autocast(images.device, "float32"), frozen(self._teacher.net), frozen(self._student):
            way = torch.cat([self._uphill(part) for part in images.split(self._micro_batch or len(images))])
        return Batch(torch.addcmul(images, length.to(images.device, images.dtype), way), batch.labels)

    def _uphill(self, images: Tensor) -> Tensor:
        """Sign of the gap's gradient; of each image by itself, since neither network looks across a batch."""
        x = images.clone().requires_grad_()
        teacher, student = (view_at(net, x, (), self._precision) for net in (self._teacher.net, self._student))
        return torch.autograd.grad(self._gap(student.logits, teacher.logits), x)[0].sign()
