"""How long a start takes, against a bare interpreter in the same run; and the demo.

    python bench/startup.py --json bench/results/startup.json          # --demo for the demo too, about a minute

`import zsq` and `zsq --help` import no torch. Times are the minima over the turns, in CPU seconds of the child process
(user and system), the bare interpreter in turns with the others. The demo is what `make demo` runs after its setup,
once, on one thread: seconds by the clock and of the processor, with its scores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.machine import describe_device, versions

COMMANDS = {
    "python": ["-c", "pass"], "import zsq": ["-c", "import zsq"], "zsq --help": ["-m", "zsq", "--help"],
    "zsq quantize --help": ["-m", "zsq", "quantize", "--help"],
}  # fmt: skip


def spent() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def child_seconds(arguments: list[str]) -> float:
    """CPU seconds of one interpreter, its start included."""
    before = spent()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return spent() - before


def starts(turns: int) -> dict[str, dict[str, float]]:
    """Seconds of every command, and how many times the bare interpreter's."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(turns + 1):  # the first one fills the file cache
        for name, arguments in COMMANDS.items():
            times[name].append(child_seconds(arguments))
    best = {name: min(found[1:]) for name, found in times.items()}
    return {name: {"seconds": seconds, "over_python": seconds / best["python"]} for name, seconds in best.items()}


def demo() -> dict[str, Any]:
    """The command of `make demo`."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "zsq", "quantize", "digits", "--bits", "4", "--budget", "quick", "--eval",
                   "digits", "--run", str(Path(folder) / "demo"), "--json"]  # fmt: skip
        begun, before = time.perf_counter(), spent()
        done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        used = {"seconds": time.perf_counter() - begun, "cpu_seconds": spent() - before}
    found = json.loads(done.stdout)
    return {**used, **{key: found[key] for key in ("teacher_score", "student_score", "eval_count")}}


def main() -> None:
    """Measure, print, and write the file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"starts": starts(given.turns), "device": describe_device("cpu"), "versions": versions(),
                              "commit": commit()}  # fmt: skip
    if given.demo:
        result["demo"] = demo()
    print(json.dumps(result, indent=1))
    if given.json is not None:
        write_json_atomic(given.json, result)


if __name__ == "__main__":
    main()
