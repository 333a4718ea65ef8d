"""Running an ONNX model in the runtime it is meant for, and counting what really runs on integers there."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor

from zsq.errors import BadInput

BATCH = 32
PIXELS = 32 * 224 * 224  # of a batch: a check keeps the values of every site in memory


def batch_of(images: Tensor) -> int:
    """How many images [n, c, h, w] are run at once: fewer of large ones."""
    return max(1, min(BATCH, PIXELS // max(images.shape[-2:].numel(), 1)))


class Compiled(NamedTuple):
    """What a runtime made of a model.

    Attributes:
        integer: number of convolutions that run on integers.
        floats: names of the others; of a BatchNorm behind it where the runtime forgot the convolution's.
        operators: number of operators by kind, with the arithmetic where the runtime tells it.
        version: of the runtime.
    """

    integer: int
    floats: tuple[str, ...]
    operators: dict[str, int]
    version: str


def ort_session(model: bytes, *, optimise: bool, dump: Path | None = None, threads: int | None = None) -> Any:
    """Load a model into ONNX Runtime on the CPU.

    Args:
        model: a serialised model.
        optimise: whether the runtime may rewrite the graph.
        dump: where to write the rewritten graph.
        threads: of one operator; torch's number if not given.

    Raises:
        BadInput: if the installed version cannot read the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns about the dump of a graph for one machine, which is what is wanted
    options.intra_op_num_threads = threads or torch.get_num_threads()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise _cannot_read(f"onnxruntime {ort.__version__}", "export", error) from error


def ort_run(session: Any, images: Tensor, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
    """Run a session on images of one batch."""
    feed = {session.get_inputs()[0].name: images.numpy()}
    return session.run(None if outputs is None else list(outputs), feed)


def ort_reads_int2() -> bool:
    """Whether the installed ONNX Runtime runs a convolution whose weight is stored with 2 bits."""
    from onnx import TensorProto, helper

    from zsq.export.builder import INT2, INT2_OPSET, IR_VERSION, pack

    if onnx.defs.onnx_opset_version() < INT2_OPSET:
        return False
    codes = np.array([[[[1]]], [[[-1]]]], dtype=np.int8)
    weight = TensorProto(name="w", dims=codes.shape, data_type=INT2, raw_data=pack(codes, 2))
    nodes = [helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), helper.make_node("Conv", ["x", "f"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 1, 1]) for n, c in (("x", 1), ("y", 2)))
    graph = helper.make_graph(nodes, "probe", [x], [y], [weight])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", INT2_OPSET)], ir_version=IR_VERSION[INT2_OPSET]
    )
    try:
        session = ort_session(model.SerializeToString(), optimise=True)
        return bool((ort_run(session, torch.ones(1, 1, 1, 1))[0].reshape(-1) == [1, -1]).all())
    except Exception:  # noqa: BLE001 - a probe: any failure means no
        return False


class OrtRunner:
    """A model in ONNX Runtime, optimised.

    Args:
        model: a serialised model.
        threads: of one operator; torch's number if not given.
    """

    def __init__(self, model: bytes, *, threads: int | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            dump = Path(folder) / "optimised.onnx"
            self.session = ort_session(model, optimise=True, dump=dump, threads=threads)
            self.nodes = [(node.op_type, node.name) for node in onnx.load(dump).graph.node]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(ort_run(self.session, part)[0]) for part in images.split(batch_of(images))])

    def compiled(self) -> Compiled:
        """What runs; a convolution the runtime could not make an integer one is a Conv or FusedConv."""
        import onnxruntime as ort

        operators = Counter(kind for kind, _ in self.nodes)
        floats = tuple(name for kind, name in self.nodes if kind in ("Conv", "FusedConv", "NhwcFusedConv"))
        version = f"onnxruntime {ort.__version__}"
        return Compiled(operators["QLinearConv"], floats, dict(sorted(operators.items())), version)


class OpenVinoRunner:
    """A model in OpenVINO on the CPU, parts in float computed in float32.

    Args:
        model: a serialised model.
        threads: of the inference; torch's number if not given.

    Raises:
        BadInput: if the installed version cannot read the model.
    """

    def __init__(self, model: bytes, *, threads: int | None = None) -> None:
        import openvino as ov

        self.version = f"openvino {ov.__version__.split('-')[0]}"
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        try:
            core = ov.Core()
            self.network = core.compile_model(core.read_model(model), "CPU", options)
        except RuntimeError as error:
            raise _cannot_read(self.version, "openvino", error) from error

    def __call__(self, images: Tensor) -> Tensor:
        parts = images.split(batch_of(images))
        return torch.cat([torch.from_numpy(self.network([part.numpy()])[0].copy()) for part in parts])

    def compiled(self) -> Compiled:
        """What runs, read off the kernel names of the compiled network."""
        operators: Counter[str] = Counter()
        integer, floats = 0, []
        for node in self.network.get_runtime_model().get_ops():
            info = node.get_rt_info()
            keys = ("layerType", "primitiveType", "originalLayersNames")
            kind, kernel, names = (str(info[key].astype(str)) if key in info else "" for key in keys)
            operators[f"{kind} {kernel.rpartition('_')[2]}".strip()] += 1
            if kind == "Convolution" and kernel.endswith("_I8"):
                integer += 1
            elif kind == "Convolution":
                own = [name for name in names.split(",") if not name.startswith("Multiply_")] or names.split(",")
                floats.append(own[0].removesuffix("/WithoutBiases"))
        return Compiled(integer, tuple(floats[::-1]), dict(sorted(operators.items())), self.version)


def _cannot_read(runtime: str, extra: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())[:300]
    return BadInput(runtime, expected="a version that reads the exported file (opset 21, packed 4-bit weights)",
                    got=reason, fix=f'Upgrade it: pip install -U "zsq[{extra}]".')  # fmt: skip
