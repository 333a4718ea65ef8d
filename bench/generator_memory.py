"""Memory of a training step at ImageNet size: what is forecast before a run starts, against what a step really takes.

    python bench/generator_memory.py --json bench/results/generator_memory.json

Generators of GDFQ, Qimera and AutoReCon for ResNet-18, ResNet-50 and MobileNetV2 shapes, and the students of these
networks, at 224 pixels. Each cell is a process of its own; what is measured is the highest resident memory during two
steps (the optimizer's moments exist from the second on) above what was resident before the source or student was made.
The batch is the published one.
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
        found += [{"net": net, "of": of, "options": {}, "batch": PUBLISHED} for of in (*SOURCES, "student")]
        batch = PUBLISHED if net == "resnet18" else 0
        found.append({"net": net, "of": "qimera", "options": {"disentangle": False}, "batch": batch})
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
    cost = cost._replace(images=PUBLISHED)
    return cell | {
        "macs": cost.macs, "parameters": cost.parameters, "fixed": cost.fixed, "gradients": cost.gradients,
        "each": cost.each, "forecast": cost.needed / GIB, "measured": taken, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def whole_embedding(teacher: Teacher) -> StepCost:
    """Cost of Qimera's generator without its linear map, which is not made: filling 825 M weights takes minutes."""
    features, _ = first_embedding(teacher, "random")
    latents = superposed_latents(features, teacher.classes, superposed=0.4, slots=2)
    build = partial(SuperposedGenerator, teacher.classes, teacher.image, features)
    return require_generator_memory(teacher, build, latents, batch=2)


def summary(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per generator and student: forecast over measured, and what a run takes."""
    students = {cell["net"]: cell for cell in measured if cell["of"] == "student"}
    rows = []
    for cell in measured:
        row = {key: cell[key] for key in ("net", "of", "options", "macs", "parameters", "forecast", "measured")}
        if cell["measured"] is not None:
            row["ratio"] = cell["forecast"] / cell["measured"]
        if cell["of"] != "student":
            # While the student learns, the generator keeps its weights and moments.
            held = (cell["fixed"] - cell["gradients"]) / GIB
            row["run"] = max(cell["forecast"], students[cell["net"]]["forecast"] + held)
            row["fits"] = row["run"] <= LIMIT
        rows.append(row)
    return rows


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
