"""How sharp is the minimum? The trace of the Hessian of each loss, estimated with random probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zsq.analysis.probes import Batch, Estimate, Logits, gauss_newton, hutchinson
from zsq.analysis.straight import bend
from zsq.analysis.subject import Arm, Subject, at_snapshot, is_complete, losses_on
from zsq.analysis.subject import moments as moments_of
from zsq.run.progress import Progress, Silent

BATCH = 256
GROUP = 4  # images per backward pass of the cheap estimate: the smallest noise for the same time, as measured
TOLERANCE = 0.05  # standard error over mean at which all estimates are good enough
KINDS = ("ce", "kl_as_trained", "kl_batchmean", "kl_t1")


@dataclass(frozen=True)
class Trace:
    """Trace of the Hessian with respect to the quantized weights, at the values the student computes with.

    In units of the loss over squared weight. Comparable between losses only with the scaling in mind: the KL as trained
    is divided by the number of classes in most published code, so four are given; trace over loss has no scale. Not
    comparable between networks.

    In a network of straight lines (convolutions, ReLUs, averages, sums) each weight tensor enters the logits linearly,
    so the trace of a softmax loss depends on its probabilities only: ce and kl_t1 have the same one, whatever the
    labels. What a difference between them could show is the mean of 0.

    Attributes:
        method: gauss_newton (`probes.gauss_newton`) for such a network, else hutchinson (`probes.hutchinson`).
        bend: what in the network is not a straight line; None for gauss_newton.
        steps: student updates at each moment; None: the end of a run without history.
        complete: whether the student at each moment is exactly that of the run, or (False) only its latent weights are.
        layers: names of the layers.
        sizes: their numbers of weights.
        arms: arm -> loss -> per moment an estimate. Losses: ce, kl_as_trained, kl_batchmean (temperature of the run)
            and kl_t1 (temperature 1, batch mean).
    """

    method: str
    bend: str | None
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

    Straight through the rounding, the Hessian is that at the dequantized weights; ranges count as constants. All losses
    and moments share the same probes, so their differences are less noisy than they are.

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
    arms: dict[str, dict[str, list[Estimate]]] = {a.name: {kind: [] for kind in KINDS} for a in subject.arms}
    complete, done, curve = True, 0, bend(subject.student)
    estimate = _by_logits if curve is None else _by_losses
    shown.start("trace", len(places) * len(arms) * probes, 0)
    for file in places.values():
        with at_snapshot(subject, file) as tree:
            complete = complete and is_complete(tree)
            for arm in subject.arms:
                found = estimate(subject, arm, probes, seed, lambda n, done=done: shown.update(done + n))  # type: ignore[misc]
                done += probes
                shown.update(done)
                found["kl_batchmean"] = found.pop("kl")
                found["kl_as_trained"] = found["kl_batchmean"].scaled(subject.as_trained)
                for kind in KINDS:
                    arms[arm.name][kind].append(found[kind])
    names = [weight.name for weight in subject.weights]
    sizes = [weight.parameter.numel() for weight in subject.weights]
    method = "gauss_newton" if curve is None else "hutchinson"
    return Trace(method, curve, list(places), complete, names, sizes, arms)


def _by_losses(
    subject: Subject, arm: Arm, probes: int, seed: int, tick: Callable[[int], None]
) -> dict[str, Estimate]:
    """The traces of any network."""
    batches: list[tuple[float, Batch]] = [
        (len(part.images) / len(arm.images), lambda part=part: subject.losses(part))  # type: ignore[misc]
        for part in arm.split(BATCH)
    ]
    parameters = [weight.parameter for weight in subject.weights]
    return hutchinson(parameters, batches, probes=probes, seed=seed, tolerance=TOLERANCE, tick=tick)


def _by_logits(
    subject: Subject, arm: Arm, probes: int, seed: int, tick: Callable[[int], None]
) -> dict[str, Estimate]:
    """The same of a network of straight lines."""
    with torch.no_grad():
        values = {name: float(loss) for name, loss in losses_on(subject, arm).items()}
    groups: list[Logits] = [
        lambda part=part: subject.logits(part.images)  # type: ignore[misc]
        for part in arm.split(GROUP)
    ]
    temperatures = {"ce": 1.0, "kl": subject.temperature, "kl_t1": 1.0}
    parameters = [weight.parameter for weight in subject.weights]
    return gauss_newton(parameters, groups, temperatures, values, probes=probes, seed=seed, tolerance=TOLERANCE,
                        tick=tick)  # fmt: skip
