"""A fixed pool of images: a saved synthetic set, or real unlabelled images as a named control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsq.checkpoint import save_tree
from zsq.errors import BadInput
from zsq.sources.base import Batch
from zsq.teachers.weight_files import read_weights

if TYPE_CHECKING:
    from zsq.run import Run
    from zsq.teachers import Teacher

FILE = "pool.safetensors"  # in the run directory; `--images` reads it
HELD_OUT = 9  # one image in nine: an eighth more than asked for
_PART = 64  # images looked at together


class PoolSource:
    """Draws batches from a tensor of images; learns nothing.

    The tensor may be larger than memory: one that `read_pool` gives lies in its file, of which a draw reads its rows.

    Args:
        images: shape [n, c, h, w], in the teacher's normalised space; kept as given, drawn in float32.
        labels: shape [n], int64, or None.
        name: where the images came from; named in the summary.
        batch: images per draw.
        held_out: how many images at the end of the pool `draw` never sees; `sample` reads only those.

    Raises:
        BadInput: if the pool is not larger than the part held out, or the batch is empty.

    Example:
        >>> source = PoolSource(torch.zeros(8, 3, 4, 4), None, name="zeros", batch=2, held_out=2)
        >>> source.draw(torch.Generator().manual_seed(0)).images.shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None, *, name: str, batch: int = 64, held_out: int | None = None
    ) -> None:
        keep = min(1024, len(images) // 8) if held_out is None else held_out
        if images.ndim != 4 or not 0 < keep < len(images):
            raise BadInput(
                "--images",
                expected="at least 8 images, shape [n, c, h, w]",
                got=f"a tensor of shape {list(images.shape)}",
                fix="Give a larger pool, or a wider slice of the file.",
            )
        if batch < 1:
            raise BadInput("--batch", expected="at least 1 image", got=batch, fix="Choose a larger batch.")
        self.name, self.batch = name, batch
        self.metrics: dict[str, Tensor] = {}
        self._images, self._labels, self._seen = images, labels, len(images) - keep

    def draw(self, rng: torch.Generator) -> Batch:
        """A batch drawn with replacement from the part that is not held out."""
        return self._pick(torch.randint(self._seen, (self.batch,), generator=rng))

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Up to `count` held-out images, in a random order, each at most once."""
        held = len(self._images) - self._seen
        return self._pick(self._seen + torch.randperm(held, generator=rng)[:count])

    def pick(self, count: int, rng: torch.Generator) -> Batch:
        """Up to `count` images of the part that is not held out, in a random order, each at most once."""
        return self._pick(torch.randperm(self._seen, generator=rng)[:count])

    def _pick(self, index: Tensor) -> Batch:
        index = index.to(self._images.device)
        images = self._images[index]
        images = images if images.dtype == torch.float64 else images.float()
        return Batch(images, None if self._labels is None else self._labels[index])

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: the pool is the user's file."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class MadePool:
    """What sources share that make their pool before the first draw: `prepare` of a subclass makes it.

    Args:
        teacher: what the images are made for.
        name: for logs and summaries.
        batch: images per draw.
        facts: how the images are made; goes into the file.
    """

    def __init__(self, teacher: Teacher, *, name: str, batch: int, facts: Mapping[str, Any]) -> None:
        self.name, self.batch = name, batch
        self.metrics: dict[str, Tensor] = {}
        self._teacher, self.facts = teacher, dict(facts)
        self._pool: PoolSource | None = None

    def draw(self, rng: torch.Generator) -> Batch:
        """A batch drawn with replacement from the part that is not held out."""
        pool = self._ready()
        pool.batch = self.batch
        return pool.draw(rng)

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Up to `count` held-out images, in a random order, each at most once."""
        return self._ready().sample(count, rng)

    def pick(self, count: int, rng: torch.Generator) -> Batch:
        """Up to `count` images of the part that is not held out, in a random order, each at most once."""
        return self._ready().pick(count, rng)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the pool is in the checkpoint of its own stage."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _keep(self, images: Tensor, labels: Tensor | None, run: Run) -> None:
        """Draw from these images from now on, all but one in nine, and write them to the run's directory."""
        if run.path is not None and not (run.path / FILE).exists():
            facts = {"method": self.name, "teacher": self._teacher.name, "fingerprint": self._teacher.fingerprint,
                     "seed": run.seed, "pixels": "normalised as the teacher's input", **self.facts}  # fmt: skip
            tree = {"images": images.cpu()} | ({} if labels is None else {"labels": labels.cpu()})
            save_tree(run.path / FILE, tree, metadata={"provenance": json.dumps(facts)})
        in_file = run.path is not None and images.device.type == "cpu" and images.dtype == torch.float32
        if run.path is not None and in_file:  # the same pixels, but not in memory
            images, _ = read_pool(run.path / FILE, image=self._teacher.image, classes=self._teacher.classes)
        held_out = max(1, len(images) // HELD_OUT)
        self._pool = PoolSource(images, labels, name=self.name, batch=self.batch, held_out=held_out)

    def _ready(self) -> PoolSource:
        if self._pool is None:
            raise ValueError(f"source {self.name}: expected prepare(run) before the first draw")
        return self._pool


def read_pool(path: Path, *, image: tuple[int, int, int], classes: int) -> tuple[Tensor, Tensor | None]:
    """Read a saved pool: a safetensors file with ``images`` float [n, c, h, w], and maybe ``labels`` int64 [n].

    Args:
        path: the file.
        image: (c, h, w) of the teacher's input.
        classes: number of its classes.

    Returns:
        Images in float32 and labels or None, on the CPU. Float32 images stay in the file, mapped into memory.

    Raises:
        BadInput: if the file is damaged, of another kind, or not made for this teacher.
    """
    if not path.exists() and (path.parent / "checkpoint").is_dir():
        got = "a run that was interrupted while it made it"
        raise BadInput(f"--images {path}", expected="a pool of images", got=got,
                       fix="Finish that run first: repeat its command with --resume.")  # fmt: skip
    tree = read_weights(path, what="images")
    images, labels = tree.get("images"), tree.get("labels")
    wanted = f"a float tensor 'images' of shape {['n', *image]}".replace("'n'", "n")
    fix = "Give a pool made for this teacher."
    if images is None or not images.is_floating_point() or tuple(images.shape[1:]) != tuple(image):
        got = f"tensors {', '.join(sorted(tree))}" if images is None else f"{images.dtype} {list(images.shape)}"
        raise BadInput(f"--images {path}", expected=wanted, got=got, fix=fix)
    if not all(bool(part.isfinite().all()) for part in images.split(_PART)):
        raise BadInput(f"--images {path}", expected="finite pixels", got="NaN or infinity", fix="Make the pool again.")
    if labels is not None:
        whole = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
        if not whole or not bool(((labels >= 0) & (labels < classes)).all()):
            got = f"{labels.dtype} {list(labels.shape)}" + (f" from {labels.min()} to {labels.max()}" if whole else "")
            expected = f"one label from 0 to {classes - 1} per image"
            raise BadInput(f"--images {path}", expected=expected, got=got, fix=fix)
    return images.float(), labels
