"""The float network as ONNX: what an exported student is compared with in size and speed."""

from __future__ import annotations

from pathlib import Path

import torch

from zsq.checkpoint import write_atomic
from zsq.export.frozen import record
from zsq.export.onnx_file import build
from zsq.teachers import Teacher


def float_onnx(teacher: Teacher, path: Path | str) -> int:
    """Write a teacher as a float32 ONNX file with a free batch size; BatchNorm stays an operator, which runtimes fold.

    Args:
        teacher: the float network.
        path: the file.

    Returns:
        Its size in bytes.

    Raises:
        BadInput: naming an operator that has no translation, or if the file cannot be written.
    """
    data = float_bytes(teacher)
    write_atomic(Path(path), data)
    return len(data)


def float_bytes(teacher: Teacher) -> bytes:
    """A teacher as a serialised float32 ONNX model."""
    device = teacher.device
    try:
        program = record(teacher.net.cpu(), torch.zeros(2, *teacher.image))
    finally:
        teacher.net.to(device)
    return build(program, None, teacher).proto.SerializeToString()
