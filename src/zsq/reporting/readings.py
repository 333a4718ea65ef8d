"""What an instrument found, in a sentence or two beside its figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from zsq.analysis.figures import LOSSES

Record = dict[str, Any]


def reading(name: str, record: Record) -> str:
    """Say what a result file of `zsq analyse` holds; empty if it is not one this version knows.

    Args:
        name: of the instrument.
        record: its file.
    """
    readers: dict[str, Callable[[Record], str]] = {
        "cosine": _cosine, "trace": _trace, "landscape": _landscape, "flips": _flips,
    }  # fmt: skip
    try:
        return readers[name](record)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return ""


def _cosine(record: Record) -> str:
    curve = record["curves"][0]
    first, last = (statistics.fmean(v for v in curve["values"][i] if v is not None) for i in (0, -1))
    return (
        f"With the {curve['labels']}, T={curve['temperature']:g}: {_short(first)} at the first snapshot, {_short(last)}"
        " at the last. Below 0 the two would work against each other. The band holds 80 % of the batches."
    )


def _trace(record: Record) -> str:
    kinds = next(iter(record["arms"].values()))
    values = [f"{LOSSES[kind][0]} {v[-1]['trace']:.4g} ± {v[-1]['stderr']:.2g}" for kind, v in kinds.items()]
    text = f"At the end: {'; '.join(values)}. A loss that is divided by a number is that much flatter."
    if record.get("method") == "gauss_newton":
        text += " In a network of straight lines, like this one, CE and KL at T=1 have one trace, whatever the labels."
    return text


def _landscape(record: Record) -> str:
    at = record["coordinates"]
    middle = len(at) // 4
    parts = []
    for surface in record["surfaces"]:
        if surface["arm"] == record["surfaces"][0]["arm"]:
            rises = [f"{name} {_rise(surface, kind, middle)}" for name, kind in (("CE", "ce"), ("batch-mean KL", "kl"))]
            how = "weights rounded again" if surface["mode"] == "requant" else "weights not rounded again"
            parts.append(f"{' and '.join(rises)} ({surface['mode']}: {how})")
    return f"Mean rise of the loss at ±{abs(at[middle]):g} of the filters' norms: {'; '.join(parts)}."


def _rise(surface: Record, kind: str, middle: int) -> str:
    lines = surface["lines"][kind]
    ends = [value for line in lines for value in (line[middle], line[-1 - middle])]
    return f"{statistics.fmean(ends) - surface['centre'][kind]:+.2f}".replace("-", "−")


def _flips(record: Record) -> str:
    layers, steps = record["layers"], record["steps"]
    first, last = (_share(layers, i) for i in (0, -1))
    still = sum(layer["own_grid"][-1] == 0 for layer in layers)
    return (
        f"Of all integer weights {first} changed in steps {steps[0]} to {steps[1]}, {last} in steps {steps[-2]} to"
        f" {steps[-1]}, when {still} of {len(layers)} layers stood still. Own grid: the codes the network uses; fixed"
        " grid: as if the range had not moved."
    )


def _share(layers: Sequence[Record], interval: int) -> str:
    total = sum(layer["size"] for layer in layers)
    return f"{100 * sum(layer['size'] * layer['own_grid'][interval] for layer in layers) / total:.2g} %"


def _short(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
