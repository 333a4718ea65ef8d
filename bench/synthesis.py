"""Time and memory of a pool of images optimised from noise, as a recipe makes it.

    python bench/synthesis.py --recipe hast --threads 2 --json bench/results/synthesis.json

The pool is made whole, as stage `synthesise` of a run in memory: wall clock and CPU seconds of that stage, the peak
memory of the process, and what the images reached (the terms of the loss at the end, how many the teacher gives the
class they were made for). Held-out images count: they are made too.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch

from zsq import recipes
from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.machine import describe_device, versions
from zsq.run import Run
from zsq.sources.pool import HELD_OUT
from zsq.teachers import load_teacher

RECIPES = ("hast", "intraq", "zeroq")


def measure(recipe: str, teacher_name: str, *, images: int, iterations: int | None, seed: int) -> dict[str, Any]:
    """Make a pool and say what it cost."""
    teacher = load_teacher(teacher_name)
    asked = {} if iterations is None else {"iterations": iterations}
    count = images - images // HELD_OUT  # an eighth of it is made beside
    source = recipes.module(recipe).source(teacher, batch=64, count=count, **asked)
    terms: dict[str, float] = {}

    class Watched(Run):
        def log(self, **found: Any) -> None:
            terms.update(found)
            super().log(**found)

    with Watched(None, seed=seed, device=teacher.device) as run:
        wall, cpu = time.perf_counter(), time.process_time()
        source.prepare(run)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    held, drawn = source.sample(images, run.rng("held", 0)), source.pick(images, run.rng("drawn", 0))
    made = torch.cat([held.images, drawn.images])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"recipe": recipe, "teacher": teacher.name, "images": len(made), "made": source.facts, "seed": seed,
             "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "peak_gib": round(peak, 2),
             "last_terms": {name: float(value) for name, value in terms.items()}}  # fmt: skip
    if held.labels is not None and drawn.labels is not None:
        labels = torch.cat([held.labels, drawn.labels])
        with torch.no_grad():
            classes = torch.cat([teacher.net(part).argmax(1) for part in made.split(256)])
        facts["as_asked"] = float((classes == labels).float().mean())
    return facts


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="hast")
    parser.add_argument("--teacher", default="resnet20-cifar10")
    parser.add_argument("--images", type=int, default=1024, help="held-out ones included")
    parser.add_argument("--iterations", type=int, help="Adam steps per image; the recipe's if not given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.recipe, given.teacher, images=given.images, iterations=given.iterations, seed=given.seed)
    found |= {"device": describe_device("cpu"), "versions": versions(), "commit": commit()}
    for name, value in found.items():
        print(f"{name}: {value}")
    if given.json is not None:
        write_json_atomic(given.json, found)


if __name__ == "__main__":
    main()
