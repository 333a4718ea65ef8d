"""Do cross entropy and distillation pull the weights the same way? The cosine between their gradients over training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq import losses
from zsq.analysis.subject import Arm, Subject, at_snapshot, is_complete, moments
from zsq.run.progress import Progress, Silent


@dataclass(frozen=True)
class Curve:
    """Cosines of one pair of losses on one arm.

    Attributes:
        arm: which images.
        labels: which labels the cross entropy takes.
        temperature: of the KL.
        values: per moment, per batch: cosine over all quantized weights together; None where a gradient is zero.
        layers: per layer, per moment: mean over the batches; None where a gradient is zero.
        logits: per moment: mean over the images of the cosine between the gradients with respect to the logits.
    """

    arm: str
    labels: str
    temperature: float
    values: list[list[float | None]]
    layers: dict[str, list[float | None]]
    logits: list[float | None]


@dataclass(frozen=True)
class Cosine:
    """Cosine between the gradients of cross entropy and KL, -1 to 1; below 0 the two losses fight.

    It does not depend on the scale of either loss, so it may be compared between runs, reductions and networks; it
    does depend on temperature, labels and images.

    Attributes:
        steps: student updates at each moment; None: the end of a run without history.
        complete: whether the student at each moment is exactly that of the run, or (False) only its latent weights are.
        batch: images per batch.
        curves: one per arm, kind of label and temperature.
    """

    steps: list[int | None]
    complete: bool
    batch: int
    curves: list[Curve]

    def table(self) -> dict[str, Any]:
        """Mean cosine at the first and last moment, per curve."""
        return {
            f"{c.arm}, {c.labels}, T={c.temperature:g}": f"{_words(mean(c.values[0]))} to {_words(mean(c.values[-1]))}"
            for c in self.curves
        }

    def to_json(self) -> dict[str, Any]:
        """All values."""
        return asdict(self)


def cosine(subject: Subject, *, batch: int = 32, shown: Progress | None = None) -> Cosine:
    """Measure the CE-KL gradient cosine of a run at every snapshot of its history.

    Both gradients are of the same forward on the same batch, with respect to the latent quantized weights (straight
    through the rounding). Cross entropy takes the labels the images were made for and, as a control, the teacher's.

    Args:
        subject: from `open_subject`.
        batch: images per batch; the cosine is averaged over batches.
        shown: progress display.

    Source: AIT (arXiv 2203.17008), figure 1.
    """
    shown = shown or Silent()
    places = moments(subject.path)
    temperatures = sorted({subject.temperature, 1.0}, reverse=True)
    keys = [(a, kind, t) for a in subject.arms for kind in a.labels for t in temperatures]
    names = [weight.name for weight in subject.weights]
    curves = [Curve(a.name, kind, t, [], {name: [] for name in names}, []) for a, kind, t in keys]
    complete, done = True, 0
    shown.start("cosine", len(places) * len(subject.arms), 0)
    for file in places.values():
        with at_snapshot(subject, file) as tree:
            complete = complete and is_complete(tree)
            found: list[_Moment] = []
            for arm in subject.arms:
                found += _moment(subject, arm, temperatures, batch)
                done += 1
                shown.update(done)
        for curve, seen in zip(curves, found, strict=True):
            curve.values.append([whole for _, whole in seen.cosines])
            for i, name in enumerate(names):
                curve.layers[name].append(mean([layers[i] for layers, _ in seen.cosines]))
            curve.logits.append(seen.logits)
    return Cosine(list(places), complete, batch, curves)


def gradient_cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[float | None], float | None]:
    """Cosine between two gradients.

    Args:
        first: one tensor per layer.
        second: the same shapes.

    Returns:
        One cosine per layer, and that of all layers concatenated; None where one of the two is zero.

    Example:
        >>> a = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
        >>> [round(value, 6) for value in gradient_cosine(a, [-3 * g for g in a])[0]]
        [-1.0, -1.0]
    """
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(first, second, strict=True)]
    rows = torch.stack([torch.stack([a @ b, a @ a, b @ b]) for a, b in pairs])
    rows = torch.cat([rows, rows.sum(0, keepdim=True)])
    return (values := [_ratio(*row) for row in rows.tolist()])[:-1], values[-1]


def logit_cosine(logits: Tensor, target: Tensor, labels: Tensor, temperature: float) -> float | None:
    """Mean over images (and positions) of the cosine between the gradients of CE and KL with respect to the logits.

    Args:
        logits: of the student, [b, k, ...].
        target: logits of the teacher, [b, k, ...].
        labels: class numbers [b, ...] or soft targets [b, k, ...].
        temperature: of the KL.

    Returns:
        softmax(z) - y against softmax(z/T) - softmax(t/T); None if one of them is zero for every image.
    """
    logits, target = logits.detach().double(), target.double()
    wanted = F.one_hot(labels, logits.shape[1]).movedim(-1, 1) if labels.dtype == torch.int64 else labels
    ce = logits.softmax(1) - wanted
    kl = (logits / temperature).softmax(1) - (target / temperature).softmax(1)
    norms = ce.norm(dim=1) * kl.norm(dim=1)
    used = norms > 0
    return float(((ce * kl).sum(1)[used] / norms[used]).mean()) if bool(used.any()) else None


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that are not None; None without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class _Moment:
    cosines: list[tuple[list[float | None], float | None]]
    logits: float | None


def _moment(subject: Subject, arm: Arm, temperatures: list[float], batch: int) -> list[_Moment]:
    """One arm at one moment: a result per kind of label and temperature."""
    parameters = [weight.parameter for weight in subject.weights]
    keys = [(kind, t) for kind in arm.labels for t in temperatures]
    cosines: dict[tuple[str, float], list[Any]] = {key: [] for key in keys}
    on_logits: dict[tuple[str, float], list[float | None]] = {key: [] for key in keys}
    for part in arm.split(batch):
        logits = subject.logits(part.images)

        def gradient(loss: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)

        ce = {kind: gradient(losses.cross_entropy(logits, part.labels[kind])) for kind in part.labels}
        kl = {t: gradient(losses.kl(logits, part.target, temperature=t, reduction="batchmean")) for t in temperatures}
        for kind, t in keys:
            cosines[kind, t].append(gradient_cosine(ce[kind], kl[t]))
            on_logits[kind, t].append(logit_cosine(logits, part.target, part.labels[kind], t))
    return [_Moment(cosines[key], mean(on_logits[key])) for key in keys]


def _ratio(dot: float, first: float, second: float) -> float | None:
    # No small number in the denominator: a KL averaged over 1000 classes has gradients that it would drown.
    if first <= 0 or second <= 0:
        return None
    return max(-1.0, min(1.0, dot / (first**0.5 * second**0.5)))


def _words(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
