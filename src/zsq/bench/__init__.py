"""`zsq bench`: a matrix of teachers, methods, bits and seeds, one run directory per cell, resumable cell by cell."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zsq.bench.matrix import Cell, read_look, read_matrix, select
from zsq.checkpoint import write_json_atomic
from zsq.errors import BadInput, RunFailed

__all__ = ["Cell", "commit", "read_matrix", "rows", "run_cell", "run_matrix"]

KEEP = (
    "student_score", "teacher_score", "agreement", "probe_agreement", "seconds", "steps", "float_sites", "base", "plan",
    "recipe", "fidelity", "metric",
)  # fmt: skip
COLUMNS = ("teacher", "bits", "method", "metric", "seeds", "float", "student", "drop", "agreement", "minutes")
NOTE = "bench.json"  # in a run directory: what made it


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
        write_json_atomic(folder / NOTE, {"commit": commit()})
    facts = json.loads(summary.read_text(encoding="utf-8"))
    config, note = (_read(folder / name) for name in ("config.json", NOTE))
    return {
        "teacher": cell.teacher, "method": cell.method, "weight_bits": cell.weight_bits, "act_bits": cell.act_bits,
        "seed": cell.seed, "eval_count": facts.get("eval_count"), "eval_data": facts.get("eval_data"),
        "placement": facts["placement"], "device": facts["device"], **{key: facts.get(key) for key in KEEP},
        "asked": {key: value for key, value in cell.asked(shared).items() if key not in ("eval", "device")},
        "commit": note.get("commit", "unknown"), "versions": config.get("versions"),
    }  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


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


def run_matrix(
    path: Path,
    *,
    runs: Path,
    jobs: int = 1,
    report: Any = None,
    teacher: str | None = None,
    budget: str | None = None,
    reuse: Sequence[Path] = (),
    only: Sequence[str] | None = None,
    figures: Path | None = None,
) -> dict[str, Any]:
    """Make every cell of a matrix and summarise.

    Args:
        path: MATRIX.toml.
        runs: folder for the run directories; finished cells found there are read, interrupted ones resumed.
        jobs: cells at a time, one core each; 1 leaves each cell all cores.
        report: called with a line of text after each cell.
        teacher: in place of the file's teachers.
        budget: in place of the file's shared one.
        reuse: result files to take finished cells over from, if they would be the same run again. A cell that the file
            asks the instruments for is made here all the same: they need its run directory.
        only: patterns of cells' names; the others are left out. None: all cells.
        figures: beginning of the names of the files that the file's ``[analysis]`` becomes; runs/MATRIX if not given.

    Returns:
        ``cells`` (one object per run, each with the commit, machine and versions of its own), ``table`` (mean and
        deviation over seeds), ``analysis`` (key figures per cell, if the file asks for any) and provenance.

    Raises:
        BadInput: for a matrix that cannot be read, or jobs < 1.
        RunFailed: if a cell failed; the others are kept.
    """
    if jobs < 1:
        raise BadInput("--jobs", expected="1 or more", got=jobs, fix="Give how many cells run side by side.")
    cells, shared = read_matrix(path, teacher=teacher, budget=budget)
    look = read_look(path, cells)
    if only is not None:
        cells = select(cells, only)
        look = look._replace(cells=[cell for cell in look.cells if cell in cells])
    results = _taken(cells, shared, reuse, look.cells)
    failures: list[str] = []
    pool = ThreadPoolExecutor(jobs)
    try:
        pending = {
            cell.name: pool.submit(run_cell, cell, runs / cell.name, shared, 1 if jobs > 1 else None)
            for cell in cells if cell.name not in results
        }  # fmt: skip
        for cell in cells:
            try:
                if cell.name in pending:
                    results[cell.name] = pending[cell.name].result()
                found = results[cell.name]
                message = f"{cell.name}: {found.get('metric') or 'top1'} {100 * found['student_score']:.2f} %"
                message += f", taken from {found['taken_from']}" if cell.name not in pending else ""
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

    ordered = [results[cell.name] for cell in cells]
    result = {"matrix": path.name, "options": {k: v for k, v in shared.items() if k != "eval"}, "commit": commit(),
              "versions": versions(), "jobs": jobs, "table": list(rows(ordered)), "cells": ordered}  # fmt: skip
    if look.cells:
        from zsq.bench.study import study

        result["analysis"] = study(look, runs, figures or runs / path.stem, report)
    return result


def _taken(
    cells: list[Cell], shared: dict[str, Any], files: Sequence[Path], needed: list[Cell]
) -> dict[str, dict[str, Any]]:
    """Finished cells of other result files, by name."""
    if not files:
        return {}
    from zsq.bench.reuse import Measured

    measured = Measured(files)
    found = {cell.name: measured.find(cell, shared) for cell in cells if cell not in needed}
    return {name: record for name, record in found.items() if record is not None}


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
               "metric": group[0].get("metric") or "top1",
               "deviation": statistics.stdev(scores) if len(group) > 1 else None,
               "drop_points": 100 * (mean["teacher_score"] - mean["student_score"])}  # fmt: skip


def in_words(table: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Rows of a table in percent, in the order of `COLUMNS`."""
    for row in table:
        spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
        yield [row["teacher"], row["bits"], row["method"], row["metric"], str(row["seeds"]),
               f"{100 * row['teacher_score']:.2f}", f"{100 * row['student_score']:.2f}{spread}",
               f"{row['drop_points']:.2f}", f"{100 * row['agreement']:.2f}", f"{row['seconds'] / 60:.1f}"]  # fmt: skip


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
