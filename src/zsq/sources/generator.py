"""A source whose images come from a generator that learns from the teacher, one step per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zsq.adam import Adam
from zsq.errors import BadInput
from zsq.sources.base import Batch
from zsq.view import View, frozen, look

if TYPE_CHECKING:
    from zsq.footprint import StepCost
    from zsq.teachers import Teacher

Loss = Callable[[View, Batch], Mapping[str, Tensor]]


class Latents(NamedTuple):
    """What one generator forward is made from.

    Attributes:
        inputs: positional arguments of the generator, e.g. (z, labels).
        labels: target of the class loss: int64 [b], or soft [b, k].
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor


LatentSampler = Callable[[int, torch.Generator], Latents]


def gaussian_latents(latent: int, classes: int) -> LatentSampler:
    """Draw z ~ N(0, I) of shape [b, latent] and labels uniform over the classes, as GDFQ does.

    Args:
        latent: length of z.
        classes: number of classes.

    Returns:
        A function of (count, rng).

    Example:
        >>> inputs, labels = gaussian_latents(100, 10)(4, torch.Generator().manual_seed(0))
        >>> inputs[0].shape, labels.shape
        (torch.Size([4, 100]), torch.Size([4]))
    """

    def draw(count: int, rng: torch.Generator) -> Latents:
        z = torch.randn(count, latent, generator=rng)
        labels = torch.randint(classes, (count,), generator=rng)
        return Latents((z, labels), labels)

    return draw


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Bfloat16 autocast if asked for; otherwise float32, also inside an outer autocast.

    Raises:
        BadInput: the precision is unknown.
    """
    if precision not in ("bf16", "float32"):
        raise BadInput("precision", expected="'bf16' or 'float32'", got=repr(precision), fix="Choose one of the two.")
    # Without the cache of cast weights: inside a caller's autocast it would outlive the optimizer step.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@contextmanager
def learning() -> Iterator[None]:
    """Record gradients whatever the caller's mode: a source may be read under no_grad or inference_mode."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


class GeneratorSource:
    """Images from a generator trained to please the teacher.

    `draw`: latents from the rng -> images -> teacher (frozen, eval) with the statistics of its BatchNorm inputs -> loss
    -> one Adam step on the generator. The batch it returns is from before the step, with the teacher's view of it.
    Generator and teacher run in bfloat16 by default; statistics and losses are float32.

    Args:
        teacher: gives `net`, `classes` and `image`.
        generator: maps `Latents.inputs` to images [b, c, h, w] in the teacher's normalised space; moved to its device.
        loss: maps (view, batch) to named, already weighted 0-dim terms; their sum is minimised. Images and view carry
            gradients.
        name: for logs and summaries.
        batch: images per draw.
        lr: of Adam.
        betas: of Adam.
        milestones: numbers of finished draws after which the learning rate is multiplied by `decay`.
        decay: factor at each milestone.
        precision: ``"bf16"`` or ``"float32"``; the teacher's if not given.
        latents: draws what the generator is fed with; None for Gaussian z of length ``generator.latent`` (100 if it has
            none) and uniform labels.
        cost: of a step, if it is known; recipes show it before they start.

    Raises:
        BadInput: batch below 2 (a generator normalises over its batch), or an unknown precision.

    Source: GDFQ (arXiv 2003.03603), the released training loop.
    """

    def __init__(
        self,
        teacher: Teacher,
        generator: nn.Module,
        loss: Loss,
        *,
        name: str,
        batch: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        milestones: Sequence[int] = (),
        decay: float = 0.1,
        precision: Literal["bf16", "float32"] | None = None,
        latents: LatentSampler | None = None,
        cost: StepCost | None = None,
    ) -> None:
        if batch < 2:
            raise BadInput("--batch", expected="at least 2 images", got=batch, fix="Choose a larger batch.")
        self.name, self.batch, self.cost = name, batch, cost
        self.metrics: dict[str, Tensor] = {}
        self.device = next(teacher.net.parameters()).device
        precision = precision or teacher.precision
        autocast(self.device, precision)
        self._teacher, self._loss, self._precision = teacher, loss, precision
        self._latents = latents or gaussian_latents(getattr(generator, "latent", 100), teacher.classes)
        self._lr, self._milestones, self._decay = lr, tuple(milestones), decay
        # channels_last: 10 % faster in float32 on a CPU, equal in bfloat16, and what tensor cores want.
        self.generator = generator.to(self.device).to(  # type: ignore[call-overload]  # torch's stub lacks it
            memory_format=torch.channels_last
        )
        self._optimizer = Adam(generator.parameters(), lr, betas)
        self._count = 0

    def draw(self, rng: torch.Generator) -> Batch:
        """Take one step of the generator and give the images it was taken on."""
        with learning(), autocast(self.device, "float32"):  # backward and losses too, inside a caller's autocast
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr * self._decay ** sum(self._count >= m for m in self._milestones)
            with frozen(self._teacher.net), autocast(self.device, self._precision):
                images, labels = self._make(rng)
                view = look(self._teacher.net, images, norms=True)
            view = view._replace(logits=_wide(view.logits))
            terms = self._loss(view, Batch(images, labels))
            total = torch.stack(list(terms.values())).sum()
            # Only these: nothing may accumulate in the teacher, whatever its flags are.
            total.backward(inputs=list(self.generator.parameters()))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._count += 1
            self.metrics = {name: term.detach() for name, term in terms.items()}
            return Batch(images.detach(), labels, view.detach())

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Give `count` images without learning.

        Whole batches are made and the surplus is dropped: how an image looks depends on its batch mates.
        """
        if count < 1:
            raise BadInput("sample", expected="at least 1 image", got=count, fix="Ask for a positive number.")
        images, labels = [], []
        with learning(), torch.no_grad(), autocast(self.device, self._precision):
            for done in range(0, count, self.batch):
                made, asked = self._make(rng)
                images.append(made[: count - done])
                labels.append(asked[: count - done])
            return Batch(torch.cat(images), torch.cat(labels))

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._count = state["count"]

    def _make(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """One batch of images (with gradient) and its labels, both on the device."""
        inputs, labels = self._latents(self.batch, rng)
        images: Tensor = self.generator(*(self._to_device(x) for x in inputs))
        return _wide(images), self._to_device(labels)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda" and x.device.type == "cpu":  # pinned, or the copy would wait for the device
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
