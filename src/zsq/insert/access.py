"""What a student is made of: its latent weights, its activation quantizers, its ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zsq.errors import BadInput
from zsq.grid import Grid, encode
from zsq.insert.weight_path import WeightPath, exact
from zsq.quantizer import Quantizer
from zsq.quantizer.base import ObservedRange

# Names of the student's modules that hold what belongs to call sites.
SITES, FUNCTIONS = "zsq_sites", "zsq_functions"


class QuantizedWeight(NamedTuple):
    """A latent weight and how it is rounded.

    Attributes:
        name: name of its layer.
        parameter: the latent parameter, which the optimizer updates.
        grid: gives the grid of the parameter (or of candidate values of its shape) in the parameter's own coordinates:
            ``encode(parameter, grid())`` are the codes the layer computes with, also if a BatchNorm is folded into it.
        bits: of a code.
        axis: dimension of the output channels.
    """

    name: str
    parameter: nn.Parameter
    grid: Callable[..., Grid]
    bits: int
    axis: int | None


def quantized_weights(student: nn.Module) -> list[QuantizedWeight]:
    """List the latent weights of a student, each parameter once, however many layers share it.

    Args:
        student: from `quantize`.

    Returns:
        One entry per parameter. Layers whose weight is computed from several parameters of other shapes are left out.
    """
    found: dict[int, QuantizedWeight] = {}
    for name, path, latent in weight_paths(student).values():
        if latent is None:
            continue

        def grid(values: Tensor | None = None, *, path: WeightPath = path, latent: nn.Parameter = latent) -> Grid:
            return path.latent_grid(latent if values is None else values)

        weight = QuantizedWeight(name, latent, grid, path.quantizer.bits, path.quantizer.axis)
        found.setdefault(id(latent), weight)
    return list(found.values())


class NamedPath(NamedTuple):
    """How one layer's weight is rounded.

    Attributes:
        name: name of the layer.
        path: from its latent weight to the one it computes with.
        latent: the latent parameter; None if the weight is computed from several.
    """

    name: str
    path: WeightPath
    latent: nn.Parameter | None


def weight_paths(student: nn.Module) -> dict[str, NamedPath]:
    """Give every layer with a quantized weight, by the path of the module that computes with it.

    Args:
        student: from `quantize`.
    """
    functions: Any = getattr(_require_student(student), FUNCTIONS, None)
    names = {f"{FUNCTIONS}.{key}": name for name, key in functions.names.items()} if functions is not None else {}
    found = {}
    for place, layer in student.named_modules():
        path = getattr(layer, "weight_path", None)
        if isinstance(path, WeightPath):
            owner = student if place in names else layer
            latent = owner.get_parameter(path.parameter) if path.parameter else None
            found[place] = NamedPath(names.get(place, place), path, latent)
    return found


def float_twin(student: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy a student into the float network it stands for, call by call the same graph.

    Args:
        student: from `quantize`; it is left as it was.
        state: state dict of the float network.

    Returns:
        A copy with these weights whose quantizers pass everything on; folded BatchNorms stay folded.

    Raises:
        BadInput: if the state is that of another network.
    """
    twin = copy.deepcopy(_require_student(student))
    left_over = twin.load_state_dict(dict(state), strict=False).unexpected_keys
    if left_over:
        got = f"a state with {', '.join(left_over[:3])}"
        raise BadInput("teacher", expected="the network that the student was made from", got=got,
                       fix="Quantize this teacher.")  # fmt: skip
    for quantizer in activation_quantizers(twin).values():
        quantizer.__dict__["forward"] = _unchanged
    for module in twin.modules():
        if isinstance(module, WeightPath):
            module.active = False
    return twin.eval().requires_grad_(False)


def codes_and_latents(student: nn.Module) -> dict[str, Tensor]:
    """Give what a student's history consists of.

    Returns:
        Per quantized weight NAME: ``NAME.codes`` (int8) and ``NAME.latent`` (detached), both of the parameter's shape.
        Per other parameter KEY (BatchNorm factors, biases): ``KEY.parameter``, so that the student can be rebuilt.
    """
    tensors = {}
    with torch.no_grad():
        for weight in quantized_weights(student):
            tensors[f"{weight.name}.codes"] = encode(weight.parameter, weight.grid()).to(torch.int8)
            tensors[f"{weight.name}.latent"] = weight.parameter.detach()
    latents = {id(weight.parameter) for weight in quantized_weights(student)}
    others = ((key, value) for key, value in student.named_parameters() if id(value) not in latents)
    return tensors | {f"{key}.parameter": value.detach() for key, value in others}


def activation_quantizers(student: nn.Module) -> dict[str, Quantizer]:
    """Give the activation quantizers of a student by site name, in order of execution."""
    holder: Any = getattr(_require_student(student), SITES)
    return {name: getattr(holder, key) for name, key in holder.names.items()}


def freeze_ranges(student: nn.Module) -> None:
    """Fix every range of a student, weights included; live min/max ranges have nothing to fix."""
    for module in _require_student(student).modules():
        if isinstance(module, Quantizer):
            module.freeze()


def observe_ranges(student: nn.Module) -> None:
    """Let every range with a state follow what it sees again, as right after `quantize`."""
    for module in _require_student(student).modules():
        if isinstance(module, ObservedRange):
            module.observing = True


@contextmanager
def moving(student: nn.Module) -> Iterator[nn.Module]:
    """Let ranges and BatchNorm statistics follow what passes within a ``with`` block; both are fixed behind it.

    Args:
        student: from `quantize`, in eval mode; in eval mode again behind the block.
    """
    observe_ranges(student)
    for module in student.modules():
        module.training = isinstance(module, _BatchNorm)
    try:
        yield student
    finally:
        student.eval()
        freeze_ranges(student)


@contextmanager
def without_quantizers(
    student: nn.Module, *, weights: Collection[str] | None = None, sites: Collection[str] | None = None
) -> Iterator[nn.Module]:
    """Let a student compute like its float network within a ``with`` block (folded BatchNorms stay folded).

    Args:
        student: from `quantize`; nothing of its state changes.
        weights: names of the layers whose weights (and biases) are not rounded; all if not given.
        sites: names of the call sites whose activations are not rounded; all if not given.
    """
    paths = [named.path for named in weight_paths(student).values() if weights is None or named.name in weights]
    quantizers = [q for name, q in activation_quantizers(student).items() if sites is None or name in sites]
    before = [quantizer.__dict__.get("forward") for quantizer in quantizers]
    with exact(paths):
        for quantizer in quantizers:
            quantizer.__dict__["forward"] = _unchanged
        try:
            yield student
        finally:
            for quantizer, forward in zip(quantizers, before, strict=True):
                del quantizer.__dict__["forward"]
                if forward is not None:  # within another such block
                    quantizer.__dict__["forward"] = forward


def _unchanged(x: Tensor) -> Tensor:
    return x


def _require_student(student: nn.Module) -> nn.Module:
    if not hasattr(student, SITES):
        fix = "Give what zsq.quantize returned first."
        raise BadInput("student", expected="a network with quantizers", got=type(student).__name__, fix=fix)
    return student
