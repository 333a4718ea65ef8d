"""Bias correction: rounding shifts the mean of a channel, and the shift is taken out of the bias behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsq.insert.access import weight_paths


def correct_means(student: nn.Module, teacher: nn.Module, images: Tensor) -> list[str]:
    """Give every channel behind a layer the mean that it has in the teacher, in place, layer after layer.

    The mean of what a BatchNorm gives (or a layer with a bias and no BatchNorm folded behind it) is compared over the
    images, and the difference is added to its bias. A later layer is given what the corrected ones before it make, all
    in one forward of each network. Left as they are: layers without any bias, modules that are called more than once,
    and functional layers.

    Args:
        student: from `quantize`, its ranges fixed; put into eval mode.
        teacher: the float network that it was made from, in eval mode.
        images: shape [n, c, h, w]; both networks see all of them at once.

    Returns:
        Names of the modules whose output was corrected, in order of execution.

    Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), empirical
        form; there activations pass unrounded, here the student is taken as it is.
    """
    student.eval()
    points = _points(student)
    theirs = dict(teacher.named_modules())
    wanted: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()
    corrected: list[str] = []

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        wanted[name] = _means(module, output)
        calls[name] += 1

    def shift(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if calls[points[name][0]] != 1:
            return None
        gap = wanted[points[name][0]] - _means(module, output)
        points[name][1].add_(gap)
        corrected.append(name)
        return output + gap.reshape(_along(module, output))

    sources = {source: theirs[source] for source, _ in points.values() if source in theirs}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        _hooked(teacher, sources.items(), note, images)
        _hooked(student, ((name, student.get_submodule(name)) for name in points), shift, images)
    return corrected


def _points(student: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Per module of the student whose output can be shifted: the teacher's module that gives the same, and the bias."""
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
            found[name] = (names[id(holder)], bias)
    return found


def _hooked(net: nn.Module, modules: Iterable[tuple[str, nn.Module]], hook: Any, images: Tensor) -> None:
    """One forward with a hook behind each of the modules."""
    with ExitStack() as stack:
        for name, module in modules:
            stack.callback(module.register_forward_hook(partial(hook, name)).remove)
        net(images)


def _channel(module: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(module, nn.Linear) else 1


def _means(module: nn.Module, output: Tensor) -> Tensor:
    axis = _channel(module, output)
    return output.float().mean([d for d in range(output.dim()) if d != axis])


def _along(module: nn.Module, output: Tensor) -> list[int]:
    axis = _channel(module, output)
    return [-1 if d == axis else 1 for d in range(output.dim())]
