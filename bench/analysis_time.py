"""Time of `zsq analyse RUN --what all`: seconds per instrument, and in all, of one finished run.

    zsq quantize resnet20-cifar10 --weight-bits 3 --act-bits 3 --run RUN
    python bench/analysis_time.py RUN --json bench/results/analysis_time.json

The files are written into the run as usual. Seconds of processor time are given beside those of the clock: the machine
may be busy. For comparison the traces are estimated once more with second derivatives, two probes of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zsq.analysis import INSTRUMENTS, PRESETS, analyse
from zsq.analysis.probes import hutchinson
from zsq.analysis.subject import open_subject
from zsq.bench import commit
from zsq.checkpoint import read_json, write_json_atomic
from zsq.machine import describe_device, versions

FEW = 2  # probes with second derivatives: the time per probe hardly varies


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def second_derivatives(run: Path, count: int) -> dict[str, Any]:
    """Time per probe of the plain estimate of all three losses, at the end of the run."""
    subject = open_subject(run, count=count)
    parameters = [weight.parameter for weight in subject.weights]
    taken = timed(lambda: hutchinson(parameters, [(1.0, lambda: subject.losses(subject.arms[0]))], probes=FEW))
    return {"probes": FEW, **taken}


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args()
    times = {name: timed(lambda name=name: analyse(given.run, what=name)) for name in INSTRUMENTS}
    effort = PRESETS["quick"]
    record = read_json(given.run / "analysis" / "trace.json")
    traces = {kind: [len(e["samples"]) for e in values] for kind, values in next(iter(record["arms"].values())).items()}
    total = {key: sum(part[key] for part in times.values()) for key in ("seconds", "cpu_seconds")}
    result = {
        "commit": commit(), "device": describe_device("cpu"), "threads": torch.get_num_threads(),
        "versions": versions(),
        "run": read_json(given.run / "summary.json")["plan"], "preset": vars(effort), "method": record["method"],
        "probes": traces, "total": total, "instruments": times,
        "second_derivatives": second_derivatives(given.run, effort.count),
    }  # fmt: skip
    print(result)
    if given.json:
        write_json_atomic(given.json, result)


if __name__ == "__main__":
    main()
