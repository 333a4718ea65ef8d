"""Memory of a training step at ImageNet size: what is forecast before a run starts, against what a step really takes.

    python bench/generator_memory.py --json bench/results/generator_memory.json

Generators of GDFQ, Qimera and AutoReCon for ResNet-18, ResNet-50 and MobileNetV2 shapes, and the students of these
networks, at 224 pixels. Each cell is a process of its own; what is measured is the highest resident memory during two
steps (the optimizer's moments exist from the second on) above what was resident before the source or student was made.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import imagenet_shapes
from zsq import recipes
from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.footprint import StepCost, require_generator_memory, require_student_memory
from zsq.generators_superposed import SuperposedGenerator
from zsq.machine import describe_device, versions
from zsq.run import Run
from zsq.sources.pool import PoolSource
from zsq.sources.superposed import first_embedding, superposed_latents
from zsq.teachers import Teacher, load_teacher

SOURCES = {name: recipes.module(name).source for name in ("gdfq", "qimera", "autorecon")}
PUBLISHED = 16  # images per step on ImageNet, of all three papers
LIMIT = 24  # GiB of the card that a run should fit
GIB = 2**30


def cells() -> list[dict[str, Any]]:
    """Everything to measure; the largest generators of all are forecast only."""
    found: list[dict[str, Any]] = []
    for net in imagenet_shapes.PARAMETERS:
        found += [{"net": net, "of": source, "options": {}, "batch": batch} for source in SOURCES for batch in (2, 6)]
        batches = (2, 6) if net == "resnet18" else (0,)
        found += [{"net": net, "of": "qimera", "options": {"disentangle": False}, "batch": batch} for batch in batches]
        found += [{"net": net, "of": "student", "options": {}, "batch": batch} for batch in (2, 6)]
    return found


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Forecast and measure one cell in this process; a batch of 0 is not measured."""
    teacher, batch = imagenet_shapes.teacher(cell["net"]), cell["batch"]
    with Run(None, progress=False) as run:  # the first use of the programs themselves takes memory too
        base = "gdfq" if cell["of"] == "student" else cell["of"]
        recipes.ait(load_teacher("digits"), run, base=base, steps=1, warmup=1, batch=2)
    begun = time.perf_counter()
    if cell["of"] == "student":
        cost = require_student_memory(teacher, batch=batch, micro_batch=None)
        images = PoolSource(torch.randn(16, *teacher.image), None, name="noise")
        before = _resident()
        with Run(None, progress=False) as run:
            recipes.ait(teacher, run, images=images, steps=2, warmup=1, batch=batch)
    elif not batch:
        cost = whole_embedding(teacher)
    else:
        before = _resident()
        source = SOURCES[cell["of"]](teacher, batch=batch, milestones=(), **cell["options"])
        cost, rng = source.cost, torch.Generator().manual_seed(0)
        for _ in range(2):
            source.draw(rng)
    taken = (_highest() - before) / GIB if batch else None
    return cell | facts(cost) | {
        "forecast": cost._replace(images=batch).needed / GIB if batch else None,
        "measured": taken,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def whole_embedding(teacher: Teacher) -> StepCost:
    """Cost of Qimera's generator without its linear map, which is not made: filling 825 M weights takes minutes."""
    features, _ = first_embedding(teacher, "random")
    latents = superposed_latents(features, teacher.classes, superposed=0.4, slots=2)
    build = partial(SuperposedGenerator, teacher.classes, teacher.image, features)
    return require_generator_memory(teacher, build, latents, batch=2)


def facts(cost: StepCost) -> dict[str, Any]:
    """What is known before the first step, for the published batch too."""
    return {"macs": cost.macs, "parameters": cost.parameters, "fixed": cost.fixed, "each": cost.each,
            "published": cost._replace(images=PUBLISHED).needed / GIB}  # fmt: skip


def summary(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per generator: forecast over measured at each batch, and what a run with the published batch takes."""
    students = {cell["net"]: cell for cell in measured if cell["of"] == "student"}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in measured:
        key = (cell["net"], cell["of"], json.dumps(cell["options"]))
        row = rows.setdefault(key, {k: cell[k] for k in ("net", "of", "options", "macs", "parameters", "published")})
        if cell["measured"] is not None:
            row[f"forecast_over_measured_{cell['batch']}"] = cell["forecast"] / cell["measured"]
        if cell["of"] != "student":
            # While the student learns, the generator keeps its weights, gradients and moments.
            row["run"] = max(cell["published"], students[cell["net"]]["published"] + cell["fixed"] / GIB)
            row["fits"] = row["run"] <= LIMIT
    return list(rows.values())


def _resident() -> int:
    """Resident bytes now; from here on the kernel counts the highest anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _highest() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    """All cells, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--cell", help="one cell, in this process")
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(measure(json.loads(given.cell))))
        return
    measured = []
    for cell in cells():
        command = [sys.executable, __file__, "--cell", json.dumps(cell)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{cell}: {done.stderr.strip().splitlines()[-1]}")
        measured.append(json.loads(done.stdout))
        print({k: v for k, v in measured[-1].items() if k in ("net", "of", "options", "batch", "forecast", "measured")})
    result = {"commit": commit(), "device": describe_device("cpu"), "versions": versions(), "threads":
              torch.get_num_threads(), "limit_gib": LIMIT, "published_batch": PUBLISHED,
              "table": summary(measured), "cells": measured}  # fmt: skip
    if given.json:
        write_json_atomic(given.json, result)


if __name__ == "__main__":
    main()
