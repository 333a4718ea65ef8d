"""What a source is: something that gives batches of images made from the teacher alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.view import View

if TYPE_CHECKING:
    from zsq.run import Run
    from zsq.teachers import Teacher


class Batch(NamedTuple):
    """One batch of synthetic images.

    Attributes:
        images: shape [b, c, h, w], float32, in the teacher's normalised space; detached.
        labels: the class each image was made for, int64 [b], or soft targets [b, k]; None where the source has none.
        view: what the teacher saw on exactly these images (detached), if the source had to compute it anyway;
            `fit` then saves a teacher forward. None otherwise.
    """

    images: Tensor
    labels: Tensor | None = None
    view: View | None = None


@runtime_checkable
class Source(Protocol):
    """Gives batches. It may learn while it is read.

    Contract (tests/contracts/test_sources.py): works under any ambient grad mode; leaves parameters, gradients, buffers
    and train/eval mode of teacher and student unchanged; all randomness comes from the `rng` it is handed; `sample`
    changes nothing at all.

    Attributes:
        name: short name for logs and summaries, e.g. ``"gdfq"``.
        batch: images per draw; the recipe that draws sets it.
        metrics: loss terms of the last `draw`, 0-dim tensors on the source's device (never read back in the step).
    """

    name: str
    batch: int
    metrics: dict[str, Tensor]

    def draw(self, rng: torch.Generator) -> Batch:
        """Give the next training batch; a learning source takes one step of its own first."""
        ...

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Give `count` images without learning and without touching any state."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Prepared(Protocol):
    """A source that has work to do before its first draw, as a stage of its own.

    `calibrate` and `fit` ask for it, so that recipes need not know which of their sources do.
    """

    def prepare(self, run: Run) -> None:
        """Do the work; at once if it is done."""
        ...


def prepare(source: Source, run: Run) -> None:
    """Let a source do what it has to do before its first draw; nothing for most."""
    if isinstance(source, Prepared):
        source.prepare(run)


def require_image_labels(teacher: Teacher, source: str) -> None:
    """Refuse to make images for a class where an image has none.

    Args:
        teacher: what the images are made for.
        source: name of the source.

    Raises:
        BadInput: naming sources that need no class.
    """
    if not teacher.outputs.image_labels:
        raise BadInput(
            f"source {source}", expected="a teacher that gives every image one class, because its images are made for "
            "a class", got=f"{teacher.name}, whose task is to {teacher.task}",
            fix="Use images that need none: recipe zeroq, recipe zaq, recipe ait with --base zeroq, or --images FILE.",
        )  # fmt: skip


@runtime_checkable
class Finite(Protocol):
    """A source with a fixed set of images."""

    def pick(self, count: int, rng: torch.Generator) -> Batch:
        """Up to `count` of the images that `draw` draws from, in a random order, each at most once."""
        ...


def distinct_images(source: Source, count: int, rng: torch.Generator) -> Tensor:
    """Up to `count` different images of a source, for methods that work on a set instead of batches.

    Args:
        source: asked for the images it trains on if it has a fixed set of them, else (a generator) for fresh ones.
        count: how many.
        rng: of the choice.

    Returns:
        Images [n, c, h, w].
    """
    return (source.pick if isinstance(source, Finite) else source.sample)(count, rng).images
