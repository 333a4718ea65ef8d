"""An ONNX file as it lies on disk: its one input, the facts in its metadata, and a session that runs it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zsq.errors import BadInput

RUNTIMES = {"ort": "onnxruntime", "openvino": "openvino"}  # name on the command line -> package
Run = Callable[[np.ndarray], np.ndarray]
PREFIX = "zsq."
FACTS = ("task", "classes", "image", "mean", "std", "channels", "resize", "crop")
INSTALL = {
    "onnx": 'pip install "zsq[export]"', "onnxruntime": 'pip install "zsq[export]"',
    "openvino": 'pip install "zsq[openvino]"',
}  # fmt: skip


@dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file says about itself.

    Attributes:
        path: the file.
        input: name of its only input, float32.
        shape: of the input; None where it is free.
        output: name of its first output.
        outputs: number of outputs.
        metadata: what the exporter wrote about the network: mean, std, labels ...; by name without the prefix ``zsq.``.
    """

    path: Path
    input: str
    shape: tuple[int | None, ...]
    output: str
    outputs: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the network as `read_facts` takes them; the image shape from the input if it is fixed."""
        said = {key: self.metadata[key] for key in FACTS if self.metadata.get(key) is not None}
        if "image" not in said and len(self.shape) == 4 and None not in self.shape[1:]:
            said["image"] = list(self.shape[1:])
        return said

    @property
    def batch(self) -> int | None:
        """Batch size the file is fixed to, or None."""
        return self.shape[0] if self.shape else None


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        BadInput: naming the pip command, if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"package {name}", expected="it to be installed", got=str(error),
                       fix=f"Install it with {INSTALL[name]}.") from error  # fmt: skip


def open_file(path: Path | str) -> OnnxFile:
    """Read what an ONNX file says about itself.

    Args:
        path: the file.

    Raises:
        BadInput: if it is missing or damaged, has other than one float32 input, or no output.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(str(path), expected="an .onnx file", got="no such file", fix="Check the path.")
    onnx = package("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise BadInput(str(path), expected="an ONNX model", got=_line(error),
                       fix="Export it again, or copy it again if a copy was cut short.") from error  # fmt: skip
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT or not model.graph.output:
        got = ", ".join(value.name for value in inputs) or "none"
        raise BadInput(str(path), expected="one float32 input, the images, and an output", got=f"inputs {got}",
                       fix="Export the network with the images as its only input.") from None  # fmt: skip
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in inputs[0].type.tensor_type.shape.dim)
    outputs = model.graph.output
    return OnnxFile(path, inputs[0].name, shape, outputs[0].name, len(outputs), _metadata(model))


def session(file: OnnxFile, runtime: str, *, threads: int = 1, precision: str = "f32") -> Run:
    """Open a file in a runtime, with all of its optimisations.

    Args:
        file: from `open_file`.
        runtime: ``"ort"`` (ONNX Runtime) or ``"openvino"``, on the CPU.
        threads: threads of one inference.
        precision: of what stays float in OpenVINO, ``"f32"`` or ``"bf16"``; ONNX Runtime computes in float32.

    Returns:
        A function from an array [b, c, h, w] to the first output.

    Raises:
        BadInput: if the runtime is not installed, or refuses the file.
    """
    module = package(_package_of(runtime))
    try:
        if runtime == "ort":
            return _ort(module, file, threads)
        return _openvino(module, file, threads, precision)
    except Exception as error:  # both runtimes raise classes of their own for what they cannot run
        raise BadInput(
            str(file.path), expected=f"a model that {runtime_version(runtime)} can run", got=_line(error),
            fix="Try the other runtime, export for this one (zsq export --target), or install a newer version of it.",
        ) from error  # fmt: skip


def runtime_version(runtime: str) -> str:
    """Name and version of a runtime, e.g. ``"onnxruntime 1.31.1"``."""
    module = package(_package_of(runtime))
    return f"{module.__name__} {module.__version__.split('-')[0]}"


def _package_of(runtime: str) -> str:
    if runtime not in RUNTIMES:
        raise BadInput("runtime", expected=" or ".join(RUNTIMES), got=repr(runtime), fix="Choose one of these.")
    return RUNTIMES[runtime]


def _ort(module: Any, file: OnnxFile, threads: int) -> Run:
    options = module.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised
    session = module.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    outputs = [file.output]

    def run(x: np.ndarray) -> np.ndarray:
        return session.run(outputs, {file.input: x})[0]

    return run


def _openvino(module: Any, file: OnnxFile, threads: int, precision: str) -> Run:
    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    compiled = module.Core().compile_model(str(file.path), "CPU", settings)
    request = compiled.create_infer_request()
    output = compiled.outputs[0]

    def run(x: np.ndarray) -> np.ndarray:
        # Not share_outputs: the array would change with the next call.
        return request.infer([x], share_inputs=True)[output]

    return run


def _metadata(model: Any) -> dict[str, Any]:
    """Properties of a file that zsq wrote; those of other programs only if they carry our prefix."""
    ours = model.producer_name == "zsq"
    found = {}
    for prop in model.metadata_props:
        if prop.key.startswith(PREFIX) or ours:
            try:
                value = json.loads(prop.value)
            except ValueError:
                value = prop.value
            found[prop.key.removeprefix(PREFIX)] = value
    return found


def _line(error: Exception) -> str:
    """The message in one line, without the places in a runtime's own source."""
    text = re.sub(r"(?:Exception from|Check '.*?' failed at) \S+:\d+:", "", str(error))
    return " ".join(text.split())[:300] or type(error).__name__
