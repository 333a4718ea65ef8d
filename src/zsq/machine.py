"""What this machine is, for provenance: models, threads and versions; never a host name or a path."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy
import torch

from zsq import __version__


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
