"""Nodes and constants of one ONNX graph, with short unique names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

FLOAT, UINT8, INT8, INT4, INT2 = (
    TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT4, TensorProto.INT2,
)  # fmt: skip
# Opset that first has 4-bit and 2-bit tensors, and the file version that belongs to it.
PLAIN_OPSET, INT2_OPSET = 21, 25
IR_VERSION = {PLAIN_OPSET: 10, INT2_OPSET: 13}


class Builder:
    """Collects the nodes and initializers of a graph.

    Args:
        opset: version of the standard operators.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self._taken: Counter[str] = Counter()
        self._constants: dict[object, str] = {}

    def name(self, wish: str) -> str:
        """Make a name that is not taken yet."""
        self._taken[wish] += 1
        if self._taken[wish] == 1:
            return wish
        return self.name(f"{wish}_{self._taken[wish]}")

    def add(
        self, kind: str, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None, *, name: str = ""
    ) -> str:
        """Append a node with one output.

        Args:
            kind: operator, e.g. ``"Conv"``.
            inputs: names of tensors; empty for a missing optional one.
            attributes: of the operator.
            name: wish for the name of its output.

        Returns:
            The name of its output.
        """
        return self.add_many(kind, inputs, 1, attributes, name=name)[0]

    def add_many(
        self, kind: str, inputs: Sequence[str], outputs: int, attributes: Mapping[str, Any] | None = None, *,
        name: str = "",
    ) -> list[str]:  # fmt: skip
        """Append a node with several outputs; see `add`."""
        results = [self.name(name or kind) for _ in range(outputs)]
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(kind, list(inputs), results, name=results[0], **(attributes or {})))
        return results

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Name of an initializer with these values; equal ones are stored once."""
        plain = values.detach().numpy() if isinstance(values, torch.Tensor) else values
        array = np.array(plain, dtype=dtype, order="C")
        key = (array.tobytes(), array.shape, str(array.dtype))
        if key not in self._constants:
            self._constants[key] = self.store("c", onnx.numpy_helper.from_array(array))
        return self._constants[key]

    def store(self, wish: str, tensor: Any) -> str:
        """Add an initializer."""
        name = self.name(wish)
        tensor.name = name
        self.initializers[name] = tensor
        return name

    def packed(self, wish: str, codes: np.ndarray, kind: int) -> str:
        """Add an initializer of INT2, INT4 or INT8 codes, several to a byte, lowest bits first.

        Args:
            wish: for its name.
            codes: int8.
            kind: the ONNX type.
        """
        bits = 2 if kind == INT2 else 4 if kind == INT4 else 8
        tensor = TensorProto(dims=codes.shape, data_type=kind, raw_data=pack(codes, bits))
        return self.store(wish, tensor)

    def rename(self, old: str, new: str) -> None:
        """Give the output of a node another name, also where it is read."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> Any:
        """Put everything together; initializers that nothing reads are left out."""
        used = {name for node in self.nodes for name in node.input}
        stored = [tensor for name, tensor in self.initializers.items() if name in used]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, stored)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION[self.opset], producer_name="zsq")


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Bytes of signed codes: the first code in the lowest bits, the last byte filled up with zeros.

    Args:
        codes: int8, any shape.
        bits: 2, 4 or 8 per code.

    Example:
        >>> pack(np.array([1, -1, 7], dtype=np.int8), 4).hex()
        'f107'
    """
    flat = codes.astype(np.int8).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    per_byte = 8 // bits
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte) & np.uint8(2**bits - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes()
