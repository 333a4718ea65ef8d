"""Instruments that explain a finished run: gradient cosine, Hessian trace, loss surface, flips of integer weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from zsq.analysis.subject import Subject
    from zsq.run.progress import Progress

INSTRUMENTS = ("cosine", "trace", "landscape", "flips")


@dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        count: images per arm.
        batch: images per batch of the cosine, which is averaged over batches.
        probes: of the Hessian trace, at most.
        moments: snapshots at which the trace is taken, evenly spaced with first and last; None for all.
        points: of the loss surface, per side.
        lines: directions of the one-dimensional slices.
    """

    count: int
    batch: int
    probes: int
    moments: int | None
    points: int
    lines: int


PRESETS = {
    "quick": Effort(count=128, batch=32, probes=20, moments=2, points=11, lines=5),
    "full": Effort(count=1024, batch=64, probes=100, moments=None, points=51, lines=5),
}


class Result(Protocol):
    """What an instrument gives back."""

    def table(self) -> dict[str, Any]:
        """The few numbers to print."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""


def analyse(
    run: Path | str,
    *,
    what: str = "all",
    images: str | None = None,
    preset: str = "quick",
    count: int | None = None,
    probes: int | None = None,
    points: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a finished run; write ANALYSIS.json with the raw values and ANALYSIS.png into its folder ``analysis``.

    Args:
        run: the run directory.
        what: cosine, trace, landscape, flips or all.
        images: real images as a control arm beside the run's synthetic ones: a DATA string such as npz:FILE[a:b]. Only
            pixels are read; their labels are what the teacher says.
        preset: quick (minutes on a CPU) or full (a GPU job).
        count: images per arm; the preset's if not given.
        probes: probes of the Hessian trace, at most; the preset's if not given.
        points: points per side of the loss surface, odd; the preset's if not given.
        device: where to compute.
        progress: show progress on standard error.

    Returns:
        Per instrument its key numbers, ``file`` and ``figure``; or ``skipped`` with the reason.

    Raises:
        BadInput: for a run that is not finished or has no history (flips), numbers out of range, or if matplotlib is
            not installed.
    """
    from dataclasses import replace

    from zsq.analysis.figures import require_matplotlib
    from zsq.analysis.subject import history_files, open_subject
    from zsq.errors import BadInput
    from zsq.presets import choose
    from zsq.run.progress import progress as make_progress

    path = Path(run)
    names = INSTRUMENTS if what == "all" else (choose("--what", what, {name: name for name in INSTRUMENTS}),)
    given = {"count": count, "probes": probes, "points": points}
    effort = replace(choose("--preset", preset, PRESETS), **{k: v for k, v in given.items() if v is not None})
    _check(effort)
    require_matplotlib()
    subject = open_subject(path, images=images, count=effort.count, device=device)
    shown, results = make_progress(enabled=progress), {}
    try:
        for name in names:
            if name == "flips" and what == "all" and not history_files(path):
                results[name] = {"skipped": "the run has no history"}
                continue
            results[name] = _measure(name, subject, effort, shown)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadInput(str(path / "analysis"), expected="a folder that can be written", got=reason,
                       fix="Make room, or copy the run elsewhere.") from error  # fmt: skip
    finally:
        shown.stop()
    return results


def _measure(name: str, subject: Subject, effort: Effort, shown: Progress) -> dict[str, Any]:
    """Run one instrument, write its file, draw its figure from that file."""
    from zsq.analysis.cosine import cosine
    from zsq.analysis.figures import draw
    from zsq.analysis.flips import flips
    from zsq.analysis.landscape import landscape
    from zsq.analysis.trace import trace
    from zsq.checkpoint import read_json, write_json_atomic

    tools: dict[str, Callable[[], Result]] = {
        "cosine": lambda: cosine(subject, batch=effort.batch, shown=shown),
        "trace": lambda: trace(subject, probes=effort.probes, moments=effort.moments, shown=shown),
        "landscape": lambda: landscape(subject, points=effort.points, lines=effort.lines, shown=shown),
        "flips": lambda: flips(subject, shown=shown),
    }
    result = tools[name]()
    shown.stop()
    folder = subject.path / "analysis"
    folder.mkdir(exist_ok=True)
    file, figure = folder / f"{name}.json", folder / f"{name}.png"
    write_json_atomic(file, {"instrument": name, "run": subject.path.name, **subject.facts(), **result.to_json()})
    draw(read_json(file), figure)
    return {**result.table(), "file": str(file), "figure": str(figure)}


def _check(effort: Effort) -> None:
    from zsq.errors import BadInput

    if effort.count < 1:
        raise BadInput("--count", expected="at least 1 image", got=effort.count, fix="Leave it out for the preset's.")
    if effort.probes < 2:
        raise BadInput("--probes", expected="at least 2 (a standard error needs two)", got=effort.probes,
                       fix="20 give an error of some percent.")  # fmt: skip
    if effort.points < 3 or effort.points % 2 == 0:
        raise BadInput("--points", expected="an odd number from 3, so that the centre is one of them",
                       got=effort.points, fix="For example 11.")  # fmt: skip
