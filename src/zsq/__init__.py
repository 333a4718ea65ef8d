"""zsq: quantize a trained vision network to 2 to 8 bits without any data.

The names below are loaded on first use: `import zsq` does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BadInput": "zsq.errors",
    "RunFailed": "zsq.errors",
    "Interrupted": "zsq.errors",
    "ZsqError": "zsq.errors",
    "QuantSpec": "zsq.insert",
    "quantize": "zsq.insert",
    "quantized_weights": "zsq.insert",
    "GradientInundation": "zsq.inundation",
    "Run": "zsq.run",
    "Teacher": "zsq.teachers",
    "load_teacher": "zsq.teachers",
    "calibrate": "zsq.fit",
    "fit": "zsq.fit",
    "reconstruct": "zsq.reconstruction",
    "produce": "zsq.pipeline",
    "evaluate": "zsq.finished",
    "analyse": "zsq.analysis",
    "report": "zsq.reporting",
    "export": "zsq.export",
}

__all__ = ["__version__", "recipes", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("zsq.recipes")
    if name not in _HOME:
        raise AttributeError(f"module 'zsq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """This package: importing a submodule does not hide the public function of the same name (decision 0011)."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
