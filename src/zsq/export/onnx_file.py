"""A frozen student, or a float network, as one ONNX model with its facts in the metadata."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import onnx
from onnx import helper

import zsq
from zsq.errors import BadInput
from zsq.export import moves, operators  # noqa: F401 - fill the table of translations
from zsq.export.builder import FLOAT, INT2_OPSET, PLAIN_OPSET, UINT8, Builder
from zsq.export.emitter import Emitter
from zsq.export.frozen import Frozen
from zsq.export.labels import labels_of
from zsq.teachers import Teacher

_LIMIT = 2**31 - 2**20  # a protobuf holds less than 2 GiB


class Model(NamedTuple):
    """An ONNX model and where to look into it.

    Attributes:
        proto: the model.
        codes: per site the tensor that holds its codes (uint8), or the steps from its zero (float32).
    """

    proto: Any
    codes: tuple[str, ...]


def build(
    program: Any,
    frozen: Frozen | None,
    teacher: Teacher,
    *,
    int2: bool = False,
    keep_rounding: bool = False,
    extra: dict[str, Any] | None = None,
) -> Model:
    """Translate a recorded graph.

    Args:
        program: from `zsq.export.frozen`.
        frozen: codes and grids of a student; None for a float network.
        teacher: whose facts go into the metadata.
        int2: store 2-bit weights as such.
        keep_rounding: see `zsq.export.emitter.Emitter`.
        extra: further metadata.

    Returns:
        The checked model: input ``image`` [batch, c, h, w] (normalised), output ``logits``.

    Raises:
        BadInput: naming an operator that has no translation, or if the installed onnx is too old.
    """
    two = int2 and frozen is not None and any(weight.bits == 2 for weight in frozen.weights.values())
    opset = INT2_OPSET if two else PLAIN_OPSET
    if onnx.defs.onnx_opset_version() < opset:
        raise BadInput("onnx", expected=f"a version that knows opset {opset}", got=onnx.__version__,
                       fix='Upgrade it: pip install -U "zsq[export]".')  # fmt: skip
    builder = Builder(opset)
    emitter = Emitter(program, builder, frozen, int2=two, keep_rounding=keep_rounding)
    user = program.graph_signature.user_inputs
    names = ["image"] if len(user) == 1 else [f"image{i}" for i in range(len(user))]
    for name in names:
        builder.name(name)
    found = emitter.run(names)
    ends = ["logits"] if len(found) == 1 else [f"output{i}" for i in range(len(found))]
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [_info(name, placeholders[key]) for name, key in zip(names, user, strict=True)]
    last = next(node for node in program.graph.nodes if node.op == "output")
    outputs = [_info(name, node) for name, node in zip(ends, last.args[0], strict=True)]
    for name, old in zip(ends, found, strict=True):
        builder.nodes.append(helper.make_node("Identity", [old], [builder.name(name)], name=name))
    proto = builder.model(inputs, outputs, teacher.name)
    helper.set_model_props(proto, metadata(teacher) | {key: str(value) for key, value in (extra or {}).items()})
    if proto.ByteSize() > _LIMIT:
        raise BadInput(teacher.name, expected="a model of less than 2 GiB", got=f"{proto.ByteSize() / 2**30:.1f} GiB",
                       fix="Export with --target torch.")  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    return Model(proto, tuple(emitter.rounding.codes.get(i, "") for i in range(len(emitter.rounding.sites))))


def metadata(teacher: Teacher) -> dict[str, str]:
    """What a user of the file must know: how to make its input, and what its output means."""
    facts: dict[str, Any] = {
        "zsq_version": zsq.__version__, "teacher": teacher.name, "task": teacher.task, "classes": teacher.classes,
        "image": list(teacher.image), "channels": teacher.channels, "mean": teacher.mean, "std": teacher.std,
        "resize": teacher.resize, "crop": teacher.crop, "labels": labels_of(teacher.name, teacher.classes),
        "input": "float32 [batch, c, h, w]: (pixel / 255 - mean) / std", "teacher_sha256": teacher.fingerprint,
    }  # fmt: skip
    layout = getattr(teacher.outputs, "layout", ())  # of a detector: which channels are boxes, classes, objectness
    facts["parts"] = [list(part) for part in layout] or None
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items() if value is not None
    }


def exposed(proto: Any, tensors: Sequence[str]) -> bytes:
    """The model with the codes of some sites as further outputs."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    for name in dict.fromkeys(tensors):
        kind = FLOAT if name.endswith(".steps") else UINT8
        twin.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return twin.SerializeToString()


def require(target: str) -> None:
    """Check that what a target needs is installed.

    Raises:
        BadInput: naming the pip command.
    """
    for package in ("onnx", "onnxruntime", *(["openvino"] if target == "openvino" else [])):
        try:
            importlib.import_module(package)
        except ImportError as error:
            extra = "export,openvino" if target == "openvino" else "export"
            got, fix = "it is not installed", f'Install it: pip install "zsq[{extra}]".'
            if not isinstance(error, ModuleNotFoundError) or error.name not in (None, package):
                reason = " ".join(str(error).split())[:200] or "built for other packages than these"
                got, fix = f"one that does not import ({reason})", f'Install it anew: pip install -U "zsq[{extra}]".'
            raise BadInput(f"--target {target}", expected=f"the package {package}", got=got, fix=fix) from error


def _info(name: str, node: Any) -> Any:
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else "batch" for size in value.shape]
    return helper.make_tensor_value_info(name, FLOAT, shape)
