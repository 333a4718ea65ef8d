"""Correction of moments: rounding shifts a channel's mean and changes its spread; BatchNorms and biases undo it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsq.insert.access import weight_paths
from zsq.quantizer import ObservedRange

_EPS = 1e-8  # variance of a channel that is constant


class _Point(NamedTuple):
    """A module of the student whose output can be shifted, and maybe spread.

    Attributes:
        source: name of the teacher's module that gives the same.
        bias: shifts it.
        factor: spreads it; None where a change would move weights on a fixed grid.
    """

    source: str
    bias: nn.Parameter
    factor: nn.Parameter | None


def correct_moments(student: nn.Module, teacher: nn.Module, images: Tensor, *, spreads: bool = False) -> list[str]:
    """Give every channel behind a layer the mean (and spread) that it has in the teacher, in place, layer after layer.

    The mean of what a BatchNorm gives (or a layer with a bias and no BatchNorm folded behind it) is compared over the
    images, and the difference is added to its bias. With `spreads` a BatchNorm's factor and bias are first multiplied
    by the ratio of the standard deviations, between a half and two; channels that are constant in the teacher are left.
    A later layer is given what the corrected ones before it make, all in one forward of each network. Left as they are:
    layers without any bias, modules that are called more than once, and functional layers; of spreads also BatchNorms
    folded into a weight whose range is fixed.

    Args:
        student: from `quantize`, its ranges fixed; put into eval mode.
        teacher: the float network that it was made from, in eval mode.
        images: shape [n, c, h, w]; both networks see all of them at once.
        spreads: correct standard deviations too.

    Returns:
        Names of the modules whose output was corrected, in order of execution.

    Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), empirical
        form; there activations pass unrounded, here the student is taken as it is. Spreads: ours, after the
        re-estimation of BatchNorm statistics, whose images would have to be like real ones; a ratio to the teacher on
        the same images need not be.
    """
    student.eval()
    points = _points(student)
    theirs = dict(teacher.named_modules())
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    calls: Counter[str] = Counter()
    corrected: list[str] = []

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        wanted[name] = _moments(module, output)
        calls[name] += 1

    def shift(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        point = points[name]
        if calls[point.source] != 1:
            return None
        (mean, variance), (ours, spread) = wanted[point.source], _moments(module, output)
        if spreads and point.factor is not None:
            ratio = ((variance + _EPS) / (spread + _EPS)).sqrt().clamp(0.5, 2)
            ratio = torch.where(variance < _EPS, 1.0, ratio)
            point.factor.mul_(ratio)
            point.bias.mul_(ratio)
            output, ours = output * ratio.reshape(_along(module, output)), ours * ratio
        point.bias.add_(mean - ours)
        corrected.append(name)
        return output + (mean - ours).reshape(_along(module, output))

    sources = {point.source: theirs[point.source] for point in points.values() if point.source in theirs}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        _hooked(teacher, sources.items(), note, images)
        _hooked(student, ((name, student.get_submodule(name)) for name in points), shift, images)
    return corrected


def _points(student: nn.Module) -> dict[str, _Point]:
    """What can be corrected, by the name of the student's module."""
    paths = weight_paths(student)
    names = {id(module): name for name, module in student.named_modules()}
    folded = {id(path.norm) for _, path, _ in paths.values() if path.norm is not None}
    found = {}
    for name, module in student.named_modules():
        norm = paths[name].path.norm if name in paths else None
        holder = module if norm is None else norm
        here = name in paths or (isinstance(module, _BatchNorm) and id(module) not in folded)
        bias = getattr(holder, "bias", None)
        if here and isinstance(bias, nn.Parameter):
            factor = holder.weight if isinstance(holder, _BatchNorm) else None
            if norm is not None and isinstance(paths[name].path.quantizer, ObservedRange):
                factor = None
            found[name] = _Point(names[id(holder)], bias, factor)
    return found


def _hooked(net: nn.Module, modules: Iterable[tuple[str, nn.Module]], hook: Any, images: Tensor) -> None:
    """One forward with a hook behind each of the modules."""
    with ExitStack() as stack:
        for name, module in modules:
            stack.callback(module.register_forward_hook(partial(hook, name)).remove)
        net(images)


def _channel(module: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(module, nn.Linear) else 1


def _moments(module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel."""
    axis = _channel(module, output)
    variance, mean = torch.var_mean(output.float(), [d for d in range(output.dim()) if d != axis], correction=0)
    return mean, variance


def _along(module: nn.Module, output: Tensor) -> list[int]:
    axis = _channel(module, output)
    return [-1 if d == axis else 1 for d in range(output.dim())]
