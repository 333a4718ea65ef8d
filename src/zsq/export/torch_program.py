"""A student as a torch.export program (.pt2): standard quantize/dequantize operators, weights as int8 codes.

Loading needs torch alone and one import, which registers those operators::

    import torch
    import torch.ao.quantization.fx._decomposed
    net = torch.export.load("net.pt2").module()

`load` does the same. torch computes such a program in float32, also where every operand is on a grid; an integer
backend (ExecuTorch, X86Inductor) lowers the patterns dequantize - operation - quantize to its own kernels.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.checkpoint import write_atomic
from zsq.errors import BadInput, RunFailed
from zsq.export.inputs import of_the_networks_size
from zsq.export.torch_check import compare_sites
from zsq.export.torch_graph import float_layers, logit_step, lowerable
from zsq.export.torch_modules import StoredWeight, stored_weights, swap_sites
from zsq.insert.access import freeze_ranges
from zsq.tasks import Task
from zsq.teachers import Teacher
from zsq.teachers.weight_files import named_tensors

OPERATORS = "torch.ao.quantization.fx._decomposed"  # importing it registers the operators; nothing else is used of it
FACTS = "zsq.json"  # name of the extra file inside the program with mean, std, classes ...
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
BATCH = 64
LARGEST_DRIFT = 1e-4  # of the largest logit: program against what was exported, median of a batch


class Program(nn.Module):
    """A program that can be used like any network: torch's own refuses ``eval()``.

    Args:
        module: of an exported program.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # not as a child: eval() and train() would reach it

    def forward(self, x: Tensor) -> Tensor:
        return self._module[0](x)


def write(student: nn.Module, teacher: Teacher, images: Tensor, path: Path | str) -> dict[str, Any]:
    """Write a student as a torch.export program, read it back and compare it with the student.

    Args:
        student: a calibrated or trained student; it is left as it was.
        teacher: the network it was made from; for its facts and its size.
        images: what to compare on, shape [n, c, h, w], normalised; brought to the network's size.
        path: the file, usually .pt2; an existing one is replaced only by a program that passed the comparison.

    Returns:
        ``agreement`` (share of equal decisions), ``max_difference`` (largest difference of a logit), ``max_lsb`` (the
        same in steps of the logits' grid, None if they are on none), ``site_max_lsb`` and ``site_share_off`` (each site
        alone, given the student's inputs: at most one step, at most 1 % of the values), ``size_ratio`` (bytes of the
        float weights / ``bytes``), ``integer_weights``, ``float_weights``, ``lowerable_conv_share`` (layers between
        integer operands, which a backend can lower) and ``integer_conv_share`` (0: torch itself computes in float32).

    Raises:
        BadInput: if the network has an operation that torch.export cannot follow, a range that depends on each input,
            or if the file cannot be written.
        RunFailed: if the program read back differs from the student; no file is left.
    """
    path = Path(path)
    _check_target(path)
    images = of_the_networks_size(images, teacher)
    reference = copy.deepcopy(student).cpu().eval()
    freeze_ranges(reference)
    twin, weights = _twin(reference, images)
    layerwise = compare_sites(reference, twin, images)
    layerwise.require()
    program = _export(twin, images)
    _prune(program)
    data = _serialise(program, teacher)
    agreement, difference = _compare(_read(io.BytesIO(data)), twin, reference, images, teacher.outputs)
    write_atomic(path, data)
    lsb = logit_step(program)
    float_bytes = sum(value.numel() * value.element_size() for value in named_tensors(teacher.net).values())
    return {
        "target": "torch",
        "file": path.name,
        "agreement": agreement,
        "images": len(images),
        "max_difference": difference,
        "max_lsb": None if lsb is None else round(difference / lsb),
        "site_max_lsb": layerwise.max_lsb,
        "site_share_off": layerwise.share_off,
        "bytes": len(data),
        "float_bytes": float_bytes,
        "size_ratio": float_bytes / len(data),
        "integer_weights": len(weights),
        "float_weights": float_layers(program),
        "integer_conv_share": 0.0,
        "lowerable_conv_share": lowerable(program),
        "runtime": f"torch {torch.__version__}",
    }


def load(path: Path | str) -> nn.Module:
    """Read a program that `write` wrote.

    Args:
        path: the file.

    Returns:
        A module from [b, c, h, w] to logits, any batch size; forward only, in float32, on the CPU.

    Raises:
        BadInput: if the file is missing or is no such program.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(str(path), expected="a .pt2 file", got="no such file", fix="Check the path.")
    return Program(_read(path))


def register_operators() -> None:
    """Make the quantize/dequantize operators known to torch.

    Raises:
        BadInput: if this version of torch keeps them elsewhere.
    """
    try:
        importlib.import_module(OPERATORS)
    except ImportError as error:
        raise BadInput("torch", expected=f"a version with {OPERATORS}", got=torch.__version__,
                       fix="Install torch>=2.8,<3.") from error  # fmt: skip


def _check_target(path: Path) -> None:
    """Refuse a path that cannot be written before the work begins."""
    got = ""
    if path.is_dir():
        got = "a folder"
    elif not path.parent.is_dir():
        got = "a folder that does not exist"
    elif not os.access(path.parent, os.W_OK):
        got = "a folder without permission to write"
    if got:
        raise BadInput(str(path), expected="a file in a folder to write to", got=got, fix="Choose another --output.")


def _read(source: Path | io.BytesIO) -> nn.Module:
    register_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        try:
            return torch.export.load(source).module()
        except Exception as error:  # what a damaged archive raises depends on where it is damaged
            name = str(source) if isinstance(source, Path) else "the program"
            raise BadInput(name, expected="a torch.export program", got=f"{type(error).__name__}: {_line(error)}",
                           fix="Write it again with `zsq export RUN --target torch`.") from error  # fmt: skip


def _twin(reference: nn.Module, images: Tensor) -> tuple[nn.Module, dict[str, StoredWeight]]:
    """Copy the student, its sites and weights made of the standard operators."""
    register_operators()
    twin = copy.deepcopy(reference)
    weights = stored_weights(twin, images[:2])
    swap_sites(twin)
    return twin, weights


def _export(twin: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations
        try:
            batch = torch.export.Dim("batch", min=1)
            return torch.export.export(twin, (example,), dynamic_shapes=({0: batch},), strict=False)
        except Exception as error:  # the network's own code runs here and may raise anything
            raise BadInput(
                str(getattr(twin, "_name", "network")),
                expected="operations that torch.export can follow for any batch size",
                got=f"{type(error).__name__}: {_line(error)}",
                fix="Rewrite that line of the network, or export with --target ort.",
            ) from error  # fmt: skip


def _prune(program: torch.export.ExportedProgram) -> None:
    """Drop the latent weights, folded BatchNorms and averages that nothing reads, and where the code lay on disk."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    unused = {node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users}
    specs = program.graph_signature.input_specs
    kept = [spec for spec in specs if spec.arg.name not in unused or spec.kind.name == "USER_INPUT"]
    for spec in specs:
        if spec not in kept:
            graph.erase_node(unused[spec.arg.name])
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_signature.input_specs = kept
    for node in graph.nodes:
        for key in _ORIGIN:
            node.meta.pop(key, None)
    program.graph_module.recompile()


def _serialise(program: torch.export.ExportedProgram, teacher: Teacher) -> bytes:
    names = ("task", "classes", "image", "mean", "std", "channels", "resize", "crop")
    facts = {name: getattr(teacher, name) for name in names}
    program.example_inputs = None  # an image or two would go into every file
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    return buffer.getvalue()


def _compare(
    program: nn.Module, twin: nn.Module, student: nn.Module, images: Tensor, task: Task
) -> tuple[float, float]:
    """Agreement and largest difference of program and student.

    Raises:
        RunFailed: if the program is not what was exported.
    """
    same, worst, drift = [], [], []
    with torch.no_grad():
        for part in images.split(BATCH):
            ours, before, theirs = student(part), twin(part), program(part)
            drift.append((before - theirs).abs().flatten(1).amax(1) / before.abs().amax().clamp_min(1e-12))
            worst.append((ours - theirs).abs().amax())
            ours, theirs = (task.parts(raw).get("class", raw).argmax(1) for raw in (ours, theirs))
            same.append((ours == theirs).double().reshape(len(part), -1).mean(1))
        drift.append((twin(images[:1]) - program(images[:1])).abs().flatten(1).amax(1))  # any batch size must work
    median = float(torch.cat(drift).median())  # NaN if there is one
    if not median <= LARGEST_DRIFT:
        raise RunFailed(
            f"export: expected the program to compute what was exported, got a difference of {median:.2g} of the"
            " largest logit when read back. No file was written."
        )
    return float(torch.cat(same).mean()), float(torch.stack(worst).max())


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else "no message"
