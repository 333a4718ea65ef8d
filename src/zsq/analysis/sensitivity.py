"""What does each quantizer cost? The float network with one layer or one call site quantized at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zsq.insert import QuantSpec, quantize
from zsq.insert.access import activation_quantizers, weight_paths, without_quantizers
from zsq.quantizer import Quantizer
from zsq.run.progress import Progress, Silent

Compare = Callable[[Any, Any], Tensor]


class Distance(NamedTuple):
    """How far a network is from its teacher.

    Attributes:
        kl: mean KL(teacher || network) per decision (image, or pixel), softmax at temperature 1, in nats.
        agreement: share of equal decisions, a fraction.
    """

    kl: float
    agreement: float


@dataclass(frozen=True)
class Sensitivity:
    """What single quantizers cost, each alone in a network that is float otherwise and has the teacher's weights.

    Not the opposite, the trained student with one quantizer set back to float: training has made its weights fit their
    rounding, so most layers of a trained student get worse without it, and the order says little about the bits that a
    layer needs. Costs do not add up: errors of several layers may cancel or multiply.

    Attributes:
        count: images it was measured on.
        untrained: with all quantizers and the teacher's weights: calibration only, with the run's ranges.
        trained: the run's student.
        weights: per layer, with this layer's weight (and bias, where it is rounded) alone.
        sites: per call site, with this activation alone.
    """

    count: int
    untrained: Distance
    trained: Distance
    weights: dict[str, Distance]
    sites: dict[str, Distance]


def sensitivity(
    student: nn.Module,
    teacher: nn.Module,
    spec: QuantSpec,
    images: Tensor,
    *,
    compare: Compare | None = None,
    batch: int = 64,
    shown: Progress | None = None,
) -> Sensitivity:
    """Quantize every layer's weight and every activation site alone, one at a time, and compare with the teacher.

    One forward over the images per quantizer, and three more.

    Args:
        student: from `quantize(teacher, spec)`, trained, ranges frozen; its ranges are the ones that are tried.
        teacher: its float network.
        spec: what the student was made with.
        images: shape [n, c, h, w], normalised, on the networks' device.
        compare: from the outputs of a network and the teacher to a tensor [b, 2]: KL and agreement per image; for
            logits with classes on dimension 1 if not given.
        batch: images per forward.
        shown: progress display.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3)).eval()
        >>> student, x = quantize(net, QuantSpec())[0], torch.randn(4, 1, 3, 3)
        >>> _ = student(x)
        >>> found = sensitivity(student.eval(), net, QuantSpec(), x)
        >>> list(found.weights), list(found.sites)
        (['0', '3'], ['1'])
    """
    compare = distance_of_logits if compare is None else compare
    shown = shown or Silent()
    parts = images.split(batch)
    untrained = with_ranges_of(student, teacher, spec)
    layers, sites = [named.name for named in weight_paths(untrained).values()], list(activation_quantizers(untrained))
    shown.start("sensitivity", len(layers) + len(sites) + 2, 0)
    done = 0
    with torch.no_grad():
        targets = [teacher(part) for part in parts]

        def measure(net: nn.Module, weights: Collection[str], sites: Collection[str]) -> Distance:
            """The distance without the quantizers named."""
            nonlocal done
            with without_quantizers(net, weights=weights, sites=sites):
                rows = [compare(net(part), target) for part, target in zip(parts, targets, strict=True)]
            kl, agreed = torch.cat(rows).double().mean(0).tolist()
            done += 1
            shown.update(done)
            return Distance(max(kl, 0.0), agreed)

        whole, trained = measure(untrained, (), ()), measure(student, (), ())
        by_weight = {name: measure(untrained, {*layers} - {name}, sites) for name in layers}
        by_site = {name: measure(untrained, layers, {*sites} - {name}) for name in sites}
    shown.stop()
    return Sensitivity(len(images), whole, trained, by_weight, by_site)


def with_ranges_of(student: nn.Module, teacher: nn.Module, spec: QuantSpec) -> nn.Module:
    """The student as it was before training: the teacher's weights, the student's ranges.

    Args:
        student: from `quantize(teacher, spec)`.
        teacher: its float network.
        spec: what it was made with.
    """
    untrained, _ = quantize(teacher, spec)
    for name, module in student.named_modules():
        if isinstance(module, Quantizer):
            untrained.get_submodule(name).load_state_dict(module.state_dict())
    return untrained.eval()


def distance_of_logits(logits: Tensor, target: Tensor) -> Tensor:
    """KL(teacher || network) and agreement of logits.

    Args:
        logits: of the network, shape [b, classes, ...]; further dimensions (pixels) are averaged over.
        target: of the teacher, the same shape.

    Returns:
        Shape [b, 2], float64: KL in nats at temperature 1, and the share of equal decisions.
    """
    s, t = (x.double().reshape(*x.shape[:2], -1) for x in (logits, target))
    log_s, log_t = s.log_softmax(1), t.log_softmax(1)
    kl = (log_t.exp() * (log_t - log_s)).sum(1)
    return torch.stack([kl.mean(1), (s.argmax(1) == t.argmax(1)).double().mean(1)], 1)
