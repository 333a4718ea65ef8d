"""`zsq bench`: a matrix of teachers, methods, bits and seeds, one run directory per cell, resumable cell by cell."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsq.errors import BadInput, RunFailed

KEEP = (
    "student_score", "teacher_score", "agreement", "probe_agreement", "seconds", "steps", "float_sites", "base", "plan",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    teacher: str
    method: str
    recipe: str
    weight_bits: int
    act_bits: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run directory."""
        method = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"{self.teacher}-{method}-W{self.weight_bits}A{self.act_bits}-s{self.seed}".replace("/", "-")

    def command(self, folder: Path, shared: dict[str, Any]) -> list[str]:
        """The command line that makes this cell; running it again goes on where it stopped."""
        options = {
            **shared,
            **self.options,
            "weight-bits": self.weight_bits,
            "act-bits": self.act_bits,
            "seed": self.seed,
        }
        flags = [text for key, value in options.items() for text in _flag(key, value)]
        resume = ["--resume"] if (folder / "checkpoint").is_dir() and any((folder / "checkpoint").iterdir()) else []
        return [sys.executable, "-m", "zsq.cli", "quantize", self.teacher, "--recipe", self.recipe,
                "--run", str(folder),
                "--json", *flags, *resume]  # fmt: skip


def _flag(key: str, value: object) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [name] if value else []
    return [name, *(str(item) for item in value)] if isinstance(value, list) else [name, str(value)]


def read_matrix(path: Path) -> tuple[list[Cell], dict[str, Any]]:
    """Read MATRIX.toml.

    Args:
        path: a file with ``teachers``, ``bits`` (pairs), ``seeds``, ``[options]`` for every cell, and one
            ``[[method]]`` table per method: ``name``, ``recipe``, and optionally its own ``options``, ``seeds``.

    Returns:
        The cells in order, and the options they share.

    Raises:
        BadInput: if the file is missing, is not TOML, lacks a key, or two cells would share a directory.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table["teachers"], list):
            raise ValueError(f"teachers = {table['teachers']!r} is not a list")
        cells = [
            Cell(teacher, method["name"], method["recipe"], w, a, seed, method.get("options", {}))
            for teacher in table["teachers"]
            for w, a in table["bits"]
            for method in table["method"]
            if [w, a] in method.get("bits", table["bits"])
            for seed in method.get("seeds", table["seeds"])
        ]
    except OSError as error:
        raise BadInput(
            str(path), expected="a matrix file", got=error.strerror, fix="Give the path of a .toml."
        ) from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        got = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise BadInput(str(path), expected="teachers, bits, seeds and [[method]] tables in TOML", got=got,
                       fix="See bench/cifar10_main.toml for an example.") from error  # fmt: skip
    shared = table.get("options", {})
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(str(path), expected="cells with different names", got=f"{twice[0]} more than once",
                       fix="Names of methods must differ in letters or digits.")  # fmt: skip
    if blind := [cell.name for cell in cells if "eval" not in {**shared, **cell.options}]:
        raise BadInput(str(path), expected="a labelled set for every cell", got=f"none for {blind[0]}",
                       fix='Write eval = "DATA" under [options].')  # fmt: skip
    return cells, shared


def run_cell(cell: Cell, folder: Path, shared: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """Make one cell, or read it if it is finished.

    Raises:
        RunFailed: with the last line of what the run said, or if the directory holds a cell of another matrix.
    """
    summary = folder / "summary.json"
    if (folder / "config.json").exists():
        before = _asked(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("command", []))
        now = _asked(cell.command(folder, shared))
        if before != now:
            keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            raise RunFailed(f"cell {cell.name}: expected the options of the matrix, got others of {', '.join(keys)} in"
                            f" {folder}. Remove that directory, or choose another --runs.")  # fmt: skip
    if not summary.exists() or "student_score" not in json.loads(summary.read_text(encoding="utf-8")):
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        done = subprocess.run(
            cell.command(folder, shared), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunFailed(f"cell {cell.name} ended with code {done.returncode}: {last}")
    facts = json.loads(summary.read_text(encoding="utf-8"))
    return {
        "teacher": cell.teacher, "method": cell.method, "weight_bits": cell.weight_bits, "act_bits": cell.act_bits,
        "seed": cell.seed, "eval_count": facts.get("eval_count"), "eval_data": facts.get("eval_data"),
        "placement": facts["placement"], "device": facts["device"], **{key: facts.get(key) for key in KEEP},
    }  # fmt: skip


def _asked(command: list[str]) -> dict[str, list[str]]:
    """A command line as option -> values, but for where the run is, how it is shown, and on what it computes."""
    asked: dict[str, list[str]] = {}
    key = "teacher"
    if "quantize" not in command:
        return asked
    for text in command[command.index("quantize") + 1 :]:
        if text.startswith("--"):
            key, equals, value = text.partition("=")
            asked[key] = [value] if equals else []
        else:
            asked.setdefault(key, []).append(text)
    return {key: values for key, values in asked.items() if key not in ("--run", "--json", "--resume", "--device")}


def run_matrix(path: Path, *, runs: Path, jobs: int = 1, report: Any = None) -> dict[str, Any]:
    """Make every cell of a matrix and summarise.

    Args:
        path: MATRIX.toml.
        runs: folder for the run directories; finished cells found there are read, interrupted ones resumed.
        jobs: cells at a time, one core each; 1 leaves each cell all cores.
        report: called with a line of text after each cell.

    Returns:
        ``cells`` (one object per run), ``table`` (mean and deviation over seeds) and provenance.

    Raises:
        BadInput: for a matrix that cannot be read, or jobs < 1.
        RunFailed: if a cell failed; the others are kept.
    """
    if jobs < 1:
        raise BadInput("--jobs", expected="1 or more", got=jobs, fix="Give how many cells run side by side.")
    cells, shared = read_matrix(path)
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    pool = ThreadPoolExecutor(jobs)
    try:
        pending = [pool.submit(run_cell, cell, runs / cell.name, shared, 1 if jobs > 1 else None) for cell in cells]
        for cell, future in zip(cells, pending, strict=True):
            try:
                results.append(future.result())
                message = f"{cell.name}: {100 * results[-1]['student_score']:.2f} %"
            except RunFailed as error:
                failures.append(str(error))
                message = str(error)
            if report is not None:
                report(message)
    finally:  # after Ctrl-C too: cells that have not begun must not begin now
        pool.shutdown(cancel_futures=True)
    if failures:
        raise RunFailed(
            f"{len(failures)} of {len(cells)} cells failed; the others are kept in {runs}. First: {failures[0]}"
        )
    from zsq.machine import versions

    return {"matrix": path.name, "options": {k: v for k, v in shared.items() if k != "eval"}, "commit": commit(),
            "versions": versions(), "jobs": jobs, "table": list(rows(results)), "cells": results}  # fmt: skip


def rows(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per teacher, bits and method: mean and sample deviation over seeds, drop in points.

    Example:
        >>> cell = {"teacher": "t", "method": "m", "weight_bits": 4, "act_bits": 4, "teacher_score": 0.9,
        ...         "agreement": 0.8, "probe_agreement": 0.7, "seconds": 60.0}
        >>> row, = rows([cell | {"student_score": 0.80}, cell | {"student_score": 0.82}])
        >>> row["seeds"], round(row["student_score"], 3), round(row["drop_points"], 2)
        (2, 0.81, 9.0)
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["teacher"], cell["weight_bits"], cell["act_bits"], cell["method"]), []).append(cell)
    for (teacher, w, a, method), group in groups.items():
        mean = {key: statistics.fmean(cell[key] for cell in group)
                for key in ("student_score", "teacher_score", "agreement", "probe_agreement", "seconds")}  # fmt: skip
        scores = [cell["student_score"] for cell in group]
        yield {"teacher": teacher, "bits": f"W{w}A{a}", "method": method, "seeds": len(group), **mean,
               "deviation": statistics.stdev(scores) if len(group) > 1 else None,
               "drop_points": 100 * (mean["teacher_score"] - mean["student_score"])}  # fmt: skip


def commit() -> str:
    """The commit this was run from, with a plus sign when the tree had changes; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
