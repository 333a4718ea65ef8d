"""What operators that make new values become in ONNX: layers, norms, activations, arithmetic, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from zsq.export.emitter import Emitter, Unsupported, Value, emits, with_clamp

_SAME_NAME = {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh", "sigmoid": "Sigmoid",
    "floor": "Floor", "ceil": "Ceil", "round": "Round", "reciprocal": "Reciprocal", "erf": "Erf", "sin": "Sin",
    "cos": "Cos", "mish": "Mish", "hardswish": "HardSwish",
}  # fmt: skip


# ---- layers


@emits(
    "conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding",
)  # fmt: skip
def _conv(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value | str:
    weight = e.shape_of(a["weight"])
    dims = len(weight) - 2
    dilation, stride = spread(a["dilation"], dims), spread(a["stride"], dims)
    padding = a["padding"]
    if padding == "valid":
        pads = [0] * (2 * dims)
    elif padding == "same":  # torch puts the odd one behind
        total = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = spread(padding, dims) * 2
    return e.builder.add(
        "Conv", [e.tensor(a["input"]), e.tensor(a["weight"]), _bias(e, a)],
        {"kernel_shape": weight[2:], "strides": stride, "pads": pads, "dilations": dilation, "group": a["groups"]},
        name=e.label(node),
    )  # fmt: skip


@emits("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value | str:
    weight = e.shape_of(a["weight"])
    dims = len(weight) - 2
    return e.builder.add(
        "ConvTranspose", [e.tensor(a["input"]), e.tensor(a["weight"]), _bias(e, a)],
        {
            "kernel_shape": weight[2:], "strides": spread(a["stride"], dims), "pads": spread(a["padding"], dims) * 2,
            "dilations": spread(a["dilation"], dims), "group": a["groups"],
            "output_padding": spread(a["output_padding"], dims),
        },
        name=e.label(node),
    )  # fmt: skip


@emits("linear.default")
def _linear(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value | str:
    weight, shape = e.shape_of(a["weight"]), e.shape_of(node)
    source = e.value(a["input"])
    x = e.finish(source)
    if len(shape) != 2:  # rows of a matrix: the runtime's integer kernel is that of a 2-D product
        x = e.builder.add("Reshape", [x, e.builder.constant([-1, weight[1]], np.int64)])
        x = e.requantize(x, source.site if source.clamp is None else None)
    result = e.builder.add("Gemm", [x, e.tensor(a["weight"]), _bias(e, a)], {"transB": 1}, name=e.label(node))
    return Value(result, shape=None if len(shape) == 2 else shape)


@emits("matmul.default", "bmm.default", "mm.default")
def _matmul(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    right = a["other"] if "other" in a else a["mat2"]
    return e.builder.add("MatMul", [e.tensor(a["input"] if "input" in a else a["self"]), e.tensor(right)])


@emits("addmm.default")
def _addmm(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    inputs = [e.tensor(a["mat1"]), e.tensor(a["mat2"]), e.tensor(a["self"])]
    return e.builder.add("Gemm", inputs, {"alpha": float(a["alpha"]), "beta": float(a["beta"])})


def _bias(e: Emitter, a: dict[str, Any]) -> str:
    return "" if a["bias"] is None else e.tensor(a["bias"])


# ---- norms


@emits("batch_norm.default", "_native_batch_norm_legit_no_training.default")
def _batch_norm(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    if a.get("training"):
        raise Unsupported("a BatchNorm with the statistics of the batch")
    channels = e.shape_of(node)[1]
    scale = e.tensor(a["weight"]) if a["weight"] is not None else e.builder.constant(np.ones(channels))
    shift = e.tensor(a["bias"]) if a["bias"] is not None else e.builder.constant(np.zeros(channels))
    inputs = [e.tensor(a["input"]), scale, shift, e.tensor(a["running_mean"]), e.tensor(a["running_var"])]
    return e.builder.add("BatchNormalization", inputs, {"epsilon": float(a["eps"])}, name=e.label(node))


@emits("layer_norm.default")
def _layer_norm(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    size = a["normalized_shape"]
    scale = e.tensor(a["weight"]) if a["weight"] is not None else e.builder.constant(np.ones(size))
    shift = "" if a["bias"] is None else e.tensor(a["bias"])
    attributes = {"axis": -len(size), "epsilon": float(a["eps"])}
    return e.builder.add("LayerNormalization", [e.tensor(a["input"]), scale, shift], attributes)


@emits("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default")
def _softmax(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    kind = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return e.builder.add(kind, [e.tensor(a["self"])], {"axis": a["dim"]})


# ---- activations


@emits(*(f"{name}.default" for name in _SAME_NAME), *(f"{name}_.default" for name in _SAME_NAME))
def _same(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    name = str(node.target).split(".")[1].rstrip("_")
    return e.builder.add(_SAME_NAME[name], [e.tensor(a["self"])])


@emits("relu.default", "relu_.default", "relu6.default")
def _relu(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    return _clamped(e, a["self"], 0.0, 6.0 if "relu6" in str(node.target) else math.inf)


@emits(*(f"{name}.default" for name in ["hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_max"]))
def _clamp(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    low, high = (a.get(key, a.get(f"{key}_val")) for key in ("min", "max"))
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        raise Unsupported("bounds that are computed")
    return _clamped(e, a["self"], -math.inf if low is None else low, math.inf if high is None else high)


def _clamped(e: Emitter, source: fx.Node, low: float, high: float) -> Value:
    value = e.value(source)
    if value.clamp is not None:
        value = Value(e.finish(value))
    return with_clamp(value, low, high)


@emits("hardsigmoid.default", "hardsigmoid_.default")
def _hardsigmoid(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    return e.builder.add("HardSigmoid", [e.tensor(a["self"])], {"alpha": 1 / 6, "beta": 0.5})


@emits("silu.default", "silu_.default")
def _silu(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    x = e.tensor(a["self"])
    return e.builder.add("Mul", [x, e.builder.add("Sigmoid", [x])])


@emits("gelu.default")
def _gelu(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    return e.builder.add("Gelu", [e.tensor(a["self"])], {"approximate": a["approximate"]})


@emits("leaky_relu.default", "leaky_relu_.default")
def _leaky(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    return e.builder.add("LeakyRelu", [e.tensor(a["self"])], {"alpha": float(a["negative_slope"])})


@emits("prelu.default")
def _prelu(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    slope, dims = a["weight"], e.dims(node)
    tail = [1] * (dims - 2)
    name = e.tensor(slope)
    if dims > 2:
        name = e.builder.add("Reshape", [name, e.builder.constant([-1, *tail], np.int64)])
    return e.builder.add("PRelu", [e.tensor(a["self"]), name])


@emits("elu.default", "elu_.default", "celu.default", "selu.default")
def _elu(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    kind = str(node.target).split(".")[1].rstrip("_")
    if a.get("scale", 1) != 1 or a.get("input_scale", 1) != 1:
        raise Unsupported("a scaled ELU")
    attributes = {} if kind == "selu" else {"alpha": float(a["alpha"])}
    return e.builder.add(kind.capitalize(), [e.tensor(a["self"])], attributes)


@emits("softplus.default")
def _softplus(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    if a["beta"] != 1:
        raise Unsupported("a softplus with beta other than 1")
    return e.builder.add("Softplus", [e.tensor(a["self"])])


# ---- arithmetic


@emits(
    "add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor", "mul.Tensor", "mul_.Tensor", "div.Tensor", "div_.Tensor",
    "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "maximum.default", "minimum.default",
)  # fmt: skip
def _binary(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    name = str(node.target).split(".")[1].rstrip("_")
    kind = {"maximum": "Max", "minimum": "Min"}.get(name, name.capitalize())
    left, right = list(a.values())[:2]
    second = e.tensor(right)
    if a.get("alpha", 1) != 1:
        second = e.builder.add("Mul", [second, e.builder.constant(a["alpha"])])
    return e.builder.add(kind, [e.tensor(left), second])


@emits("rsub.Scalar")
def _rsub(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    if a["alpha"] != 1:
        raise Unsupported("a factor alpha")
    return e.builder.add("Sub", [e.tensor(a["other"]), e.tensor(a["self"])])


@emits("rsqrt.default")
def _rsqrt(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    return e.builder.add("Reciprocal", [e.builder.add("Sqrt", [e.tensor(a["self"])])])


# ---- pooling


@emits("mean.dim", "mean.default", "sum.dim_IntList", "amax.default", "amin.default")
def _reduce(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value | str:
    kind = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}[
        str(node.target).split(".")[1]
    ]
    source, dims = a["self"], e.dims(a["self"])
    axes = sorted(d % dims for d in (a.get("dim") or range(dims)))
    if 0 in axes:
        raise Unsupported("a reduction over the batch")
    if kind == "ReduceMean" and dims > 2 and axes == list(range(2, dims)):
        pooled = e.builder.add("GlobalAveragePool", [e.tensor(source)])
        return Value(pooled, shape=None if a["keepdim"] else e.shape_of(node))
    axes_name = e.builder.constant(axes, np.int64)
    return e.builder.add(kind, [e.tensor(source), axes_name], {"keepdims": int(a["keepdim"])})


@emits("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default")
def _adaptive(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value | str:
    source = e.value(a["self"])
    dims = len(a["output_size"])
    before, after = e.shape_of(a["self"])[-dims:], e.shape_of(node)[-dims:]
    if e.dims(node) != dims + 2:
        raise Unsupported("an input without a batch dimension")
    if set(after) == {1}:
        return e.builder.add("GlobalAveragePool", [e.finish(source)])
    if before == after:
        return source
    if any(b % s for b, s in zip(before, after, strict=True)):
        raise Unsupported(f"{list(before)} to {list(after)}: windows of several sizes")
    window = [b // s for b, s in zip(before, after, strict=True)]
    return e.builder.add("AveragePool", [e.finish(source)], {"kernel_shape": window, "strides": window})


@emits("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default")
def _avg_pool(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    if a.get("divisor_override") is not None:
        raise Unsupported("a divisor of its own")
    attributes = pooling(a, e.dims(node) - 2) | {"count_include_pad": int(a["count_include_pad"])}
    size = e.shape_of(a["self"])[2:]
    if tuple(attributes["kernel_shape"]) == size and not any(attributes["pads"]):
        return e.builder.add("GlobalAveragePool", [e.tensor(a["self"])])
    return e.builder.add("AveragePool", [e.tensor(a["self"])], attributes)


def pooling(a: dict[str, Any], dims: int) -> dict[str, Any]:
    """Attributes of a pooling window."""
    kernel = spread(a["kernel_size"], dims)
    return {
        "kernel_shape": kernel,
        "strides": spread(a["stride"], dims) if a["stride"] else kernel,
        "pads": spread(a["padding"], dims) * 2,
        "ceil_mode": int(a["ceil_mode"]),
    }


def spread(value: int | Sequence[int], dims: int) -> list[int]:
    """One number per dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    if any(isinstance(number, (fx.Node, torch.SymInt)) for number in numbers):
        raise Unsupported("a size that is computed")
    return numbers * dims if len(numbers) == 1 else numbers
