"""Figures of several runs side by side, drawn from a collected result file alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from zsq.analysis.figures import LOSSES, require_matplotlib
from zsq.checkpoint import write_atomic

Record = dict[str, Any]


def draw_comparison(instrument: str, cells: Sequence[Record], path: Path) -> None:
    """Draw what one instrument says of several runs.

    Args:
        instrument: cosine, trace, landscape or flips.
        cells: per run ``method``, ``bits``, ``seed`` and the result file of the instrument under its name. Methods
            named "FAMILY, ARM" share a row of panels per family and bits, with one line per arm.
        path: the PNG.

    Raises:
        BadInput: if matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    painters: dict[str, tuple[int, Callable[[Any, str, Record], None]]] = {
        "flips": (2, _flips), "cosine": (2, _cosine), "trace": (2, _trace), "landscape": (2, _landscape),
    }  # fmt: skip
    columns, paint = painters[instrument]
    rows = list(_rows(cells))
    figure = Figure(figsize=(4.6 * columns, 2.9 * len(rows)), layout="constrained")
    for axes, (title, arms) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for arm, cell in arms:
            paint(axes, arm, cell[instrument])
        for ax in axes:
            ax.set_title(f"{title}: {ax.get_title()}", fontsize=8)
            ax.legend(fontsize=6)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=90)
    write_atomic(path, data.getvalue())


def _rows(cells: Sequence[Record]) -> Iterator[tuple[str, list[tuple[str, Record]]]]:
    """Cells by family and bits."""
    groups: dict[str, list[tuple[str, Record]]] = {}
    several = len({cell["seed"] for cell in cells}) > 1
    for cell in cells:
        family, comma, arm = cell["method"].rpartition(", ")
        title = f"{family} {cell['bits']}" if comma else cell["bits"]
        groups.setdefault(title, []).append((f"{arm}, seed {cell['seed']}" if several else arm, cell))
    yield from groups.items()


def _flips(axes: Any, arm: str, record: Record) -> None:
    """Share of codes changed per layer, own grid, in the first and the last interval."""
    steps = record["steps"]
    floor = 0.5 / max(layer["size"] for layer in record["layers"])
    for ax, i in zip(axes, (0, len(steps) - 2), strict=True):
        ax.plot([max(layer["own_grid"][i], floor) for layer in record["layers"]], marker=".", label=arm)
        ax.set(yscale="log", ylim=(floor / 2, 1), xlabel="layer", ylabel="share of codes changed",
               title=f"steps {steps[i]} to {steps[i + 1]}")  # fmt: skip


def _cosine(axes: Any, arm: str, record: Record) -> None:
    """Over training, and per layer at the end; first the labels that count."""
    over, layers = axes
    steps = [0 if step is None else step for step in record["steps"]]
    first = record["curves"][0]["labels"]
    for curve in (curve for curve in record["curves"] if curve["labels"] == first):
        label = f"{arm}, T={curve['temperature']:g}"
        known = [[value for value in row if value is not None] for row in curve["values"]]
        (line,) = over.plot(
            steps, [sum(row) / len(row) if row else float("nan") for row in known], marker=".", label=label
        )
        last = [values[-1] for values in curve["layers"].values()]
        layers.plot([float("nan") if value is None else value for value in last], marker=".", label=label,
                    color=line.get_color())  # fmt: skip
    for ax in axes:
        ax.axhline(0, color="0.5", lw=0.8)
    over.set(xlabel="student updates", ylabel="cosine of CE and KL gradients", ylim=(-1.05, 1.05), title=first)
    layers.set(xlabel="layer", ylim=(-1.05, 1.05), title="last snapshot")


def _trace(axes: Any, arm: str, record: Record) -> None:
    """Traces of the losses in their scalings at the end, with standard errors; and divided by the loss."""
    kinds = next(iter(record["arms"].values()))
    last = [values[-1] for values in kinds.values()]
    names = [LOSSES[kind][0].replace(", ", ",\n") for kind in kinds]
    errors = [value["stderr"] if isinstance(value["stderr"], float) else 0.0 for value in last]
    axes[0].errorbar(names, [value["trace"] for value in last], errors, fmt="o", capsize=3, label=arm)
    axes[1].plot(names, [value["trace_over_loss"] or float("nan") for value in last], "o", label=arm)
    axes[0].set(yscale="symlog", ylabel="trace of the Hessian", title="end of the run")
    axes[1].set(yscale="symlog", ylabel="trace over loss", title="end of the run")


def _landscape(axes: Any, arm: str, record: Record) -> None:
    """Rise of CE and batch-mean KL along the lines, mean over the directions, in mode dequant."""
    at = record["coordinates"]
    surface = next(s for s in record["surfaces"] if s["mode"] == "dequant")
    for ax, kind in zip(axes, ("ce", "kl"), strict=True):
        lines = surface["lines"][kind]
        mean = [sum(values) / len(values) - surface["centre"][kind] for values in zip(*lines, strict=True)]
        ax.plot(at, mean, marker=".", label=arm)
        ax.set(xlabel="norms of each filter", ylabel="loss minus centre", title=kind.upper())
