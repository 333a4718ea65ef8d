"""Another source's images, moved to where student and teacher differ more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsq.precision import view_at
from zsq.run import Run
from zsq.sources.base import Batch, Source, distinct_images, prepare
from zsq.sources.generator import autocast, learning
from zsq.view import frozen

if TYPE_CHECKING:
    from zsq.teachers import Teacher

Gap = Callable[[Tensor, Tensor], Tensor]


class HarderSource:
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
        self._source, self._teacher, self._student, self._gap = source, teacher, student, gap
        self._epsilon, self._precision = epsilon, precision
        self.name, self.metrics = source.name, source.metrics

    @property
    def batch(self) -> int:
        """Images per draw."""
        return self._source.batch

    @batch.setter
    def batch(self, count: int) -> None:
        """Images per draw."""
        self._source.batch = count

    def prepare(self, run: Run) -> None:
        """Let the source prepare."""
        prepare(self._source, run)

    def draw(self, rng: torch.Generator) -> Batch:
        """A batch of the source, moved."""
        batch = self._source.draw(rng)
        self.metrics = self._source.metrics
        length = self._epsilon * torch.rand(len(batch.images), 1, 1, 1, generator=rng)
        with learning(), autocast(batch.images.device, "float32"), frozen(self._teacher.net), frozen(self._student):
            x = batch.images.detach().clone().requires_grad_()
            teacher, student = (view_at(net, x, (), self._precision) for net in (self._teacher.net, self._student))
            (uphill,) = torch.autograd.grad(self._gap(student.logits, teacher.logits), x)
        return Batch(torch.addcmul(x.detach(), length.to(x.device, x.dtype), uphill.sign()), batch.labels)

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Images of the source as they are."""
        return self._source.sample(count, rng)

    def pick(self, count: int, rng: torch.Generator) -> Batch:
        """Images of the source as they are, each at most once."""
        return Batch(distinct_images(self._source, count, rng))

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)
