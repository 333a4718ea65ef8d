"""What operators that move or select values become in ONNX; the results stay on the grid of what they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from zsq.export.emitter import Emitter, Unsupported, Value, emits
from zsq.export.operators import pooling, spread

_END = 2**63 - 1


@emits("zsq.site")
def _site(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    return e.quantize(node, e.value(a["x"]), a["site"])


@emits(
    "clone.default", "contiguous.default", "detach.default", "detach_.default", "alias.default",
    "lift_fresh_copy.default", "dropout.default", "dropout_.default", "feature_dropout.default",
    "alpha_dropout.default",
)  # fmt: skip
def _nothing(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    return e.value(a["self"] if "self" in a else a["input"])


@emits("to.dtype", "to.dtype_layout", "to.device", "_to_copy.default", "type_as.default")
def _to(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    before, after = (n.meta["val"].dtype for n in (a["self"], node))
    if (before, after) != (torch.float32, torch.float32):
        raise Unsupported(f"a conversion from {before} to {after}")
    return e.value(a["self"])


@emits(
    "view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints", "unflatten.int", "squeeze.default",
    "squeeze.dim", "squeeze.dims", "unsqueeze.default", "ravel.default", "view_as.default", "reshape_as.default",
)  # fmt: skip
def _reshape(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    value, shape = e.value(a["self"]), e.shape_of(node)
    if value.clamp is not None or value.shape is not None:
        value = Value(e.finish(value), value.site if value.clamp is None else None)
    return Value(value.name, value.site, shape=shape)


@emits("permute.default", "transpose.int", "t.default")
def _transpose(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = e.dims(node)
    order = list(range(dims))
    if "dims" in a:
        order = [d % dims for d in a["dims"]]
    else:
        i, j = (a["dim0"] % dims, a["dim1"] % dims) if "dim0" in a else (0, dims - 1)
        order[i], order[j] = order[j], order[i]
    return _move(e, node, a["self"], "Transpose", [], {"perm": order})


@emits("slice.Tensor")
def _slice(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    start, end = 0 if a["start"] is None else a["start"], _END if a["end"] is None else a["end"]
    dim = a["dim"] % e.dims(node)
    if dim == 0:
        if (start, a["step"]) == (0, 1) and (end == _END or isinstance(end, fx.Node)):
            return e.value(a["self"])
        raise Unsupported("a part of the batch")
    return _move(e, node, a["self"], "Slice", [_plain([v]) for v in (start, end, dim, a["step"])])


@emits("select.int")
def _select(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    dim = a["dim"] % e.dims(a["self"])
    if dim == 0:
        raise Unsupported("one image of the batch")
    source = e.value(a["self"])
    index = e.builder.constant(_plain([a["index"]])[0], np.int64)
    return e.keep(node, source, e.builder.add("Gather", [e.finish(source), index], {"axis": dim}))


@emits("chunk.default", "split.Tensor", "split_with_sizes.default", "unbind.int", "tensor_split.sections")
def _split(e: Emitter, node: fx.Node, a: dict[str, Any]) -> list[Value]:
    source = e.value(a["self"])
    dim = a["dim"] % e.dims(a["self"])
    parts = node.meta["val"]
    if dim == 0:
        raise Unsupported("parts of the batch")
    whole, at, results = e.finish(source), 0, []
    for part in parts:
        size = 1 if "unbind" in str(node.target) else int(part.shape[dim])
        bounds = [e.builder.constant([number], np.int64) for number in (at, at + size, dim)]
        name = e.builder.add("Slice", [whole, *bounds])
        if "unbind" in str(node.target):
            name = e.builder.add("Squeeze", [name, bounds[2]])
        results.append(e.keep(node, source, name))
        at += size
    return results


@emits("getitem")
def _getitem(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    values = e.values.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(values, list):
        raise Unsupported("a result of several tensors")
    return values[node.args[1]]  # type: ignore[index]


@emits("cat.default", "concat.default")
def _cat(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    sources = [e.value(other) for other in a["tensors"]]
    name = e.builder.add("Concat", [e.finish(source) for source in sources], {"axis": a["dim"] % e.dims(node)})
    sites = {source.site if source.clamp is None else None for source in sources}
    return Value(name, sites.pop() if len(sites) == 1 else None)


@emits("stack.default")
def _stack(e: Emitter, node: fx.Node, a: dict[str, Any]) -> str:
    dim = a["dim"] % e.dims(node)
    axis = e.builder.constant([dim], np.int64)
    parts = [e.builder.add("Unsqueeze", [e.tensor(other), axis]) for other in a["tensors"]]
    return e.builder.add("Concat", parts, {"axis": dim})


@emits("expand.default", "expand_as.default")
def _expand(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    shape = [1 if size == -1 else size for size in e.shape_of(node)]  # the batch stays as it is
    if e.shape_of(node)[:1] != e.shape_of(a["self"])[:1]:
        raise Unsupported("one tensor spread over the batch")
    return _move(e, node, a["self"], "Expand", [shape])


@emits("repeat.default")
def _repeat(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    repeats = _plain(a["repeats"])
    if repeats[0] != 1 or len(repeats) != e.dims(a["self"]):
        raise Unsupported("repeats of the batch")
    return _move(e, node, a["self"], "Tile", [repeats])


@emits("pad.default", "constant_pad_nd.default", "reflection_pad2d.default", "replication_pad2d.default")
def _pad(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    kind = str(node.target)
    mode = a.get("mode", "reflect" if "reflection" in kind else "replicate" if "replication" in kind else "constant")
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    amounts, dims = _plain(a["pad"] if "pad" in a else a["padding"]), e.dims(node)
    pads = [0] * (2 * dims)
    for i in range(len(amounts) // 2):
        pads[dims - 1 - i], pads[2 * dims - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    value = a.get("value") or 0.0
    source = e.value(a["self"])
    inputs = [e.finish(source), e.builder.constant(pads, np.int64), e.builder.constant(value)]
    name = e.builder.add("Pad", inputs, {"mode": modes[mode]})
    return e.keep(node, source, name, pads=True) if not value else Value(name)


@emits("max_pool1d.default", "max_pool2d.default", "max_pool3d.default")
def _max_pool(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = e.dims(node) - 2
    attributes = pooling(a, dims) | {"dilations": spread(a["dilation"], dims)}
    return _move(e, node, a["self"], "MaxPool", [], attributes)


@emits("adaptive_max_pool2d.default")
def _adaptive_max(e: Emitter, node: fx.Node, a: dict[str, Any]) -> list[Value]:
    if set(a["output_size"]) != {1}:
        raise Unsupported("windows of several sizes")
    return [_move(e, node, a["self"], "GlobalMaxPool", [])]


@emits("pixel_shuffle.default")
def _pixel_shuffle(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    return _move(e, node, a["self"], "DepthToSpace", [], {"blocksize": a["upscale_factor"], "mode": "CRD"})


@emits("channel_shuffle.default")
def _channel_shuffle(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    source, shape = e.value(a["self"]), e.shape_of(node)
    groups = a["groups"]
    name, site = e.finish(source), source.site if source.clamp is None else None
    apart = e.builder.constant([-1, groups, shape[1] // groups, *shape[2:]], np.int64)
    name = e.requantize(e.builder.add("Reshape", [name, apart]), site)
    order = [0, 2, 1, *range(3, len(shape) + 1)]
    name = e.requantize(e.builder.add("Transpose", [name], {"perm": order}), site)
    return Value(e.requantize(e.builder.add("Reshape", [name, e.builder.constant(shape, np.int64)]), site), site)


@emits(
    "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec", "upsample_linear1d.vec",
    "upsample_bilinear2d.vec", "upsample_trilinear3d.vec",
)  # fmt: skip
def _resize(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Value:
    nearest = "nearest" in str(node.target)
    source = e.value(a["input"])
    x, before, after = e.finish(source), e.shape_of(a["input"])[2:], e.shape_of(node)[2:]
    where = "asymmetric" if nearest else "align_corners" if a["align_corners"] else "half_pixel"
    attributes = {"mode": "nearest" if nearest else "linear", "coordinate_transformation_mode": where}
    if nearest:
        attributes["nearest_mode"] = "floor"
    factors = a["scale_factors"]
    if factors is None and all(new % old == 0 for old, new in zip(before, after, strict=True)):
        factors = [new // old for old, new in zip(before, after, strict=True)]
    if factors is not None:
        name = e.builder.add("Resize", [x, "", e.builder.constant([1, 1, *factors])], attributes)
    else:  # sizes must name the batch, which is known at run time only
        batch = e.builder.add("Shape", [x], {"start": 0, "end": 2})
        sizes = e.builder.add("Concat", [batch, e.builder.constant(after, np.int64)], {"axis": 0})
        name = e.builder.add("Resize", [x, "", "", sizes], attributes)
    return e.keep(node, source, name) if nearest else Value(name)


def _move(
    e: Emitter, node: fx.Node, read: fx.Node, kind: str, numbers: Sequence[Sequence[int]],
    attributes: dict[str, Any] | None = None,
) -> Value:  # fmt: skip
    """One ONNX operator with integer lists as further inputs."""
    source = e.value(read)
    inputs = [e.builder.constant(_plain(row), np.int64) for row in numbers]
    return e.keep(node, source, e.builder.add(kind, [e.finish(source), *inputs], attributes))


def _plain(numbers: Sequence[Any]) -> list[int]:
    if any(isinstance(number, (fx.Node, torch.SymInt)) for number in numbers):
        raise Unsupported("a size that is computed")
    return [min(int(number), _END) for number in numbers]
