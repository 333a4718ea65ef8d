"""What does the loss look like around the student? Surfaces along random directions that respect the filters' sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zsq.analysis.subject import Subject, losses_on, restored
from zsq.errors import BadInput
from zsq.grid import decode, encode
from zsq.insert.access import QuantizedWeight
from zsq.insert.weight_path import WeightPath, exact
from zsq.run.progress import Progress, Silent

MODES = ("requant", "dequant")

Evaluate = Callable[[], Mapping[str, Tensor]]
Move = Sequence[Tensor]


@dataclass(frozen=True)
class Surface:
    """Losses around one centre.

    Attributes:
        arm: which images.
        mode: requant (latent weights are moved and rounded again: what a deployed network would do, a staircase) or
            dequant (the rounded weights are moved and not rounded again: what the Hessian describes).
        centre: loss -> value at the unmoved student.
        plane: loss -> [points, points], first index along the first direction.
        lines: loss -> [directions, points].
    """

    arm: str
    mode: str
    centre: dict[str, float]
    plane: dict[str, list[list[float]]]
    lines: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Landscape:
    """Loss surfaces; values are losses (batch means), coordinates are multiples of each filter's own norm.

    Activations stay quantized with frozen ranges; a live range of a weight follows the moved weight in mode requant.
    BatchNorm, biases and everything else float stay as they are. Two planes through the same network differ: compare
    losses within one result (same directions), and networks only with the spread of the lines in view.

    Attributes:
        coordinates: along every direction.
        surfaces: per arm and mode; losses ce, kl (temperature of the run, batch mean) and kl_t1.
    """

    coordinates: list[float]
    surfaces: list[Surface]

    def table(self) -> dict[str, Any]:
        """Mean rise of each loss at the middle of the half-axes, over the lines."""
        at = len(self.coordinates) // 4
        rows = {}
        for s in self.surfaces:
            rises = {k: sum(v[at] + v[-1 - at] for v in v2) / (2 * len(v2)) - s.centre[k] for k, v2 in s.lines.items()}
            rows[f"{s.arm}, {s.mode}: rise at ±{abs(self.coordinates[at]):g}"] = {
                name: round(value, 4) for name, value in rises.items()
            }
        return rows

    def to_json(self) -> dict[str, Any]:
        """All values."""
        return asdict(self)


def landscape(
    subject: Subject,
    *,
    points: int = 11,
    lines: int = 5,
    radius: float = 1.0,
    seed: int = 0,
    shown: Progress | None = None,
) -> Landscape:
    """Measure the loss surfaces of a run's student, all losses from one forward and along the same directions.

    Args:
        subject: from `open_subject`.
        points: per axis, odd.
        lines: directions of the one-dimensional slices, at least 2; the first two span the plane.
        radius: end of the axes, in norms of each filter.
        seed: of the directions.
        shown: progress display.

    Raises:
        BadInput: for an even number of points, or fewer than 3.

    Source: Li et al., NeurIPS 2018 (filter normalisation); AIT (arXiv 2203.17008), figure 2.
    """
    axis = coordinates(points, radius)
    shown = shown or Silent()
    moves = directions([(w.parameter, w.axis) for w in subject.weights], count=max(lines, 2), seed=seed)
    n = len(moves)
    plane = [_place(n, {0: a, 1: b}) for a in axis for b in axis]
    where = list(dict.fromkeys([*plane, *(_place(n, {k: a}) for k in range(n) for a in axis)]))  # each point once
    shown.start("landscape", len(where) * len(subject.arms) * len(MODES), 0)
    surfaces: list[Surface] = []
    for arm in subject.arms:
        for mode in MODES:
            begun = len(where) * len(surfaces)
            with _moved_weights(subject, mode) as parameters:
                found = scan(parameters, moves, where, lambda arm=arm: losses_on(subject, arm),  # type: ignore[misc]
                             tick=lambda n, begun=begun: shown.update(begun + n))  # type: ignore[misc]  # fmt: skip
            at = {loss: dict(zip(where, values, strict=True)) for loss, values in found.items()}
            surfaces.append(_surface(arm.name, mode, axis, at))
    return Landscape(axis, surfaces)


def _place(count: int, steps: Mapping[int, float]) -> tuple[float, ...]:
    """A point as one coordinate per direction."""
    return tuple(steps.get(k, 0.0) for k in range(count))


def _surface(arm: str, mode: str, axis: list[float], found: Mapping[str, Mapping[tuple[float, ...], float]]) -> Surface:
    """Sort the values at all points into centre, plane and lines."""
    count = len(next(iter(next(iter(found.values())))))
    return Surface(
        arm, mode, {loss: at[_place(count, {})] for loss, at in found.items()},
        {loss: [[at[_place(count, {0: a, 1: b})] for b in axis] for a in axis] for loss, at in found.items()},
        {loss: [[at[_place(count, {k: a})] for a in axis] for k in range(count)] for loss, at in found.items()},
    )  # fmt: skip


def coordinates(points: int, radius: float) -> list[float]:
    """Evenly spaced numbers from -radius to radius, with an exact 0.

    Raises:
        BadInput: for an even number of points, or fewer than 3.

    Example:
        >>> coordinates(5, 1.0)
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if points < 3 or points % 2 == 0:
        raise BadInput("--points", expected="an odd number from 3, so that the centre is one of them", got=points,
                       fix="For example 11.")  # fmt: skip
    half = points // 2
    return [radius * (i - half) / half for i in range(points)]


def directions(weights: Sequence[tuple[Tensor, int | None]], *, count: int, seed: int = 0) -> list[list[Tensor]]:
    """Random Gaussian directions, each filter scaled to the norm of the weight's own filter.

    Args:
        weights: tensor and dimension of its output channels (None: 0). Of one dimension or less: direction 0.
        count: how many directions.
        seed: of the numbers.

    Returns:
        Per direction a tensor per weight.
    """
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        moves = []
        for weight, axis in weights:
            noise = torch.randn(weight.shape, generator=rng, dtype=weight.dtype).to(weight.device)
            dims = [d for d in range(weight.dim()) if d != (axis or 0)]
            own = weight.detach()
            scale = own.square().sum(dims, keepdim=True).sqrt() / noise.square().sum(dims, keepdim=True).sqrt()
            moves.append(noise * scale if weight.dim() > 1 else torch.zeros_like(own))
        found.append(moves)
    return found


@torch.no_grad()
def scan(
    parameters: Sequence[Tensor],
    moves: Sequence[Move],
    where: Sequence[Sequence[float]],
    evaluate: Evaluate,
    *,
    tick: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Evaluate losses at ``centre + sum_k c_k * moves[k]``; afterwards the parameters are what they were, bit for bit.

    Args:
        parameters: what is moved; their present values are the centre.
        moves: directions, each with a tensor per parameter.
        where: per point up to as many coordinates as there are directions; the rest are 0.
        evaluate: gives named 0-dim losses at the present values.
        tick: called with the number of finished points.

    Returns:
        Per loss the values, in the order of `where`.
    """
    centre = [parameter.detach().clone() for parameter in parameters]
    values: dict[str, list[float]] = {}
    with restored(parameters):
        for done, place in enumerate(where, start=1):
            for i, (parameter, start) in enumerate(zip(parameters, centre, strict=True)):
                parameter.copy_(start)
                for step, move in zip(place, moves, strict=False):
                    if step != 0:
                        parameter.add_(move[i], alpha=step)
            for name, loss in evaluate().items():
                values.setdefault(name, []).append(float(loss))
            if tick is not None:
                tick(done)
    return values


@contextmanager
def _moved_weights(subject: Subject, mode: str) -> Iterator[list[Tensor]]:
    """The tensors to move in a mode; in dequant the student computes with them as they are."""
    parameters: list[Tensor] = [weight.parameter for weight in subject.weights]
    paths = [m for m in subject.student.modules() if isinstance(m, WeightPath)] if mode == "dequant" else []
    with restored(parameters), exact(paths):
        if mode == "dequant":
            _round(subject.weights)
        yield parameters


@torch.no_grad()
def _round(weights: Sequence[QuantizedWeight]) -> None:
    """Replace latent weights by the values their codes stand for."""
    for weight in weights:
        grid = weight.grid()
        weight.parameter.copy_(decode(encode(weight.parameter, grid), grid))
