"""An exported ONNX file as a network that can be scored: the file itself runs, in its runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zsq.errors import BadInput, RunFailed
from zsq.onnx_session import FACTS, OnnxFile, open_file, session
from zsq.teachers import Teacher, make_teacher
from zsq.teachers.facts import read_facts


class OnnxModel(nn.Module):
    """Runs an ONNX file; no weights in torch, no gradients.

    Args:
        file: from `zsq.onnx_session.open_file`.
        runtime: ``"ort"`` or ``"openvino"``.
        threads: threads of one inference.

    Raises:
        BadInput: if the runtime is not installed, or refuses the file.
    """

    def __init__(self, file: OnnxFile, runtime: str = "ort", *, threads: int = 1) -> None:
        super().__init__()
        self.file = file
        self.runtime = runtime
        self._run = session(file, runtime, threads=threads)

    def forward(self, images: Tensor) -> Tensor:
        x = np.ascontiguousarray(images.detach().cpu().float().numpy())
        size = self.file.batch
        parts = [x] if size is None else [x[i : i + size] for i in range(0, len(x), size)]
        return torch.cat([self._part(part, size or len(part)) for part in parts]).to(images.device)

    def _part(self, x: np.ndarray, size: int) -> Tensor:
        """Run one batch; a file of fixed batch size gets the last one filled up with zeros."""
        count = len(x)
        if count < size:
            x = np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)])
        try:
            result = self._run(x)
        except Exception as error:  # both runtimes raise classes of their own
            reason = " ".join(str(error).split())[:300]
            raise RunFailed(f"{self.file.path.name} in {self.runtime}: {reason}") from error
        return torch.from_numpy(np.array(result[:count]))

    def extra_repr(self) -> str:
        return f"{self.file.path.name!r}, runtime={self.runtime!r}"


def load_onnx(
    path: Path | str, facts: Mapping[str, Any] | None = None, *, runtime: str = "ort", threads: int = 1
) -> Teacher:
    """Open an ONNX file as a network to score. It cannot be quantized: a decision page (ONNX teachers) says why.

    Args:
        path: the file.
        facts: what the user says, as for `zsq.teachers.load_teacher`; wins over the file's metadata.
        runtime: ``"ort"`` or ``"openvino"``.
        threads: threads of one inference.

    Returns:
        The network with its facts; ``fingerprint`` is the SHA-256 of the file.

    Raises:
        BadInput: if the file or the runtime cannot be used, or facts are missing or contradict the file.
    """
    if facts is not None and facts.get("weights") is not None:
        raise BadInput("--weights", expected="nothing for an ONNX file, which has its own", got=facts["weights"],
                       fix="Leave it out.")  # fmt: skip
    file = open_file(path)
    if file.outputs != 1:
        raise BadInput(str(file.path), expected="one output, the logits", got=f"{file.outputs} outputs",
                       fix="Export the network with its logits as the only output.")  # fmt: skip
    said = read_facts({key: value for key, value in (facts or {}).items() if key in FACTS})
    own = read_facts(file.facts, where=f"{file.path.name}: metadata")
    name = file.path.name
    model = make_teacher(OnnxModel(file, runtime, threads=threads), said.or_else(own), name=name)
    return replace(model, fingerprint=hashlib.sha256(file.path.read_bytes()).hexdigest())
