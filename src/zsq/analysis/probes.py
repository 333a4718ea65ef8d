"""Traces of Hessians by random probes: of any loss, and cheaper of softmax losses of piecewise linear networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zsq.errors import BadInput

CHUNK = 10  # probes that share one forward (and one gradient), and between which the stopping rule looks

Batch = Callable[[], Mapping[str, Tensor]]
Logits = Callable[[], Tensor]
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """Trace of one Hessian.

    Attributes:
        loss: value of the loss.
        samples: one estimate of the trace per probe, summed over the layers; their mean is the trace.
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

    def scaled(self, factor: float) -> Estimate:
        """The same of the loss times a factor."""
        return Estimate(self.loss * factor, [s * factor for s in self.samples], [s * factor for s in self.layers])

    def to_json(self) -> dict[str, Any]:
        """All values; the ratio is None where the loss is 0."""
        ratio = self.mean / self.loss if self.loss > 0 else None
        return {"trace": self.mean, "stderr": self.stderr, "trace_over_loss": ratio, **asdict(self)}


def hutchinson(
    parameters: Sequence[Tensor],
    batches: Sequence[tuple[float, Batch]],
    *,
    probes: int,
    seed: int = 0,
    tolerance: float = 0.0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Estimate]:
    """Estimate the traces of the Hessians of several losses with the same random probes of +-1, as v'Hv.

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
    losses: dict[str, float] = {}

    def chunk(indices: range) -> Rows:
        totals: Rows = {}
        losses.clear()
        for share, batch in batches:
            for name, loss in batch().items():
                first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
                values = torch.stack([_product(first, parameters, rademacher(parameters, seed, i)) for i in indices])
                totals[name] = totals.get(name, 0.0) + share * values
                losses[name] = losses.get(name, 0.0) + share * float(loss.detach())
        return totals

    return _until_good(chunk, losses, probes, tolerance, tick)


def gauss_newton(
    parameters: Sequence[Tensor],
    groups: Sequence[Logits],
    temperatures: Mapping[str, float],
    losses: Mapping[str, float],
    *,
    probes: int,
    seed: int = 0,
    tolerance: float = 0.0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Estimate]:
    """Estimate the traces of softmax losses of a network that is piecewise linear in each of `parameters`.

    Between two kinks the logits z of such a network are linear in every single parameter tensor, so the second
    derivatives of z within one tensor are zero, and the trace of the Hessian of a loss of z is that of J'HJ, with J the
    Jacobian of z and H the loss's own Hessian with respect to z. For T^2 KL(teacher || student) at temperature T, and
    for the cross entropy as T = 1, whatever the labels, H = diag(p) - pp' with p = softmax(z / T). With random signs r,
    u = sqrt(p) * (r - sqrt(p) <sqrt(p), r>) has E[uu'] = H, so the squared norm of J'u is an unbiased estimate: one
    ordinary backward pass. Groups of images count apart, which removes the products between them: for the same
    arithmetic, the smaller the groups, the less noise.

    Args:
        parameters: with respect to which; each used once by the network (`straight.bend` says whether all this holds).
        groups: each computes the logits [b, k, ...] of a group of images; losses are means over all of them.
        temperatures: loss -> temperature. Losses of one temperature share their passes: their traces are the same.
        losses: their values, for the result.
        probes: how many, at most.
        seed: of the signs, shared by all losses.
        tolerance: stop, at a multiple of 10 probes, when every standard error is below this share of its mean.
        tick: called with the number of finished probes.

    Returns:
        An estimate per loss.

    Raises:
        BadInput: for less than one probe.

    Source: the Gauss-Newton matrix of a matching loss (Schraudolph, Neural Computation 2002).
    """

    def chunk(indices: range) -> Rows:
        totals: dict[float, Tensor] = {}
        positions = 0
        for number, group in enumerate(groups):
            logits = group()
            positions += logits.numel() // logits.shape[1]
            roots = {t: (logits.detach() / t).softmax(1).sqrt() for t in set(temperatures.values())}
            for t, root in roots.items():
                values = torch.stack([
                    _squares(logits, parameters, _factor(root, _signs(logits, seed, i, number))) for i in indices
                ])  # fmt: skip
                totals[t] = totals.get(t, 0.0) + values
        return {name: totals[t] / positions for name, t in temperatures.items()}

    return _until_good(chunk, losses, probes, tolerance, tick)


def rademacher(parameters: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """Signs of +-1 with the shapes of `parameters`, the same on every device."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + index)
    signs = [torch.randint(2, p.shape, generator=rng, dtype=torch.int8) * 2 - 1 for p in parameters]
    return [sign.to(p.device, p.dtype) for sign, p in zip(signs, parameters, strict=True)]


def _until_good(
    chunk: Callable[[range], Rows],
    losses: Mapping[str, float],
    probes: int,
    tolerance: float,
    tick: Callable[[int], None] | None,
) -> dict[str, Estimate]:
    """Estimates from chunks of probes, [probes, layers] per loss, until all are good enough or the probes are used."""
    if probes < 1:
        raise BadInput("--probes", expected="at least 1", got=probes, fix="20 give an error of some percent.")
    rows: dict[str, list[Tensor]] = {}
    results: dict[str, Estimate] = {}
    for start in range(0, probes, CHUNK):
        indices = range(start, min(start + CHUNK, probes))
        # TF32 would cost half of the digits that the second derivative needs.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = chunk(indices)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
            table = torch.cat(rows[name]).cpu()
            results[name] = Estimate(losses[name], table.sum(1).tolist(), table.mean(0).tolist())
        if tick is not None:
            tick(indices.stop)
        if all(result.stderr < tolerance * abs(result.mean) for result in results.values()):
            break
    return results


def _product(first: Sequence[Tensor], parameters: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """Per layer v'Hv, by differentiating gradient times v."""
    live = [(g, v) for g, v in zip(first, signs, strict=True) if g.requires_grad]
    if not live:  # a linear loss
        return torch.zeros(len(parameters), dtype=torch.float64, device=parameters[0].device)
    second = torch.autograd.grad(
        [g for g, _ in live], parameters, [v for _, v in live], retain_graph=True, materialize_grads=True
    )
    return torch.stack([(h.double() * v).sum() for h, v in zip(second, signs, strict=True)])


def _signs(logits: Tensor, seed: int, index: int, group: int) -> Tensor:
    """Signs of +-1 for the logits of one group, the same on every device."""
    rng = torch.Generator().manual_seed((seed * 1_000_003 + index) * 1_000_003 + group)
    signs = torch.randint(2, logits.shape, generator=rng, dtype=torch.int8) * 2 - 1
    return signs.to(logits.device, logits.dtype)


def _factor(root: Tensor, signs: Tensor) -> Tensor:
    """``diag(root) (I - root root') signs``: its mean outer product is diag(p) - pp', with p = root^2."""
    return root * (signs - root * (root * signs).sum(1, keepdim=True))


def _squares(logits: Tensor, parameters: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    """Per layer the squared norm of J'u."""
    pulled = torch.autograd.grad(logits, parameters, cotangent, retain_graph=True, materialize_grads=True)
    return torch.stack([g.double().square().sum() for g in pulled])
