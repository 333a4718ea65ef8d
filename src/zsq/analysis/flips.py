"""Which integer weights move? The share of changed codes per layer between the snapshots of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq.analysis.subject import Subject, at_snapshot, history_files, is_complete
from zsq.errors import BadInput
from zsq.grid import Grid, encode
from zsq.run.progress import Progress, Silent


class Codes(NamedTuple):
    """One weight at one moment.

    Attributes:
        codes: under the grid of that moment.
        latent: the latent weight.
        grid: of that moment, in coordinates of the latent.
    """

    codes: Tensor
    latent: Tensor
    grid: Grid


@dataclass(frozen=True)
class Layer:
    """Flip ratios of one weight. All are shares of its elements, 0 to 1, per interval between two snapshots.

    Attributes:
        name: of the layer.
        size: number of weights.
        own_grid: codes that differ, each under its own moment's grid, as the network computes; grid shifts count.
        fixed_grid: the same with both moments under the earlier grid: thresholds truly crossed.
        moved_zeros: share of the layer's zero points (channels) that changed.
        step_flips: own-grid flips added up over all steps of the interval; None unless every step is in the history.
        ever: share of the weights that flipped in any interval, own grid.
        oscillation: flips over all intervals divided by those between the first and the last snapshot (1: none goes
            back; snapshots far apart hide oscillation); None if nothing differs in the end.
    """

    name: str
    size: int
    own_grid: list[float]
    fixed_grid: list[float]
    moved_zeros: list[float]
    step_flips: list[float] | None
    ever: float
    oscillation: float | None


@dataclass(frozen=True)
class Flips:
    """Flip ratios of a run.

    They grow with the length of the interval: compare runs at equal steps, or divide by the interval's length.

    Attributes:
        steps: student updates at each snapshot; interval i lies between steps[i] and steps[i + 1].
        complete: whether grids are exactly those of each moment, or (False) BatchNorm factors folded into weights are
            the final ones.
        layers: in order of the network.
    """

    steps: list[int]
    complete: bool
    layers: list[Layer]

    def ratio(self, kind: str, interval: int) -> float:
        """Share over all weights of the network.

        Args:
            kind: own_grid or fixed_grid.
            interval: its number, from 0.
        """
        return sum(x.size * getattr(x, kind)[interval] for x in self.layers) / sum(x.size for x in self.layers)

    def table(self) -> dict[str, Any]:
        """First and last interval: share over all weights, and the extremes over the layers."""
        rows: dict[str, Any] = {}
        for i in (0, len(self.steps) - 2):
            own = [layer.own_grid[i] for layer in self.layers]
            rows[f"steps {self.steps[i]} to {self.steps[i + 1]}"] = (
                f"{100 * self.ratio('own_grid', i):.4g} % of the weights (layers {100 * min(own):.4g} to"
                f" {100 * max(own):.4g} %), fixed grid {100 * self.ratio('fixed_grid', i):.4g} %"
            )
        known = [layer.oscillation for layer in self.layers if layer.oscillation is not None]
        rows["oscillation (median layer)"] = round(statistics.median(known), 3) if known else "no weight moved"
        return rows

    def to_json(self) -> dict[str, Any]:
        """All values."""
        return asdict(self)


def flips(subject: Subject, *, shown: Progress | None = None) -> Flips:
    """Measure which integer weights changed between the snapshots of a run's history.

    Args:
        subject: from `open_subject`.
        shown: progress display.

    Raises:
        BadInput: for a run with fewer than two snapshots.

    Source: AIT (arXiv 2203.17008), figure 3.
    """
    shown = shown or Silent()
    files = history_files(subject.path)
    if len(files) < 2:
        raise BadInput(
            f"flips of {subject.path}", expected="a history of at least two snapshots (history/*.safetensors)",
            got=f"{len(files)}", fix="Quantize again with zsq.Run(..., history=10); `zsq quantize` always keeps one.",
        )  # fmt: skip
    shown.start("flips", len(files), 0)
    layers: list[Counter] = []
    complete = True
    for done, file in enumerate(files.values(), start=1):
        now, whole = _codes(subject, file)
        complete = complete and whole
        if not layers:
            layers = [Counter(codes) for codes in now]
        else:
            for counter, codes in zip(layers, now, strict=True):
                counter.add(codes)
        shown.update(done)
    steps = list(files)
    every_step = all(b - a == 1 for a, b in pairwise(steps))
    names = [weight.name for weight in subject.weights]
    return Flips(steps, complete, [c.layer(n, every_step=every_step) for n, c in zip(names, layers, strict=True)])


class Counter:
    """Counts the flips of one weight, snapshot by snapshot; keeps two of them only.

    Args:
        first: the weight at the first snapshot.
    """

    def __init__(self, first: Codes) -> None:
        self.first, self.last = first.codes, first
        self.own: list[float] = []
        self.fixed: list[float] = []
        self.zeros: list[float] = []
        self.ever = torch.zeros(first.codes.shape, dtype=torch.bool, device=first.codes.device)

    def add(self, now: Codes) -> None:
        """Compare with the snapshot before."""
        before = self.last
        changed = now.codes != before.codes
        crossed = encode(now.latent, before.grid) != encode(before.latent, before.grid)
        self.own.append(_share(changed))
        self.fixed.append(_share(crossed))
        self.zeros.append(_share(now.grid.zero != before.grid.zero))
        self.ever |= changed
        self.last = now

    def layer(self, name: str, *, every_step: bool = False) -> Layer:
        """The ratios so far.

        Args:
            name: of the layer.
            every_step: the snapshots are one step apart.
        """
        net = _share(self.last.codes != self.first)
        oscillation = math.fsum(self.own) / net if net > 0 else None
        return Layer(name, self.first.numel(), self.own, self.fixed, self.zeros, list(self.own) if every_step else None,
                     _share(self.ever), oscillation)  # fmt: skip


def flip_ratios(snapshots: Sequence[Codes], *, name: str = "weight") -> Layer:
    """Flip ratios of one weight from its snapshots.

    Args:
        snapshots: in order of time, one step apart.
        name: of the layer.
    """
    counter = Counter(snapshots[0])
    for codes in snapshots[1:]:
        counter.add(codes)
    return counter.layer(name, every_step=True)


def _codes(subject: Subject, file: Path) -> tuple[list[Codes], bool]:
    """Every weight at a snapshot; whether the snapshot is complete."""
    found = []
    with at_snapshot(subject, file) as tree, torch.no_grad():
        for weight in subject.weights:
            stored = tree.get(f"{weight.name}.codes")
            if stored is None or stored.shape != weight.parameter.shape:
                raise BadInput(str(file), expected="integer codes of every quantized weight", got="none of some",
                               fix="The files were changed: quantize again.")  # fmt: skip
            latent = weight.parameter.detach().clone()
            found.append(Codes(stored.to(latent.device), latent, weight.grid()))
    return found, is_complete(tree)


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()
