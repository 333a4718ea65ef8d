"""A student with every number fixed: integer codes, scales, and a graph of plain tensor operations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from zsq.errors import BadInput
from zsq.grid import Grid, encode
from zsq.insert.access import activation_quantizers, freeze_ranges
from zsq.insert.weight_path import WeightPath
from zsq.quantizer import Quantizer
from zsq.quantizer.base import ObservedRange

_INT32 = 2**31 - 1


class SiteGrid(NamedTuple):
    """An activation quantizer in the terms of an integer runtime: ``value = (code - zero) * scale``.

    Attributes:
        name: of the site.
        grid: the same in the student's terms; its codes are signed, ``code + grid.qmin``.
        scale: one step, as the float32 that a file holds.
        zero: the code of 0.0; outside 0..top if the range does not contain 0.
        top: largest code; the smallest is 0.
    """

    name: str
    grid: Grid
    scale: float
    zero: int
    top: int

    @property
    def has_zero(self) -> bool:
        """Whether 0.0 is one of the values."""
        return 0 <= self.zero <= self.top

    def code(self, value: float) -> int:
        """Code of a number."""
        return int(encode(torch.tensor(float(value)), self.grid)) - self.grid.qmin


class WeightCodes(NamedTuple):
    """A weight: ``value = (codes - zero) * scale`` along `axis`.

    Attributes:
        codes: int8, shape of the weight.
        scale: float32, one per channel.
        zero: int32, one per channel.
        axis: dimension of the channels; None for one scale.
        bits: that hold every code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    axis: int | None
    bits: int


class BiasCodes(NamedTuple):
    """A bias on the grid of the accumulator: ``value = codes * scale``; int32 and float32, one per channel."""

    codes: Tensor
    scale: Tensor


class Frozen(NamedTuple):
    """What an exporter reads.

    Attributes:
        program: the graph; a quantizer is a call ``zsq.site(x, i)`` of site i, weights and biases are inputs.
        sites: the activation quantizers in order of execution.
        weights: by name of the graph's buffer.
        biases: those on a grid, by name of the graph's buffer.
    """

    program: torch.export.ExportedProgram
    sites: tuple[SiteGrid, ...]
    weights: dict[str, WeightCodes]
    biases: dict[str, BiasCodes]


def freeze(student: nn.Module, images: Tensor) -> Frozen:
    """Fix a student's numbers and record its forward as a graph of tensor operations with a free batch size.

    Args:
        student: from `zsq.quantize`, with ranges; it is left as it was.
        images: a few inputs, shape [b, c, h, w] with b >= 2.

    Returns:
        The graph and the codes.

    Raises:
        BadInput: if an activation range is not fixed, or the network's forward cannot be recorded.
    """
    twin = copy.deepcopy(student).cpu().requires_grad_(False)
    freeze_ranges(twin)
    sites = tuple(_site(name, quantizer) for name, quantizer in activation_quantizers(twin).items())
    for index, quantizer in enumerate(activation_quantizers(twin).values()):
        quantizer.__dict__["forward"] = _Site(index)
    recorders = {path: _Recorder(path) for path in _paths(twin)}
    for path, recorder in recorders.items():
        path.__dict__["forward"] = recorder
    with torch.no_grad():
        twin(images[:2].cpu())
    weights: dict[str, WeightCodes] = {}
    biases: dict[str, BiasCodes] = {}
    # A layer under two names may be recorded under either.
    for name, module in twin.named_modules(remove_duplicate=False):
        if not isinstance(module, WeightPath) or recorders[module].weight is None:
            continue
        recorder = recorders[module]
        module.__dict__["forward"] = recorder.replay
        weights[f"{name}.final_weight"] = recorder.weight  # type: ignore[assignment]
        biases |= {f"{name}.final_bias{site}": bias for site, bias in recorder.biases.items()}
    return Frozen(record(twin, images), sites, weights, biases)


def record(net: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Record a network's forward as a graph of tensor operations with a free batch size.

    Args:
        net: in eval mode.
        images: shape [b, c, h, w] with b >= 2.

    Raises:
        BadInput: if its forward cannot be recorded, or works with one batch size only.
    """
    batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
            return torch.export.export(net, (images[:2].cpu(),), dynamic_shapes=batch, strict=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"export of {type(net).__name__}", expected="a forward that torch.export can record for any batch size",
            got=f"{type(error).__name__}: {reason}", fix="Rewrite that line without values or sizes of the batch.",
        ) from error  # fmt: skip


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call in a recorded graph by name, with the defaults of the operator's schema."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(schema.arguments)
    }


def operator_name(node: fx.Node) -> str:
    """``relu.default`` for aten's operators, ``zsq.site`` and the like for others."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.")
        return "zsq.site" if name.startswith("zsq.site") else name
    return str(getattr(target, "__name__", target))


class _Site:
    """Stands in for a quantizer while recording: one visible call."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, x: Tensor) -> Tensor:
        return _site_operator()(x, self.index)


@cache
def _site_operator() -> Any:
    """Register the operator ``zsq::site``; once per process."""
    operator = torch.library.custom_op("zsq::site", _copy_of, mutates_args=(), schema="(Tensor x, int site) -> Tensor")
    operator.register_fake(_copy_of)
    return operator


def _copy_of(x: Tensor, site: int) -> Tensor:
    return torch.empty_like(x).copy_(x)


class _Recorder:
    """Stands in for a `WeightPath`: notes the codes in a first forward, then gives the values they stand for."""

    def __init__(self, path: WeightPath) -> None:
        self.path = path
        self.original = path.forward
        self.weight: WeightCodes | None = None
        self.biases: dict[int, BiasCodes] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> tuple[Tensor, Tensor | None]:
        path = self.path
        value, rounded = self.original(x, weight, bias, site)
        folded, exact = path.fold(weight, bias)
        grid = path.limited(path.quantizer.grid(folded))
        if self.weight is None:
            self.weight = _weight(folded, grid, path.quantizer)
            path.register_buffer("final_weight", value.detach())
        source = path.sources[site] if site < len(path.sources) else None
        if exact is not None and rounded is not None:
            path.register_buffer(f"final_bias{site}", rounded.detach())
            if source is not None:
                accumulator = path.bias_grid(grid, source.grid(x))
                codes = encode(exact, accumulator).double().clamp(-_INT32, _INT32).to(torch.int32)
                self.biases[site] = BiasCodes(codes, torch.reciprocal(accumulator.inv_step).float().expand_as(codes))
        return value, rounded

    def replay(self, x: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> tuple[Tensor, Tensor | None]:
        return self.path.final_weight, getattr(self.path, f"final_bias{site}", None)  # type: ignore[return-value]


def _paths(student: nn.Module) -> Iterator[WeightPath]:
    return (module for module in student.modules() if isinstance(module, WeightPath))


def _site(name: str, quantizer: Quantizer) -> SiteGrid:
    if not isinstance(quantizer, ObservedRange) or quantizer.axis is not None:
        raise BadInput(
            f"site {name}", expected="one fixed range per activation", got=type(quantizer).__name__,
            fix="Quantize with a range rule that is fixed before export, e.g. RunningMinMax.",
        )  # fmt: skip
    grid = quantizer.grid()
    zero = -grid.qmin - round(float(grid.zero))
    return SiteGrid(name, grid, float(torch.reciprocal(grid.inv_step)), zero, grid.qmax - grid.qmin)


def _weight(values: Tensor, grid: Grid, quantizer: Quantizer) -> WeightCodes:
    scale = torch.reciprocal(grid.inv_step).float().flatten()
    zero = (-grid.zero).to(torch.int32).flatten().expand(len(scale))
    return WeightCodes(encode(values, grid).to(torch.int8), scale, zero, quantizer.axis, quantizer.bits)
