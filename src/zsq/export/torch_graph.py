"""What can be read off the graph of a torch.export program: layers between integer operands, the grid of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from zsq.export.torch_modules import DECOMPOSED

_LAYERS = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_MOVES = ("flatten", "view", "reshape", "max_pool2d", "pad", "permute", "transpose", "squeeze", "unsqueeze", "dropout")


def logit_step(program: torch.export.ExportedProgram) -> float | None:
    """Step of the grid the output is on; None if it is on none."""
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    results = output.args[0]
    source = _through(results[0]) if isinstance(results, tuple) and len(results) == 1 else None
    if not isinstance(source, fx.Node) or not str(source.target).startswith(f"{DECOMPOSED}.dequantize_per_tensor"):
        return None
    step: Any = source.args[1]
    return float(step)


def _layers(program: torch.export.ExportedProgram) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and _name(node.target) in _LAYERS]


def _name(target: Any) -> str:
    return str(target).removeprefix("aten.").partition(".")[0]


def float_layers(program: torch.export.ExportedProgram) -> int:
    """Layers whose weight is not stored as integers."""
    return sum(not _dequantized(node.args[1]) for node in _layers(program))


def lowerable(program: torch.export.ExportedProgram) -> float:
    """Share of layers with integer input and weight whose result goes to a quantizer, directly or behind a ReLU."""
    layers = _layers(program)
    found = sum(
        _dequantized(_through(node.args[0])) and _dequantized(node.args[1]) and _requantized(node) for node in layers
    )
    return found / len(layers) if layers else 0.0


def _through(node: Any) -> Any:
    """Walk back over operations that only move values."""
    while isinstance(node, fx.Node) and node.op == "call_function" and _name(node.target) in _MOVES:
        node = node.args[0]
    return node


def _dequantized(node: Any) -> bool:
    return isinstance(node, fx.Node) and str(node.target).startswith(f"{DECOMPOSED}.dequantize")


def _requantized(node: fx.Node) -> bool:
    readers = list(node.users)
    if len(readers) == 1 and _name(readers[0].target) in ("relu", "relu_", "hardtanh", "hardtanh_", "clamp"):
        readers = list(readers[0].users)
    return bool(readers) and all(str(user.target).startswith(f"{DECOMPOSED}.quantize") for user in readers)
