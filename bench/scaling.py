"""How the cost of an `ait` step grows with width, depth, image size, batch and classes: `bench/speed.py --sweep`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from zsq.bench import commit
from zsq.machine import describe_device, versions
from zsq.teachers import make_teacher
from zsq.teachers.facts import Facts
from zsq.teachers.nets import ResidualNet

BASE = {"width": 16, "units": 1, "size": 16, "batch": 32, "classes": 10}
SWEEP = {"width": (8, 16, 32), "units": (1, 2, 4), "size": (16, 32, 64), "batch": (16, 32, 64, 128),
         "classes": (10, 100, 1000)}  # fmt: skip


def sweep(run: Callable[..., Any], cycles: int = 3) -> dict[str, Any]:
    """Seconds per `ait` step of small residual networks, one quantity varied at a time.

    Args:
        run: `speed.run`.
        cycles: turns per point.
    """
    rows = []
    for what, values in SWEEP.items():
        points = []
        for value in values:
            at = BASE | {what: value}
            widths = [at["width"] * factor for factor in (1, 2, 4)]
            net = ResidualNet(widths, units=at["units"], classes=at["classes"])
            facts = Facts(image=(3, at["size"], at["size"]), mean=(0.5,) * 3, std=(0.25,) * 3)
            teacher = make_teacher(net.eval(), facts, name=f"{what} {value}")
            found = run(teacher, "ait", batch=at["batch"], bits=4, cycles=cycles, against=False)
            best = {name: min(times) for name, times in found.times.items()}
            points.append({"value": value, "seconds": best["Q"], "student": best["Q own"],
                           "inundation": best["Q optimizer"] - best["P optimizer"], "flop": found.facts["flop"]})
        ends = points[0], points[-1]
        span = math.log(ends[1]["value"] / ends[0]["value"])
        rows.append({
            "what": what, "points": points,
            "exponent": math.log(ends[1]["seconds"] / ends[0]["seconds"]) / span,
            "exponent_flop": math.log(ends[1]["flop"] / ends[0]["flop"]) / span,
        })  # fmt: skip
    return {"base": BASE, "sweep": rows, "device": describe_device("cpu"), "versions": versions(), "commit": commit()}
