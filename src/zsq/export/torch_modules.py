"""What a student's quantizers become in a torch.export program: modules of the standard operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.grid import Grid, encode
from zsq.insert.access import SITES, activation_quantizers
from zsq.insert.weight_path import WeightPath
from zsq.quantizer.base import ObservedRange, Quantizer

DECOMPOSED = "quantized_decomposed"


class Rounding(nn.Module):
    """Quantize and dequantize an activation as uint8: the codes of a frozen quantizer, moved by 2^(bits-1).

    Args:
        grid: signed codes; one step and zero per tensor.
        bits: of a code.
    """

    def __init__(self, grid: Grid, bits: int) -> None:
        super().__init__()
        half = 2 ** (bits - 1)
        # As a double: its inverse, rounded to float32, is the student's inv_step to the last bit.
        self.scale = 1.0 / float(grid.inv_step)
        self.zero_point = half - int(grid.zero)
        self.codes = (grid.qmin + half, grid.qmax + half)

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.scale, self.zero_point, *self.codes, torch.uint8)
        operators: Any = getattr(torch.ops, DECOMPOSED)
        q = operators.quantize_per_tensor.default(x, *grid)
        return operators.dequantize_per_tensor.default(q, *grid)


class StoredWeight(nn.Module):
    """Stands in a layer for its `WeightPath`: the weight as int8 codes, the bias as the student computes with it.

    Args:
        weight: the weight before rounding, BatchNorm folded.
        grid: its grid; one step and zero per output channel, or one for all.
        axis: output channels of the weight; None for one grid.
        biases: bias of every call site.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    norm = None  # already folded; linear layers look
    integers = None  # a program multiplies as its runtime does

    def __init__(self, weight: Tensor, grid: Grid, axis: int | None, biases: dict[int, Tensor | None]) -> None:
        super().__init__()
        self.axis = axis
        self.limits = (grid.qmin, grid.qmax)
        self.register_buffer("codes", encode(weight, grid).to(torch.int8))
        self.register_buffer("scales", (1 / grid.inv_step.double()).float().flatten())
        self.register_buffer("zero_points", (-grid.zero).round().long().flatten().expand_as(self.scales).clone())
        for site, bias in biases.items():
            self.register_buffer(f"bias{site}", bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> tuple[Tensor, Tensor | None]:
        operators: Any = getattr(torch.ops, DECOMPOSED)
        return operators.dequantize_per_channel.default(
            self.codes, self.scales, self.zero_points, self.axis, *self.limits, torch.int8
        ), getattr(self, f"bias{site}")


def stored_weights(student: nn.Module, images: Tensor) -> dict[str, StoredWeight]:
    """Replace every weight path by its codes, in place.

    Args:
        student: run once on `images`; a path its forward never reaches stays as it is.
        images: shape [b, c, h, w].

    Returns:
        The new modules by the path they are at.
    """
    seen: dict[str, tuple[Tensor, Tensor | None, dict[int, Tensor | None]]] = {}
    hooks = []
    paths = {name: module for name, module in student.named_modules() if isinstance(module, WeightPath)}
    for name, path in paths.items():

        def watch(path: Any, args: Any, output: Any, *, name: str = name) -> None:
            _, weight, bias, site = args
            seen.setdefault(name, (*path.fold(weight, bias), {}))[2][site] = output[1]

        hooks.append(path.register_forward_hook(watch))
    try:
        with torch.no_grad():
            student(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, (weight, _, biases) in seen.items():
        quantizer = paths[name].quantizer
        # One grid for all channels is the same as equal grids, and every backend reads the per-channel form.
        axis = 0 if quantizer.axis is None else quantizer.axis
        grid = quantizer.grid(weight)
        wide = [weight.shape[axis] if dim == axis else 1 for dim in range(weight.dim())]
        grid = Grid(grid.inv_step.expand(wide), grid.zero.expand(wide), grid.qmin, grid.qmax)
        found[name] = StoredWeight(weight, grid, axis, biases)
        student.set_submodule(name, found[name])
    return found


def swap_sites(student: nn.Module) -> None:
    """Replace every activation quantizer by a `Rounding`, in place.

    Raises:
        BadInput: for a range that is computed from every input anew.
    """
    holder: Any = getattr(student, SITES)
    for name, quantizer in activation_quantizers(student).items():
        _require_fixed(name, quantizer)
        setattr(holder, holder.names[name], Rounding(quantizer.grid(torch.zeros(1)), quantizer.bits))


def _require_fixed(name: str, quantizer: Quantizer) -> None:
    if not isinstance(quantizer, ObservedRange) or quantizer.axis is not None:
        raise BadInput(
            f"activation {name}", expected="one fixed range per tensor", got=f"{type(quantizer).__name__}",
            fix="Quantize with act=RunningMinMax, Percentile, MseRange or LearnedStep.",
        )  # fmt: skip
