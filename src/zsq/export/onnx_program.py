"""Targets `ort` and `openvino`: write a student as one ONNX file, prove it in the runtime, or leave no file."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.checkpoint import TEMPORARY
from zsq.errors import BadInput
from zsq.export import verify
from zsq.export.float_model import float_bytes
from zsq.export.frozen import freeze
from zsq.export.inputs import of_the_networks_size
from zsq.export.onnx_file import build
from zsq.export.runtimes import OpenVinoRunner, OrtRunner, batch_of, ort_reads_int2
from zsq.insert.access import freeze_ranges
from zsq.teachers import Teacher


def write(
    student: nn.Module,
    teacher: Teacher,
    images: Tensor,
    path: Path | str,
    *,
    target: str = "ort",
    facts: dict[str, Any] | None = None,
    least_agreement: float = verify.LEAST_AGREEMENT,
) -> dict[str, Any]:
    """Write a student as ONNX with packed low-bit weights, run the file, and compare it with the student.

    Args:
        student: calibrated or trained; it is left as it was.
        teacher: the network it was made from; for its facts and its size.
        images: what to compare on, shape [n, c, h, w], normalised; brought to the network's size.
        path: the file; an existing one is replaced only by a file that passed the comparison.
        target: ort or openvino: whose rules the file follows, and where it is checked.
        facts: further metadata.
        least_agreement: share of equal decisions below which the file is refused.

    Returns:
        ``agreement``, ``max_logit_difference``, ``max_lsb`` (largest difference of a code, site by site),
        ``lsb_share`` (of the codes that differ), ``lsb`` (per site), ``integer_conv_share``, ``convolutions``,
        ``size_ratio``, ``bytes``, ``float_bytes``, ``opset``, ``images``, ``float_convolutions`` (names),
        ``operators``, ``runtime``.

    Raises:
        BadInput: for an operator without a translation, a file that cannot be written, a runtime too old for it.
        RunFailed: if the file differs from the student by more than the tolerance; no file is left.
    """
    path = Path(path)
    temporary = reserve(path)
    try:
        images = of_the_networks_size(images, teacher)
        images = images if len(images) > 1 else images.repeat(2, 1, 1, 1)
        reference = copy.deepcopy(student).cpu().eval()
        freeze_ranges(reference)
        frozen = freeze(reference, images)
        model = build(
            frozen.program, frozen, teacher, int2=target == "ort" and ort_reads_int2(),
            keep_rounding=target == "openvino", extra=(facts or {}) | {"target": target},
        )  # fmt: skip
        write_bytes(temporary, model.proto.SerializeToString())

        some = images[: min(verify.LAYER_IMAGES, batch_of(images))]
        inputs = torch.cat([some, verify.range_noise(frozen.sites, some, max(2, len(some) // 4))])
        layers = verify.layerwise(model, reference, frozen.sites, inputs)
        verify.require_layerwise(layers, path.name)
        runner = (OrtRunner if target == "ort" else OpenVinoRunner)(temporary.read_bytes())
        compiled = runner.compiled()
        agreement, difference = verify.decisions(runner, reference, images, teacher.outputs)
        verify.require_agreement(agreement, least_agreement, path.name, compiled.version)
        float_size = len(float_bytes(teacher))
        size_bytes = temporary.stat().st_size
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    names = [node.name for node in model.proto.graph.node if node.op_type == "Conv"]
    share = compiled.integer / len(names) if names else 1.0
    floats = list(compiled.floats) if compiled.integer else names
    return {
        "target": target, "file": path.name, "agreement": agreement, "max_lsb": layers.worst[1],
        "integer_conv_share": share, "size_ratio": float_size / size_bytes, "lsb_share": layers.share,
        "max_logit_difference": difference, "convolutions": len(names), "bytes": size_bytes,
        "float_bytes": float_size, "opset": model.proto.opset_import[0].version, "images": len(images),
        "float_convolutions": floats, "lsb": layers.lsb, "operators": compiled.operators, "runtime": compiled.version,
    }  # fmt: skip


def reserve(path: Path) -> Path:
    """Check that a file can be written, before any work; gives the temporary name beside it.

    Raises:
        BadInput: if the folder is missing or refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    if path.is_dir():
        raise _refused(path, "a folder")
    write_bytes(temporary, b"")
    return temporary


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and see it onto the disk.

    Raises:
        BadInput: if the file system refuses.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise _refused(path, (error.strerror or str(error)).lower()) from error


def replace(temporary: Path, path: Path) -> None:
    """Give a finished file its name.

    Raises:
        BadInput: if the file system refuses.
    """
    try:
        temporary.replace(path)
    except OSError as error:
        raise _refused(path, (error.strerror or str(error)).lower()) from error


def _refused(path: Path, got: str) -> BadInput:
    return BadInput(str(path.parent), expected="a folder in which the exported file can be written", got=got,
                    fix="Choose another --output.")  # fmt: skip
