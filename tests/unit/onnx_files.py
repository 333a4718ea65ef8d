"""Small ONNX files for tests: a linear classifier on pixels, a convolution, and their odd relatives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(
    path: Path,
    nodes: Sequence[Any],
    weights: Mapping[str, np.ndarray],
    *,
    shape: Sequence[int | str],
    outputs: Mapping[str, Sequence[int | str]],
    metadata: Mapping[str, Any] | None = None,
    opset: int = 21,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """Write a graph with input ``image``."""
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(own)) for name, own in outputs.items()]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("image", kind, list(shape))], ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, {f"zsq.{key}": json.dumps(value) for key, value in (metadata or {}).items()})
    onnx.save(model, str(path))
    return path


def linear(
    path: Path, weight: np.ndarray, *, image: Sequence[int | str], batch: int | str = "batch",
    metadata: Mapping[str, Any] | None = None, opset: int = 21,
) -> Path:  # fmt: skip
    """``flatten(image) @ weight``."""
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    ends = {"logits": [batch, weight.shape[1]]}
    weights = {"w": weight.astype(np.float32)}
    return save(path, nodes, weights, shape=[batch, *image], outputs=ends, metadata=metadata, opset=opset)


def convolution(path: Path, channels: int, *, image: tuple[int, int, int], batch: int | str = "batch") -> Path:
    """A convolution with a global average behind it."""
    weight = np.random.default_rng(0).standard_normal((channels, image[0], 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    return save(path, nodes, {"w": weight}, shape=[batch, *image], outputs={"logits": [batch, channels]})
