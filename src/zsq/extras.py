"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from zsq.errors import BadInput

INSTALL = 'pip install "zsq[eval]"'


def optional(module: str, package: str, what: str) -> Any:
    """Import a module of the [eval] extra.

    Args:
        module: what to import.
        package: what to install for it.
        what: what needs it, for the message.

    Raises:
        BadInput: if its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            what, expected=f"package {package}", got=f"{error}", fix=f"Install it with {INSTALL}."
        ) from error
