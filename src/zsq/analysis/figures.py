"""Figures of the instruments, drawn from their result files alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from zsq.checkpoint import write_atomic
from zsq.errors import BadInput

INSTALL = 'pip install "zsq[report]"'
# Losses of the traces in words, and how their lines are drawn: those of CE and of KL at T = 1 often coincide.
LOSSES = {"ce": ("CE", "--"), "kl_as_trained": ("KL as trained", "-"), "kl_batchmean": ("KL, batch mean", "-"),
          "kl_t1": ("KL, batch mean, T=1", "-")}  # fmt: skip
Record = dict[str, Any]


def require_matplotlib() -> None:
    """Say how to install what draws, before anything is computed.

    Raises:
        BadInput: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("figures", expected="matplotlib", got="not installed", fix=f"Install it: {INSTALL}.")


def draw(record: Record, path: Path) -> None:
    """Draw the figure of a result file.

    Args:
        record: contents of RUN/analysis/NAME.json.
        path: the PNG.

    Raises:
        BadInput: if matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    makers: dict[str, Callable[[Record], Any]] = {
        "cosine": _cosine, "trace": _trace, "landscape": _landscape, "flips": _flips,
    }  # fmt: skip
    figure = makers[record["instrument"]](record)
    figure.suptitle(f"{record['run']}: {record['instrument']}", fontsize=10)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=110)
    write_atomic(path, data.getvalue())


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _steps(record: Record) -> list[int]:
    return [0 if step is None else step for step in record["steps"]]


def _known(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _cosine(record: Record) -> Any:
    """Left: over training, mean and 10 to 90 % band over batches. Right: per layer at the end."""
    import numpy as np

    figure, axes = _figure(1, 2)
    over, layers = axes[0]
    steps = _steps(record)
    for curve in record["curves"]:
        label = f"{curve['arm']}, {curve['labels']}, T={curve['temperature']:g}"
        table = [[v for v in row if v is not None] or [float("nan")] for row in curve["values"]]
        (line,) = over.plot(steps, [np.mean(row) for row in table], marker="o", ms=3, label=label)
        low, high = ([np.percentile(row, q) for row in table] for q in (10, 90))
        over.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        layers.plot(_known([values[-1] for values in curve["layers"].values()]), marker=".", color=line.get_color())
    over.set(xlabel="student updates", ylabel="cosine of CE and KL gradients", ylim=(-1.05, 1.05))
    over.legend(fontsize=6)
    layers.set(xlabel="layer, in order of the network", title="last snapshot", ylim=(-1.05, 1.05))
    for ax in (over, layers):
        ax.axhline(0, color="0.5", lw=0.8)
    return figure


def _trace(record: Record) -> Any:
    """Left: traces over training. Middle: divided by the loss. Right: per weight and layer at the end."""
    figure, axes = _figure(1, 3)
    over, ratio, layers = axes[0]
    steps = _steps(record)
    for arm, kinds in record["arms"].items():
        for kind, values in kinds.items():
            name, style = LOSSES[kind]
            look = {"marker": "o", "ms": 3, "ls": style, "zorder": 3 if style == "--" else 2}
            errors = [0.0 if isinstance(v["stderr"], str) else v["stderr"] for v in values]
            over.errorbar(steps, [v["trace"] for v in values], errors, capsize=2, label=f"{name}, {arm}", **look)
            ratio.plot(steps, _known([v["trace_over_loss"] for v in values]), **look)
            sizes = zip(values[-1]["layers"], record["sizes"], strict=True)
            layers.plot([abs(total) / size for total, size in sizes], **look)
    traces = [value["trace"] for kinds in record["arms"].values() for values in kinds.values() for value in values]
    scale = "log" if min(traces) > 0 else "symlog"
    over.set(xlabel="student updates", ylabel="trace of the Hessian", yscale=scale)
    over.legend(fontsize=6)
    ratio.set(xlabel="student updates", ylabel="trace over loss", yscale=scale)
    layers.set(xlabel="layer, in order of the network", ylabel="|trace| per weight", yscale="log")
    return figure


def _landscape(record: Record) -> Any:
    """Per arm and mode contours of CE and KL in two scalings; below them surface and slices, over the centre."""
    import numpy as np

    figure, axes = _figure(2 * len(record["surfaces"]), 3)
    at, factor = np.array(record["coordinates"]), record["kl_as_trained"]
    shown = (("CE", "ce", 1.0), ("KL as trained", "kl", factor), ("KL, batch mean", "kl", 1.0))
    for row, below, surface in zip(axes[::2], axes[1::2], record["surfaces"], strict=True):
        rises = [np.array(surface["plane"][k]) * f - surface["centre"][k] * f for _, k, f in shown]
        low, high = min(r.min() for r in rises), max(r.max() for r in rises)
        levels = np.linspace(low, max(high, low + 1e-9), 16)
        last: Any = None
        for ax, (title, _, _), rise in zip(row, shown, rises, strict=True):
            last = ax.contourf(at, at, rise.T, levels=levels)
            ax.set_title(f"{title}, {surface['mode']}\n{surface['arm']}", fontsize=8)
        figure.colorbar(last, ax=list(row), shrink=0.8, label="loss minus centre")
        grid = below[0].get_gridspec()
        place = below[0].get_subplotspec().rowspan.start
        for ax in below:
            ax.remove()
        solid = figure.add_subplot(grid[place, 0], projection="3d")
        x, y = np.meshgrid(at, at, indexing="ij")
        solid.plot_surface(x, y, rises[0], alpha=0.6, color="C0")
        solid.plot_surface(x, y, rises[2], alpha=0.6, color="C1")
        solid.set_title("CE (blue), KL, batch mean (orange)", fontsize=8)
        slices = figure.add_subplot(grid[place, 1:])
        for name, key, scale in shown:
            lines = (np.array(surface["lines"][key]) - surface["centre"][key]) * scale
            (line,) = slices.plot(at, lines.mean(0), marker=".", label=name)
            slices.fill_between(at, lines.min(0), lines.max(0), color=line.get_color(), alpha=0.15)
        title = f"{surface['mode']}: {len(surface['lines']['ce'])} directions, mean and range"
        slices.set(xlabel="norms of each filter", ylabel="loss minus centre")
        slices.set_title(title, fontsize=8)
        slices.legend(fontsize=6)
    return figure


def _flips(record: Record) -> Any:
    """Above: first and last interval per layer. Below: all of them, log10 of the own-grid ratio; zero points moved."""
    import numpy as np

    figure, axes = _figure(2, 2)
    layers, steps = record["layers"], record["steps"]
    place = np.arange(len(layers))
    floor = 0.5 / max(layer["size"] for layer in layers)
    for ax, i in zip(axes[0], (0, len(steps) - 2), strict=True):
        ax.bar(place - 0.2, [max(x["own_grid"][i] - floor, 0) for x in layers], 0.4, label="own grid", bottom=floor)
        ax.bar(place + 0.2, [max(x["fixed_grid"][i] - floor, 0) for x in layers], 0.4, label="fixed grid", bottom=floor)
        title = f"steps {steps[i]} to {steps[i + 1]}"
        ax.set(yscale="log", ylim=(floor, 1), xlabel="layer", ylabel="share of codes changed", title=title)
        ax.legend(fontsize=6)
    own = np.log10(np.maximum([x["own_grid"] for x in layers], floor))
    zeros = np.array([x["moved_zeros"] for x in layers])
    for ax, values, title in zip(
        axes[1], (own, zeros), ("log10 share changed", "share of zero points moved"), strict=True
    ):
        image = ax.imshow(values, aspect="auto", interpolation="nearest")
        ax.set(xlabel="interval", ylabel="layer", title=title)
        ax.locator_params(integer=True)
        figure.colorbar(image, ax=ax)
    return figure
