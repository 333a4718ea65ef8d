"""The state of a reconstruction: which block is open, what it is given, what it should give, what is learned in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from zsq import losses
from zsq.insert.access import float_twin, weight_paths
from zsq.quantizer import LearnedStep
from zsq.reconstruction.blocks import Block
from zsq.reconstruction.open_block import OpenBlock
from zsq.reconstruction.rounding import check_fixed

if TYPE_CHECKING:
    from zsq.run import Run

_CHUNK = 64  # images per forward wherever all of them pass
_SETTLING = 0.2  # share of a block's steps before the regulariser begins
_BETA = (20.0, 2.0)  # its exponent, first and last


class Settings(NamedTuple):
    """The numbers of a reconstruction; see `zsq.reconstruction.reconstruct`."""

    steps: int
    batch: int
    micro_batch: int | None
    lr: float
    step_lr: float
    regularisation: float
    drop: float
    objective: str
    stage: str


class Cache:
    """A tensor per image, in host memory, in chunks of as many images as pass a network at a time.

    Args:
        chunks: all but the last of `_CHUNK` images.
    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self.chunks = [chunk.detach().cpu() for chunk in chunks]

    def rows(self, index: Sequence[int], device: torch.device) -> Tensor:
        """These images' tensors, on the device."""
        picked = [self.chunks[i // _CHUNK][i % _CHUNK] for i in index]
        return torch.stack(picked).to(device, non_blocking=True)

    def through(self, net: nn.Module, device: torch.device) -> Cache:
        """What a network makes of every image."""
        with torch.no_grad():
            return Cache([net(chunk.to(device)) for chunk in self.chunks])


class Reconstruction:
    """Blocks one after the other; all of its state fits into a checkpoint.

    A checkpoint holds what is learned in the open block; what the block is given is computed again, to the same bits,
    from the images and the finished blocks of the student, which has its own place in the checkpoint.

    Args:
        student: with fixed ranges.
        state: state dict of the float network.
        blocks: from `find_blocks`.
        images: shape [n, c, h, w].
        settings: the numbers.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        state: dict[str, Tensor],
        blocks: Sequence[Block],
        images: Tensor,
        settings: Settings,
    ) -> None:
        self._student, self._blocks, self._settings, self._count = student, list(blocks), settings, len(images)
        self._device = next(student.parameters()).device
        twin: Any = float_twin(student, state)
        self._exact, self._low_bit = [b.within(twin) for b in blocks], [b.within(student) for b in blocks]
        self._images = Cache(images.split(_CHUNK))
        self._paths = weight_paths(student)
        for place in {place for block in blocks for place in block.layers}:
            check_fixed(self._paths[place].name, self._paths[place].path)
        self._open: OpenBlock | None = None
        self._index, self._saved = -1, dict[str, Any]()
        self._at = -1  # the block that the three caches belong to
        self._given = self._exact_given = self._wanted = self._images
        self._weight: Cache | None = None
        self.total = len(self._blocks) * settings.steps

    def rounded(self) -> list[list[str]]:
        """Per block, the layers whose rounding is learned there.

        Not learned are weights that several layers share or that a layer computes from others (weight normalisation):
        they keep the nearest rounding. A layer called in several blocks is learned in the first.
        """
        latents = [id(entry.latent) for entry in self._paths.values()]
        seen, found = set[str](), list[list[str]]()
        for block in self._blocks:
            mine = [(place, self._paths[place]) for place in block.layers if place not in seen]
            seen.update(block.layers)
            found.append([place for place, (_, path, latent) in mine
                          if latent is not None and not path.derived and latents.count(id(latent)) == 1])  # fmt: skip
        return found

    def step(self, number: int, run: Run) -> dict[str, Tensor]:
        """One Adam step of the block whose turn it is.

        Args:
            number: of the step, over all blocks.
            run: gives the randomness.

        Returns:
            Terms ``mse`` and ``round``; with a block's last step also its error ``before`` and ``after``.
        """
        index, iteration = divmod(number, self._settings.steps)
        block = self._block(index)
        rng = run.rng(self._settings.stage, number)
        chosen = torch.randperm(self._count, generator=rng)[: self._settings.batch].tolist()
        seed = int(torch.randint(2**62, (), generator=rng))
        size = self._settings.micro_batch or len(chosen)
        terms: dict[str, Tensor] = {}
        gradients: list[Tensor | None] = [None] * len(block.leaves)
        for start in range(0, len(chosen), size):
            part = slice(start, start + size)
            share = len(chosen[part]) / len(chosen)
            found = self._terms(block, chosen, part, iteration, seed)
            new = torch.autograd.grad(share * torch.stack(list(found.values())).sum(), block.leaves, allow_unused=True)
            gradients = [g if old is None or g is None else old + g for old, g in zip(gradients, new, strict=True)]
            terms = {name: terms.get(name, 0.0) + share * term.detach() for name, term in found.items()}
        late = (1 + math.cos(math.pi * iteration / self._settings.steps)) / 2
        free = len(block.roundings)
        rates = [self._settings.lr] * free + [self._settings.step_lr * late] * (len(block.leaves) - free)
        block.adam.update(gradients, rates)
        return terms | (self._finish(block) if iteration + 1 == self._settings.steps else {})

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._index, "block": {} if self._open is None else self._open.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._index, self._saved, self._open, self._at = state["index"], state["block"], None, -1

    def _block(self, index: int) -> OpenBlock:
        """The open block; opens it first if it is another's turn, or if the run was resumed."""
        if index == self._index and self._open is not None:
            return self._open
        self._advance(index)
        block, rounded = self._blocks[index], self.rounded()[index]
        earlier = {place for other in self._blocks[:index] for place in (*other.layers, *other.sites)}
        rest = [self._paths[place].path.quantizer for place in block.layers if place not in {*rounded, *earlier}]
        sites: list[Any] = [self._student.get_submodule(place) for place in block.sites if place not in earlier]
        learned = [quantizer for quantizer in (*sites, *rest) if isinstance(quantizer, LearnedStep)]
        made = OpenBlock([self._paths[place] for place in rounded], learned, sites)
        if index == self._index and self._saved:
            made.load_state_dict(self._saved)
        else:
            made.error = self._error(index)
        self._index, self._open, self._saved = index, made, {}
        return made

    def _advance(self, index: int) -> None:
        """Bring the caches to what block `index` is given and should give."""
        if not 0 <= self._at <= index:
            self._given, self._exact_given, self._at = self._images, self._images, 0
            self._wanted = self._images.through(self._exact[0], self._device)
        while self._at < index:
            self._given = self._given.through(self._low_bit[self._at], self._device)
            self._at += 1
            self._exact_given = self._wanted
            self._wanted = self._wanted.through(self._exact[self._at], self._device)
        self._weight = self._sensitivity(index) if self._settings.objective == "fisher" else None

    def _sensitivity(self, index: int) -> Cache:
        """Squared gradient of KL(teacher || student) with respect to the block's output, with a mean of 1."""
        found = []
        for given, wanted in zip(self._given.chunks, self._wanted.chunks, strict=True):
            with torch.no_grad():
                low_bit, exact = self._low_bit[index](given.to(self._device)), wanted.to(self._device)
                for later in self._exact[index + 1 :]:
                    exact = later(exact)
            with torch.enable_grad():
                logits = low_bit.requires_grad_()
                for later in self._exact[index + 1 :]:
                    logits = later(logits)
                total = losses.kl(logits, exact, temperature=1.0, reduction="batchmean") * len(given)
                found.append(torch.autograd.grad(total, low_bit)[0].square())
        mean = torch.stack([part.sum() for part in found]).sum() / sum(part.numel() for part in found)
        return Cache([part / mean.clamp_min(1e-30) for part in found])

    def _terms(self, block: OpenBlock, chosen: list[int], part: slice, iteration: int, seed: int) -> dict[str, Tensor]:
        """The block's error on a part of the batch, and the indecision of its weights."""
        index, drop = chosen[part], self._settings.drop
        draw = torch.Generator(self._device).manual_seed(seed)

        def keep(x: Tensor) -> Tensor:  # drawn for the whole batch, so that parts of it see what the whole would
            size = (len(chosen) if len(x) == len(index) else len(x), *x.shape[1:])
            drawn = torch.rand(size, generator=draw, device=x.device) < drop
            return drawn[part] if len(x) == len(index) else drawn

        x = self._given.rows(index, self._device)
        if drop > 0:
            x = torch.where(keep(x), self._exact_given.rows(index, self._device), x)
        with torch.enable_grad(), block.soft(keep if drop > 0 else None):
            found = self._low_bit[self._index](x)
            weight = None if self._weight is None else self._weight.rows(index, self._device)
            mse = squared_error(found, self._wanted.rows(index, self._device), weight)
            begin = round(_SETTLING * self._settings.steps)
            if iteration < begin or not block.roundings:
                return {"mse": mse, "round": torch.zeros_like(mse)}
            left = 1 - (iteration - begin) / (self._settings.steps - begin)
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * left
            return {"mse": mse, "round": self._settings.regularisation * block.indecision(beta)}

    def _error(self, index: int) -> Tensor:
        """Mean error of a block over all images, as it is now."""
        parts = []
        weights = [None] * len(self._given.chunks) if self._weight is None else self._weight.chunks
        with torch.no_grad():
            for given, wanted, weight in zip(self._given.chunks, self._wanted.chunks, weights, strict=True):
                found = self._low_bit[index](given.to(self._device))
                factor = None if weight is None else weight.to(self._device)
                parts.append(squared_error(found, wanted.to(self._device), factor) * len(given))
        return torch.stack(parts).sum() / self._count

    def _finish(self, block: OpenBlock) -> dict[str, Tensor]:
        """Round for good; a block that ends worse than with the nearest rounding is put back."""
        before = block.error
        if before is None:
            raise ValueError("expected an open block")
        for rounding in block.roundings:
            rounding.harden()
        after = self._error(self._index)
        if not bool(after <= before):  # read once per block, between two steps
            block.put_back()
        return {"before": before, "after": torch.minimum(before, after)}


def squared_error(found: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error, summed over channels, averaged over images and positions.

    Args:
        found: shape [n, c, ...].
        wanted: the same shape.
        weight: of every single error, the same shape; None for 1.

    Source: BRECQ (Li et al., ICLR 2021), equation 10 with the weight, the released code without.

    Example:
        >>> float(squared_error(torch.zeros(1, 2, 4), torch.ones(1, 2, 4)))
        2.0
    """
    square = (found - wanted).square()
    total = (square if weight is None else square * weight).sum()
    return total / (square.numel() // square.shape[1] if square.dim() > 1 else square.numel())
