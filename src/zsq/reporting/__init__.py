"""A finished run as one self-contained HTML page to read and to send on.

import zsq
zsq.report("runs/NAME")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def report(
    run: Path | str,
    *,
    output: Path | str | None = None,
    count: int | None = None,
    sensitivity: bool = True,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Write ``report.html`` into a finished run.

    Args:
        run: the run directory.
        output: the page; ``report.html`` in the run directory if not given.
        count: images that the sensitivity of single layers is measured on; chosen by the size of the network (at most
            128) if not given.
        sensitivity: measure it: one forward over these images per quantizer.
        device: where to compute.
        progress: show progress on standard error.

    Returns:
        What the page says, as plain data (see `zsq.reporting.facts.Facts`), and ``file`` and ``verdict``.

    Raises:
        BadInput: for a run that is not finished, damaged files, a count below 1, a missing package, or a page that
            cannot be written.
    """
    from zsq.checkpoint import write_atomic
    from zsq.errors import BadInput
    from zsq.reporting.facts import collect
    from zsq.reporting.page import render, require_packages
    from zsq.reporting.words import verdict
    from zsq.run.progress import progress as make_progress

    path = Path(run)
    page = path / "report.html" if output is None else Path(output)
    if count is not None and count < 1:
        raise BadInput("--count", expected="at least 1 image", got=count, fix="Leave it out for a default.")
    if output is not None and (page.is_dir() or not page.parent.is_dir()):
        raise BadInput("--output", expected="a file in an existing folder", got=str(page), fix="Make the folder.")
    require_packages()
    shown = make_progress(enabled=progress)
    try:
        facts, *pictures = collect(path, count=count, with_sensitivity=sensitivity, device=device, shown=shown)
        write_atomic(page, render(path, facts, *pictures).encode())
    finally:
        shown.stop()
    return {"file": str(page), "verdict": verdict(facts), **facts.to_json()}
