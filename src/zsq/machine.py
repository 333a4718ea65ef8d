"""What this machine is, for provenance: models, threads and versions; never a host name or a path."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Literal

import numpy
import torch

from zsq import __version__
from zsq.errors import BadInput


def describe_device(device: torch.device | str) -> str:
    """The device in words, e.g. ``"cpu (AMD EPYC, 2 threads)"``."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({cpu_model()}, {threads} thread{'s' if threads > 1 else ''})"


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    return {
        "zsq": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """Name of the processor."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def choose_precision(asked: str, device: torch.device, *, begun: Path | None = None) -> Literal["bf16", "float32"]:
    """What to multiply in while training.

    Args:
        asked: bf16, float32, or auto: bf16 where matrix products in bfloat16 are at least a quarter faster, measured
            here and now. Without a matrix unit some processors multiply bfloat16 at half the rate of float32.
        device: where.
        begun: config.json of the run that goes on; auto then keeps what that run began with.

    Raises:
        BadInput: anything else was asked for.
    """
    if asked not in ("auto", "bf16", "float32"):
        raise BadInput("--precision", expected="auto, bf16 or float32", got=repr(asked), fix="Choose one of the three.")
    if asked == "auto" and begun is not None and begun.exists():
        before = json.loads(begun.read_text(encoding="utf-8"))
        asked = before.get("config", {}).get("precision", "auto") if isinstance(before, dict) else "auto"
    if asked == "auto":
        half, whole = (matrix_rate(kind, device) for kind in (torch.bfloat16, torch.float32))
        return "bf16" if half >= 1.25 * whole else "float32"
    return "float32" if asked == "float32" else "bf16"


def matrix_rate(dtype: torch.dtype, device: torch.device, *, size: int = 1024, tries: int = 3) -> float:
    """Operations per second of a matrix product, the best of a few tries.

    Args:
        dtype: of the factors.
        device: where.
        size: rows and columns.
        tries: how often.
    """
    a, times = torch.randn(size, size, device=device).to(dtype), []
    for _ in range(tries + 1):  # the first one compiles and allocates
        begun = _seconds(device)
        torch.mm(a, a)
        times.append(_seconds(device) - begun)
    return 2 * size**3 / max(min(times[1:]), 1e-9)


def _seconds(device: torch.device) -> float:
    """Of this thread, or of the wall once a device has finished: other jobs must not decide."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def has_vnni() -> bool | None:
    """Whether the processor multiplies 8-bit integers at full speed; None where the system does not say."""
    flags = _cpu_field("flags")
    return None if flags is None else bool({"avx512_vnni", "avx_vnni"} & set(flags.split()))


def _cpu_field(name: str) -> str | None:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(name):
                return " ".join(line.partition(":")[2].split())
    return None
