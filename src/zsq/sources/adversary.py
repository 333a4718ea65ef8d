"""A source whose images come from a generator that widens the gap between teacher and student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zsq.adam import Adam
from zsq.errors import BadInput
from zsq.insert import activation_quantizers
from zsq.sources.base import Batch
from zsq.sources.generator import autocast, learning
from zsq.sources.replay import Replay
from zsq.view import View, frozen, look

if TYPE_CHECKING:
    from zsq.teachers import Teacher
    from zsq.units import Unit

AdversaryLoss = Callable[[View, View], Mapping[str, Tensor]]
Build = Callable[[torch.Generator | None], nn.Module]
ALIVE = 1e-3  # spread over samples, as a share of the whole spread, below which a batch shows one image only


class AdversarySource:
    """Images on which a student differs from its teacher, from a generator that learns what those are.

    `draw` gives the images of fresh latents, a share of them replaced by images of earlier batches. Before every
    `turns`-th draw the generator takes one step: latents -> images -> teacher and student (both frozen, in eval mode,
    left as they are) -> loss -> Adam. While the student's ranges are still being observed it takes none.

    Every `watch` draws the batches since then are looked at: if one was the same image over and over, or a loss was not
    finite, the generator starts afresh, with new weights and a new optimizer, and says so.

    Args:
        teacher: gives `net`.
        student: from `quantize`; at the time of a step it is what the recipe has made of it.
        build: makes a generator from the rng of its weights (None: torch's global one); it takes z [b, latent].
        loss: maps (student's view, teacher's view) to named terms whose sum is minimised; gradients flow through both.
        name: for logs and summaries.
        batch: images per draw.
        stages: what the views show besides the output.
        norms: whether the teacher's view shows its BatchNorms.
        lr: of Adam.
        betas: of Adam.
        milestones: numbers of finished draws after which the learning rate is multiplied by 0.1.
        turns: draws per step of the generator.
        replay: share of a batch that comes from earlier ones, in [0, 1).
        memory: number of batches that are remembered.
        watch: draws between two looks for a collapse; 0 for never.
        precision: of everything that the generator's step and its images take: ``"bf16"`` or ``"float32"``; the
            teacher's if not given.
        say: is told about a restart.

    Raises:
        BadInput: a number is out of range.

    Source: ZAQ (arXiv 2103.15263), discrepancy estimation; replay and restarts are ours.
    """

    def __init__(
        self, teacher: Teacher, student: nn.Module, build: Build, loss: AdversaryLoss, *, name: str, batch: int,
        stages: Sequence[Unit] = (), norms: bool = False, lr: float = 1e-3, betas: tuple[float, float] = (0.5, 0.999),
        milestones: Sequence[int] = (), turns: int = 5, replay: float = 0.25,
        memory: int = 16, watch: int = 20, precision: Literal["bf16", "float32"] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        if batch < 2:
            raise BadInput("--batch", expected="at least 2 images", got=batch, fix="Choose a larger batch.")
        if turns < 1:
            raise BadInput("--turns", expected="a whole number from 1", got=turns, fix="The published number is 5.")
        if not 0 <= replay < 1:
            raise BadInput("--replay", expected="a share from 0, below 1", got=replay, fix="0 turns it off.")
        self.name, self.batch = name, batch
        self.metrics: dict[str, Tensor] = {}
        self.device = next(teacher.net.parameters()).device
        precision = precision or teacher.precision
        autocast(self.device, precision)
        self._teacher, self._student, self._loss, self._precision = teacher, student, loss, precision
        self._build, self._say, self._norms = build, say, norms
        self._seen = tuple([stage.within(net) for stage in stages] for net in (student, teacher.net))
        self._lr, self._betas, self._milestones = lr, betas, tuple(milestones)
        self._turns, self._share, self._watch = turns, replay, watch
        self.generator = build(None).to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = self._adam()
        self._replay = Replay(max(1, memory * batch))
        self._count = 0
        self._spread = torch.full((), torch.inf, device=self.device)  # least since the last look
        self._restarts = torch.zeros((), device=self.device)

    def draw(self, rng: torch.Generator) -> Batch:
        """Take the generator's step if it is its turn, then give a batch without labels."""
        with learning(), autocast(self.device, "float32"):
            self.metrics = {"g_restarts": self._restarts}
            if self._watch and self._count and self._count % self._watch == 0:
                self._look_back(rng)
            observing = any(site.observing for site in activation_quantizers(self._student).values())
            if not observing and self._count > 0 and self._count % self._turns == 0:
                self._learn(rng)
            with torch.no_grad():
                images = self._batch(rng)
            self._count += 1
            return Batch(images)

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Give `count` new images without learning; whole batches are made and the surplus is dropped."""
        if count < 1:
            raise BadInput("sample", expected="at least 1 image", got=count, fix="Ask for a positive number.")
        with learning(), torch.no_grad(), autocast(self.device, "float32"):
            parts = [self._images(self.batch, rng)[: count - done] for done in range(0, count, self.batch)]
            return Batch(torch.cat(parts))

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(), "optimizer": self._optimizer.state_dict(), "count": self._count,
            "replay": self._replay.state_dict(), "spread": self._spread, "restarts": self._restarts,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._count = state["count"]
        self._replay.load_state_dict({k: self._here(v) for k, v in state["replay"].items()})
        self._spread, self._restarts = self._here(state["spread"]), self._here(state["restarts"])

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _adam(self) -> Adam:
        return Adam(self.generator.parameters(), self._lr, self._betas)

    def _images(self, count: int, rng: torch.Generator) -> Tensor:
        z = torch.randn(count, self.generator.latent, generator=rng)
        if self.device.type == "cuda":  # pinned, or the copy would wait for the device
            z = z.pin_memory()
        with autocast(self.device, self._precision):
            images: Tensor = self.generator(z.to(self.device, non_blocking=True))
        return _wide(images)

    def _batch(self, rng: torch.Generator) -> Tensor:
        """New images in front, remembered ones behind; the first batch after a step is what will be remembered."""
        again = int(self.batch * self._share) if len(self._replay) else 0
        # A generator that broke is noticed at the next look; until then the student gets grey images, not NaN.
        images = self._images(max(2, self.batch - again), rng).nan_to_num(0.0, 0.0, 0.0)[: self.batch]
        over_samples = images.std(0).mean() / images.std().clamp_min(1e-12)
        self._spread = torch.minimum(self._spread, over_samples.nan_to_num(0.0))
        if again:
            images = torch.cat([images, self._replay.pick(again, rng)])[: self.batch]
        if self._share and self._count % self._turns == 0:
            self._replay.push(images[: self.batch - again])
        return images.contiguous(memory_format=torch.channels_last)  # convolutions of the student are a quarter faster

    def _learn(self, rng: torch.Generator) -> None:
        """One step of the generator."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * 0.1 ** sum(self._count >= m for m in self._milestones)
        in_student, in_teacher = self._seen
        images = self._images(self.batch, rng)
        with frozen(self._teacher.net), frozen(self._student):
            with autocast(self.device, self._precision):
                t = _in_order(look(self._teacher.net, images, norms=self._norms, features=in_teacher), in_teacher)
                s = _in_order(look(self._student, images, features=in_student), in_student)
            terms = self._loss(s, t)
            total = torch.stack(list(terms.values())).sum()
            # Only these: nothing may accumulate in teacher or student.
            total.backward(inputs=list(self.generator.parameters()))
        for parameter in self.generator.parameters():  # a lost step must not poison the optimizer
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        finite = total.detach().isfinite()
        self._spread = torch.where(finite, self._spread, 0.0)
        self.metrics |= {name: torch.where(finite, term.detach(), 0.0) for name, term in terms.items()}

    def _look_back(self, rng: torch.Generator) -> None:
        """Read what happened since the last look (the one place that waits for the device) and act on it."""
        spread = float(self._spread)
        self._spread = torch.full((), torch.inf, device=self.device)
        if spread >= ALIVE:
            return
        self.generator.load_state_dict(self._build(rng).state_dict())
        self._optimizer = self._adam()
        self._restarts = self._restarts + 1
        self.metrics["g_restarts"] = self._restarts
        if self._say is not None:
            why = "a loss that was not finite, or one image over and over" if spread == 0 else "nearly one image only"
            self._say(f"generator restarted after {self._count} batches: {why} (spread over samples {spread:.1e})")


def _in_order(view: View, names: Sequence[str]) -> View:
    """The features under their position: teacher and student may call the same stage by two names. At least float32."""
    return View(_wide(view.logits), view.norms, {str(i): _wide(view.features[name]) for i, name in enumerate(names)})


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
