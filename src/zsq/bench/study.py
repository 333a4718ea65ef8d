"""What the instruments say of some cells of a matrix, side by side: one result file and one figure per instrument."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsq.analysis import analyse
from zsq.analysis.comparison import draw_comparison
from zsq.bench.matrix import Cell, Look
from zsq.checkpoint import read_json, write_json_atomic

Record = dict[str, Any]
DIGITS = 5  # significant, in the collected file; the run directories keep everything


def study(look: Look, runs: Path, stem: Path, report: Callable[[str], None] | None = None) -> list[Record]:
    """Point the instruments at finished cells; cells and instruments that have their file already are only read.

    Args:
        look: instruments and cells.
        runs: folder of the run directories.
        stem: beginning of the names of the files: STEM_analysis.json, and STEM_INSTRUMENT.png drawn from it.
        report: called with a line of text after each cell.

    Returns:
        Key figures, one object per cell (`key_figures`).

    Raises:
        BadInput: if an instrument cannot be used, e.g. without matplotlib.
    """
    cells = [_look_at(cell, look.what, runs / cell.name, report) for cell in look.cells]
    keys = [key_figures(cell) for cell in cells]
    file = stem.with_name(f"{stem.name}_analysis.json")
    write_json_atomic(file, {"instruments": list(look.what), "table": keys, "cells": cells})
    for name in look.what:
        draw_comparison(name, read_json(file)["cells"], stem.with_name(f"{stem.name}_{name}.png"))
    return keys


def key_figures(cell: Record) -> Record:
    """The few numbers of a cell that tables show.

    Args:
        cell: method, bits, seed, and a record per instrument.

    Returns:
        ``flips_early`` and ``flips_late``: share of the weights that changed in the first and last interval (own grid),
        ``..._least`` and ``..._most``: the same of the extreme layers; ``cosine``: per kind of label and temperature
        the mean over training; ``trace`` at the end: per loss [trace, standard error, trace over loss].
    """
    found: Record = {key: cell[key] for key in ("teacher", "method", "bits", "seed")}
    if "flips" in cell:
        layers = cell["flips"]["layers"]
        total = sum(layer["size"] for layer in layers)
        for name, i in (("early", 0), ("late", -1)):
            shares = [layer["own_grid"][i] for layer in layers]
            found[f"flips_{name}"] = sum(x * layer["size"] for x, layer in zip(shares, layers, strict=True)) / total
            found[f"flips_{name}_least"], found[f"flips_{name}_most"] = min(shares), max(shares)
    if "cosine" in cell:
        found["cosine"] = {
            f"{curve['labels']}, T={curve['temperature']:g}": statistics.fmean(known)
            for curve in cell["cosine"]["curves"]
            if (known := [value for row in curve["values"] for value in row if value is not None])
        }
    if "trace" in cell:
        kinds = next(iter(cell["trace"]["arms"].values()))
        last = {kind: values[-1] for kind, values in kinds.items()}
        found["trace"] = {kind: [v["trace"], v["stderr"], v["trace_over_loss"]] for kind, v in last.items()}
    return found


def _look_at(cell: Cell, what: tuple[str, ...], path: Path, report: Callable[[str], None] | None) -> Record:
    """All instruments on one cell."""
    record: Record = {"teacher": cell.teacher, "method": cell.method, "seed": cell.seed,
                      "bits": f"W{cell.weight_bits}A{cell.act_bits}"}  # fmt: skip
    for name in what:
        file = path / "analysis" / f"{name}.json"
        if not file.exists():
            analyse(path, what=name, progress=False)
        record[name] = _short(read_json(file))
    if report is not None:
        report(f"{cell.name}: {', '.join(what)}")
    return record


def _short(value: Any) -> Any:
    """The same with floats of few digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value
