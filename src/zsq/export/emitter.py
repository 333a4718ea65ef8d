"""From a recorded graph to ONNX nodes. What each operator becomes is in `operators` and `moves`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from zsq.errors import BadInput
from zsq.export.builder import Builder
from zsq.export.codes import CodeWriter
from zsq.export.frozen import Frozen, arguments, operator_name
from zsq.export.recorded import keeps_rounding, needed


@dataclass(frozen=True)
class Value:
    """A tensor of the graph and what is still to be done to it.

    A clamp or reshape waits until somebody needs its result: a quantizer absorbs a clamp into the bounds of its codes,
    and rounds before a reshape, so that the runtime finds operation and quantizer side by side.

    Attributes:
        name: of the ONNX tensor.
        site: index of the site whose grid it is on, or None.
        clamp: bounds still to be applied, or None.
        shape: shape still to be given to it (-1: the batch), or None.
    """

    name: str
    site: int | None = None
    clamp: tuple[float, float] | None = None
    shape: tuple[int, ...] | None = None


# OpenVINO computes these on codes, with other results than on values: it aligns the grids of a concatenation's inputs,
# rounds averages, and breaks constants that several nodes share behind a Pad.
_APART = frozenset(["cat", "concat", "avg_pool1d", "avg_pool2d", "avg_pool3d", "pad", "constant_pad_nd"])

Emit = Callable[["Emitter", fx.Node, dict[str, Any]], "Value | list[Value] | str"]
OPERATORS: dict[str, Emit] = {}


def emits(*names: str) -> Callable[[Emit], Emit]:
    """Register a function as the translation of operators, named like ``aten.relu.default`` without ``aten.``.

    It gets the emitter, the node and its arguments by name, and returns the result: a `Value`, several, or the name of
    an ONNX tensor.
    """

    def register(function: Emit) -> Emit:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class Unsupported(Exception):
    """Raised by a translation for arguments it cannot express."""


class Emitter:
    """Walks over a recorded graph and appends ONNX nodes.

    Args:
        program: the graph.
        builder: where nodes go.
        frozen: codes and grids; None for a float network.
        int2: whether the runtime reads 2-bit initializers.
        keep_rounding: write quantizers between a convolution and an addition in primitives: see `CodeWriter`.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        builder: Builder,
        frozen: Frozen | None,
        *,
        int2: bool = False,
        keep_rounding: bool = False,
    ) -> None:
        self.program, self.builder, self.keep_rounding = program, builder, keep_rounding
        self.rounding = CodeWriter(builder, frozen, int2=int2)
        self.values: dict[fx.Node, Value | list[Value]] = {}
        self.folded: dict[fx.Node, Any] = {}  # what depends on parameters only
        self._finished: dict[Value, str] = {}
        self._apart = False
        self._stored = {
            spec.arg.name: spec.target
            for spec in program.graph_signature.input_specs
            if spec.kind != InputKind.USER_INPUT
        }

    def run(self, inputs: Sequence[str]) -> list[str]:
        """Translate the graph.

        Args:
            inputs: names for its inputs.

        Returns:
            Names of the tensors it returns.

        Raises:
            BadInput: naming the first operator that has no translation, and where it is.
        """
        names = iter(inputs)
        wanted = needed(self.program.graph)
        outputs: list[str] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name not in self._stored:
                self.values[node] = Value(next(names))
            elif node.op == "call_function" and node in wanted:
                self._call(node)
            elif node.op == "output":
                outputs = [self.tensor(value) for value in node.args[0]]
        return outputs

    def _call(self, node: fx.Node) -> None:
        if self._fold(node):
            return
        key = operator_name(node)
        emit = OPERATORS.get(key)
        self._apart = self.keep_rounding and key.split(".")[0] in _APART
        try:
            if emit is None:
                raise Unsupported("no translation")
            given = arguments(node) if hasattr(node.target, "_schema") else {}
            result = emit(self, node, given)
        except Unsupported as error:
            raise BadInput(
                f"operator {key} {self._place(node)}", expected="an operator that can be exported to ONNX",
                got=str(error), fix="Replace it in the network, or export with --target torch.",
            ) from error  # fmt: skip
        self.values[node] = Value(result) if isinstance(result, str) else result

    def _fold(self, node: fx.Node) -> bool:
        """Compute what does not depend on the input: a weight made of parameters, say."""
        reads = node.all_input_nodes
        if not reads or not all(other in self.folded or other.name in self._stored for other in reads):
            return False
        if any(self._stored.get(other.name) in self.rounding.weights for other in reads):
            return False
        given = fx.map_arg((node.args, node.kwargs), lambda other: self._known(other))
        self.folded[node] = node.target(*given[0], **given[1])  # type: ignore[operator]
        return True

    def _known(self, node: fx.Node) -> Any:
        if node in self.folded:
            return self.folded[node]
        path = self._stored[node.name]
        state = self.program.state_dict
        return (state[path] if path in state else self.program.constants[path]).detach()

    def _place(self, node: fx.Node) -> str:
        """Where an operator is: its quantizer's site, its module, or the last module before it."""
        for user in node.users:
            if operator_name(user) == "zsq.site":
                return f"at {self.rounding.sites[int(user.args[1])].name!r}"  # type: ignore[arg-type]
        before: fx.Node = node
        word = "in"
        while before.op not in ("root", "placeholder"):
            path = [p for p, _ in (before.meta.get("nn_module_stack") or {}).values() if p and "zsq_" not in p]
            if path:
                return f"{word} module {path[-1]!r}"
            before, word = before.prev, "behind"
        return "in the network's own forward"

    # ---- what translations use

    def value(self, node: fx.Node) -> Value:
        """Value of a node, with what is still to be done to it."""
        if node not in self.values and node in self.folded:
            self.values[node] = Value(self.builder.constant(self.folded[node], None))
        if node not in self.values and node.op == "placeholder":
            self.values[node] = Value(self._initializer(node))
        value = self.values.get(node)
        if isinstance(value, Value):
            return value
        raise Unsupported(f"an argument {node.name} that is no tensor")

    def tensor(self, argument: Any) -> str:
        """Name of the finished tensor of a node; of a constant for a number."""
        if isinstance(argument, (int, float)):
            return self.builder.constant(argument)
        if not isinstance(argument, fx.Node):
            raise Unsupported(f"an argument {argument!r}")
        return self.finish(self.value(argument))

    def finish(self, value: Value) -> str:
        """Apply what is still to be done to a value; once, however often it is read."""
        if value not in self._finished:
            name = value.name
            if value.clamp is not None:
                name = self._clamp(name, value.clamp)
            if value.shape is not None:
                name = self.builder.add("Reshape", [name, self.builder.constant(value.shape, np.int64)])
            if value.shape is not None and value.clamp is None:
                name = self.requantize(name, value.site)
            self._finished[value] = name
        name = self._finished[value]
        if not self._apart or value.site is None or value.clamp is not None:
            return name
        return self.rounding.apart(name, value.site)

    def _clamp(self, name: str, clamp: tuple[float, float]) -> str:
        if clamp == (0.0, math.inf):
            return self.builder.add("Relu", [name])
        low, high = ("" if math.isinf(bound) else self.builder.constant(bound) for bound in clamp)
        return self.builder.add("Clip", [name, low, high])

    def keep(self, node: fx.Node, source: Value, name: str, *, pads: bool = False) -> Value:
        """Result of an operator that only moves values: still on the same grid.

        Args:
            node: its call.
            source: what it read, finished.
            name: the ONNX tensor.
            pads: whether zeros were added; if 0 is not on the grid the result is on none.
        """
        site = source.site if source.clamp is None else None
        if site is not None and pads and not self.rounding.sites[site].has_zero:
            site = None
        return Value(self.requantize(name, site), site)

    def requantize(self, name: str, site: int | None) -> str:
        """See `CodeWriter.requantize`."""
        return self.rounding.requantize(name, site)

    def quantize(self, node: fx.Node, source: Value, index: int) -> Value:
        """Round a value to the grid of a site.

        Args:
            node: the quantizer's call.
            source: the value; a clamp it is still waiting for becomes part of the rounding, a reshape waits on.
            index: of the site.
        """
        in_float = self.keep_rounding and keeps_rounding(node)
        write = self.rounding.quantize_in_float if in_float else self.rounding.quantize
        name, site = write(source.name, index, source.clamp)
        return Value(name, site, shape=source.shape)

    def _initializer(self, node: fx.Node) -> str:
        """Store a parameter, buffer or constant; those with codes as codes."""
        return self.rounding.stored(self._stored[node.name]) or self.builder.constant(self._known(node), None)

    def label(self, node: fx.Node) -> str:
        """Path of the module that a node belongs to; empty if there is none."""
        stack = node.meta.get("nn_module_stack") or {}
        return next((path for path, _ in reversed(stack.values()) if path), "")

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's result, -1 for the batch."""
        sizes: list[Any] = list(_meta(node).shape)
        shape = tuple(-1 if isinstance(size, torch.SymInt) else size for size in sizes)
        if shape.count(-1) > 1:
            raise Unsupported("a shape in which several sizes depend on the batch")
        return shape

    def dims(self, node: fx.Node) -> int:
        """Number of dimensions of a node's result."""
        return _meta(node).dim()


def with_clamp(value: Value, low: float, high: float) -> Value:
    """The same value with bounds still to be applied."""
    return replace(value, clamp=(float(low), float(high)))


def _meta(node: fx.Node) -> Tensor:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unsupported("a result that is no tensor")
    return value
