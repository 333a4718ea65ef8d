"""How sharp is the minimum? The trace of the Hessian of each loss, estimated with random probes (Hutchinson)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zsq.analysis.subject import Subject, at_snapshot, is_complete
from zsq.analysis.subject import moments as moments_of
from zsq.errors import BadInput
from zsq.run.progress import Progress, Silent

CHUNK = 10  # probes that share one forward and one gradient, and between which the stopping rule looks
BATCH = 256
TOLERANCE = 0.05  # standard error over mean at which all estimates are good enough

Batch = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Estimate:
    """Trace of one Hessian.

    Attributes:
        loss: value of the loss.
        samples: v'Hv per probe, summed over the layers.
        layers: mean over the probes, per layer.
    """

    loss: float
    samples: list[float]
    layers: list[float]

    @property
    def mean(self) -> float:
        """The trace."""
        return math.fsum(self.samples) / len(self.samples)

    @property
    def stderr(self) -> float:
        """Standard error of `mean`; infinite from one probe."""
        n, centre = len(self.samples), self.mean
        return math.sqrt(math.fsum((s - centre) ** 2 for s in self.samples) / (n - 1) / n) if n > 1 else math.inf

    def to_json(self) -> dict[str, Any]:
        """All values; the ratio is None where the loss is 0."""
        ratio = self.mean / self.loss if self.loss > 0 else None
        return {"trace": self.mean, "stderr": self.stderr, "trace_over_loss": ratio, **asdict(self)}


@dataclass(frozen=True)
class Trace:
    """Trace of the Hessian with respect to the quantized weights, at the values the student computes with.

    In units of the loss over squared weight. Comparable between losses only with the scaling in mind: the KL as trained
    is divided by the number of classes in most published code, so four are given; trace over loss has no scale. Not
    comparable between networks.

    Attributes:
        steps: student updates at each moment; None: the end of a run without history.
        complete: whether the student at each moment is exactly that of the run, or (False) only its latent weights are.
        layers: names of the layers.
        sizes: their numbers of weights.
        arms: arm -> loss -> per moment an estimate. Losses: ce, kl_as_trained, kl_batchmean (temperature of the run)
            and kl_t1 (temperature 1, batch mean).
    """

    steps: list[int | None]
    complete: bool
    layers: list[str]
    sizes: list[int]
    arms: dict[str, dict[str, list[Estimate]]]

    def table(self) -> dict[str, Any]:
        """Trace with its standard error, and trace over loss, at the last moment."""
        rows = {}
        for arm, kinds in self.arms.items():
            for kind, values in kinds.items():
                last = values[-1].to_json()
                ratio = "" if last["trace_over_loss"] is None else f", over loss {last['trace_over_loss']:.4g}"
                text = f"{last['trace']:.4g} ± {last['stderr']:.2g} ({len(last['samples'])} probes{ratio})"
                rows[f"{arm}, {kind}"] = text
        return rows

    def to_json(self) -> dict[str, Any]:
        """All values."""
        arms = {arm: {k: [e.to_json() for e in v] for k, v in kinds.items()} for arm, kinds in self.arms.items()}
        return asdict(self) | {"arms": arms}


def trace(
    subject: Subject, *, probes: int = 20, moments: int | None = 2, seed: int = 0, shown: Progress | None = None
) -> Trace:
    """Estimate the Hessian traces of a run.

    Differentiating twice straight through the rounding gives the Hessian at the dequantized weights; ranges count as
    constants. All losses and moments share the same probes, so their differences are less noisy than they are.

    Args:
        subject: from `open_subject`.
        probes: at most; fewer if all standard errors are below 5 % of their means.
        moments: number of snapshots, evenly spaced; None for all.
        seed: of the probes.
        shown: progress display.

    Raises:
        BadInput: for less than one probe.

    Source: Hutchinson, Communications in Statistics 1990; AIT (arXiv 2203.17008), figure 2.
    """
    shown = shown or Silent()
    places = moments_of(subject.path, moments)
    parameters = [weight.parameter for weight in subject.weights]
    kinds = ("ce", "kl_as_trained", "kl_batchmean", "kl_t1")
    arms: dict[str, dict[str, list[Estimate]]] = {a.name: {kind: [] for kind in kinds} for a in subject.arms}
    complete, done = True, 0
    shown.start("trace", len(places) * len(arms) * probes, 0)
    for file in places.values():
        with at_snapshot(subject, file) as tree:
            complete = complete and is_complete(tree)
            for arm in subject.arms:
                batches: list[tuple[float, Batch]] = [
                    (len(part.images) / len(arm.images), lambda part=part: subject.losses(part))  # type: ignore[misc]
                    for part in arm.split(BATCH)
                ]
                found = hutchinson(parameters, batches, probes=probes, seed=seed, tolerance=TOLERANCE,
                                   tick=lambda n, done=done: shown.update(done + n))  # type: ignore[misc]  # fmt: skip
                done += probes
                shown.update(done)
                scaled = _scaled(found["kl"], subject.as_trained)
                for kind, value in zip(kinds, (found["ce"], scaled, found["kl"], found["kl_t1"]), strict=True):
                    arms[arm.name][kind].append(value)
    names, sizes = [weight.name for weight in subject.weights], [parameter.numel() for parameter in parameters]
    return Trace(list(places), complete, names, sizes, arms)


def hutchinson(
    parameters: Sequence[Tensor],
    batches: Sequence[tuple[float, Batch]],
    *,
    probes: int,
    seed: int = 0,
    tolerance: float = 0.0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Estimate]:
    """Estimate the traces of the Hessians of several losses with the same random probes of +-1.

    Args:
        parameters: with respect to which.
        batches: per batch its share of all samples, and what computes its losses (each a mean over the batch).
        probes: how many, at most.
        seed: of the probes; the i-th probe depends on nothing else.
        tolerance: stop, at a multiple of 10 probes, when every standard error is below this share of its mean.
        tick: called with the number of finished probes.

    Returns:
        An estimate per loss.

    Raises:
        BadInput: for less than one probe.

    Example:
        >>> w = torch.ones(3, requires_grad=True)
        >>> found = hutchinson([w], [(1.0, lambda: {"cubes": (w**3).sum()})], probes=2)
        >>> found["cubes"].mean, found["cubes"].stderr
        (18.0, 0.0)
    """
    if probes < 1:
        raise BadInput("--probes", expected="at least 1", got=probes, fix="20 give an error of some percent.")
    rows: dict[str, list[Tensor]] = {}
    results: dict[str, Estimate] = {}
    for start in range(0, probes, CHUNK):
        indices = range(start, min(start + CHUNK, probes))
        loss, found = _chunk(parameters, batches, indices, seed)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
            table = torch.cat(rows[name]).cpu()
            results[name] = Estimate(loss[name], table.sum(1).tolist(), table.mean(0).tolist())
        if tick is not None:
            tick(indices.stop)
        if all(result.stderr < tolerance * abs(result.mean) for result in results.values()):
            break
    return results


def rademacher(parameters: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """Signs of +-1 with the shapes of `parameters`, the same on every device."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + index)
    signs = [torch.randint(2, p.shape, generator=rng, dtype=torch.int8) * 2 - 1 for p in parameters]
    return [sign.to(p.device, p.dtype) for sign, p in zip(signs, parameters, strict=True)]


def _chunk(
    parameters: Sequence[Tensor], batches: Sequence[tuple[float, Batch]], indices: range, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss values, and v'Hv as [probes, layers], averaged over the batches."""
    losses: dict[str, float] = {}
    totals: dict[str, Tensor] = {}
    for share, batch in batches:
        # TF32 would cost half of the digits that the second derivative needs.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for name, loss in batch().items():
                first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
                values = torch.stack([_product(first, parameters, rademacher(parameters, seed, i)) for i in indices])
                totals[name] = totals.get(name, 0.0) + share * values
                losses[name] = losses.get(name, 0.0) + share * float(loss.detach())
    return losses, totals


def _product(first: Sequence[Tensor], parameters: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """Per layer v'Hv, by differentiating gradient times v."""
    live = [(g, v) for g, v in zip(first, signs, strict=True) if g.requires_grad]
    if not live:  # a linear loss
        return torch.zeros(len(parameters), dtype=torch.float64, device=parameters[0].device)
    second = torch.autograd.grad(
        [g for g, _ in live], parameters, [v for _, v in live], retain_graph=True, materialize_grads=True
    )
    return torch.stack([(h.double() * v).sum() for h, v in zip(second, signs, strict=True)])


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.loss * factor, [s * factor for s in estimate.samples],
                    [s * factor for s in estimate.layers])  # fmt: skip
