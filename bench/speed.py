"""Speed of a recipe's training step, against the same step without quantizers and against a plain implementation.

    python bench/speed.py --recipe ait --json bench/results/speed_ait.json
    python bench/speed.py --all --json bench/results/speed_recipes.json
    python bench/speed.py --sweep --json bench/results/speed_sweep.json

The recipe runs as it is, for a few steps, at the published batch of 200. In turns its step is taken with quantizers and
gradient inundation (Q), with quantizers only (P) and with neither (F, a plain float distillation step with the same
source, teacher and optimizer); `ait` and `gdfq` also alternate with `bench/reference_gdfq_ait.py`. Times are the minima
over all turns, in CPU seconds of one thread (wall clock on a GPU, or with `--threads`): the machine may be busy.
`--all` measures every recipe, each in a process of its own, and writes the file after each; a recipe that does not
finish within `--limit` is a row that says so.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from reference_gdfq_ait import Reference
from scaling import sweep
from zsq import recipes
from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.insert import QuantSpec, without_quantizers
from zsq.machine import choose_precision, describe_device, matrix_rate, versions
from zsq.run import Run
from zsq.teachers import Teacher, load_teacher

ARMS = ("Q", "P", "F")
POOL = {"count": 450, "iterations": 2}  # of recipes that optimise a pool first: its length is not what is measured
WITH_REFERENCE = ("ait", "gdfq")


class Clock:
    """Seconds of this thread, or of the wall once the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.alone = device.type == "cuda", torch.get_num_threads() == 1

    def __call__(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.alone and not self.cuda else time.perf_counter()


class Enough(Exception):
    """Ends a recipe whose turns have taken long enough."""


class Measured(Run):
    """A run whose student steps are timed in turns: one cycle of them whatever it takes, others within `seconds`."""

    def __init__(self, teacher: Teacher, reference: Callable[[], Any] | None, seconds: float) -> None:
        super().__init__(None, device=teacher.device, progress=False, log_every=10**9)
        self.teacher, self.reference = teacher, reference
        self.clock = Clock(teacher.device)
        self.allowed, self.until = seconds, float("inf")
        self.times: dict[str, list[float]] = defaultdict(list)
        self.inside: dict[str, float] = defaultdict(float)  # of the step that is running
        self.facts: dict[str, Any] = {}

    def steps(self, stage: str, total: int, **named: Any) -> Iterator[int]:
        """Steps of the recipe; those of stage `fit` in turns."""
        if stage != "fit" or not total:
            for number in super().steps(stage, total, **named):
                begun = self.clock()
                yield number
                self.times[stage].append(self.clock() - begun)
            return
        inner = super().steps(stage, total, **named)
        with self._watched(named["student"], named["source"], named["optimizer"]):
            for number in inner:
                if number < 2:  # memory and kernels settle
                    yield number
                elif number == 2:
                    yield from self._profiled(number)
                else:
                    yield from self._timed(number, named)

    def _timed(self, number: int, named: dict[str, Any]) -> Iterator[int]:
        turn = (number - 3) % len(ARMS)
        arm = ARMS[turn]
        if number == 3:
            self.until = time.perf_counter() + self.allowed
        elif turn == 0 and time.perf_counter() > self.until:
            raise Enough
        self.inside.clear()
        with arrangement(named["student"], named["optimizer"], arm):
            begun = self.clock()
            yield number
            whole = self.clock() - begun
        self.times[arm].append(whole)
        self.times[f"{arm} own"].append(whole - self.inside["draw"])
        for name, seconds in self.inside.items():
            self.times[f"{arm} {name}"].append(seconds)
        if self.reference is not None and turn == len(ARMS) - 1:
            begun = self.clock()
            self.reference()
            self.times["reference"].append(self.clock() - begun)

    def _profiled(self, number: int) -> Iterator[int]:
        """One step whose operations are counted, and the peak of memory so far."""
        counted = {torch.ops.onednn.qconv2d_pointwise: integer_conv_flop}
        flops = FlopCounterMode(display=False, custom_mapping=counted)
        with flops, profile(activities=[ProfilerActivity.CPU]) as found:
            yield number
        copies = {"aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous"}
        events = found.key_averages()
        reads = sum(event.count for event in events if event.key == "aten::_local_scalar_dense")
        moved = sum(event.self_cpu_time_total for event in events if event.key in copies)
        self.facts = {
            "flop": flops.get_total_flops(),
            "host_syncs_per_step": reads,
            "data_movement": moved / max(1, sum(event.self_cpu_time_total for event in events)),
            "peak_memory_bytes": peak_memory(self.device),
        }

    @contextmanager
    def _watched(self, student: nn.Module, source: Any, optimizer: Any) -> Iterator[None]:
        """Note how long the parts of a step take."""
        draw, step = source.draw, optimizer.step
        begun: dict[str, float] = {}

        def timed(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(action)
            def call(*args: Any, **named: Any) -> Any:
                start = self.clock()
                result = action(*args, **named)
                self.inside[name] += self.clock() - start
                return result

            return call

        def drawing(*args: Any, **named: Any) -> Any:
            begun["draw"] = self.clock()
            try:
                return timed("draw", draw)(*args, **named)
            finally:
                del begun["draw"]

        def before(*_: Any) -> None:
            begun["forward"] = self.clock()

        def after(name: str, *_: Any) -> None:
            self.inside[f"{name} while drawing" if "draw" in begun else name] += self.clock() - begun["forward"]

        with ExitStack() as stack:
            for name, net in (("student forward", student), ("teacher forward", self.teacher.net)):
                stack.callback(net.register_forward_pre_hook(before).remove)
                stack.callback(net.register_forward_hook(partial(after, name)).remove)
            source.draw, optimizer.step = drawing, timed("optimizer", step)
            try:
                yield
            finally:
                source.draw, optimizer.step = draw, step


def integer_conv_flop(x: list[int], *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """Products and sums of a convolution on integers, as torch counts those of one in float."""
    return conv_flop_count(x, rest[2], out_shape)


@contextmanager
def arrangement(student: nn.Module, optimizer: Any, arm: str) -> Iterator[None]:
    """Q: everything. P: no gradient inundation. F: no quantizers either."""
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    kept = [dict(of) for of in hooks]
    with ExitStack() as stack:
        if arm != "Q":
            for of in hooks:
                of.clear()
        if arm == "F":
            stack.enter_context(without_quantizers(student))
        try:
            yield
        finally:
            for of, before in zip(hooks, kept, strict=True):
                of.update(before)


def peak_memory(device: torch.device) -> int:
    """Bytes, of the process or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_reference(teacher: Teacher, *, batch: int, bits: int, lr: float) -> Callable[[], Any]:
    """A step of the plain implementation, its ranges known."""
    made: list[Reference] = []

    def step() -> Any:
        if not made:  # now: what it takes must not count as the recipe's memory
            plain = Reference(teacher.net, teacher.classes, teacher.image, batch=batch, bits=bits, lr=lr)
            images, _, _ = plain.images(torch.randn(batch, 100), torch.randint(teacher.classes, (batch,)))
            plain.observe(images.detach())
            plain.freeze()
            plain.step()
            made.append(plain)
        return made[0].step()

    return step


def run(
    teacher: Teacher, recipe: str, *, batch: int, bits: int, cycles: int, against: bool, seconds: float = float("inf")
) -> Measured:
    """Run a recipe for 3 + 3 * cycles student steps, or fewer if they take longer than some seconds by the clock."""
    function = recipes.load(recipe)
    torch.manual_seed(0)
    has = inspect.signature(function).parameters
    given = {"steps": 3 + len(ARMS) * cycles, "warmup": 2, "batch": batch, **({} if "base" in has else POOL)}
    known = {name: value for name, value in given.items() if name in has}
    reference = make_reference(teacher, batch=batch, bits=bits, lr=1e-3) if against else None
    with Measured(teacher, reference, seconds) as measured, suppress(Enough):
        function(teacher, measured, spec=QuantSpec(bits, bits), **known)
    return measured


def summary(measured: Measured, *, recipe: str, teacher: Teacher, batch: int, bits: int) -> dict[str, Any]:
    """What the times say."""
    best = {name: min(times) for name, times in measured.times.items()}
    device = teacher.device
    about = {"recipe": recipe, "teacher": teacher.name, "batch": batch, "bits": bits, "precision": teacher.precision,
             "device": describe_device(device), "versions": versions(), "commit": commit()}  # fmt: skip
    if "Q" not in best:  # calibration only: there is no training step
        return about | {"seconds_per_step": best, "peak_memory_bytes": peak_memory(device)}
    kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
    rates = {name: matrix_rate(kind, device, tries=12) for name, kind in kinds.items()}
    draw = min(best[f"{arm} draw"] for arm in ARMS)
    inside, outside = (best.get(f"P teacher forward{when}", 0.0) for when in (" while drawing", ""))
    forward = best["P student forward"]
    inundation = max(0.0, best["Q optimizer"] - best["P optimizer"])
    parts = {
        "source with the teacher's backward": draw - inside, "teacher forward": inside + outside,
        "student forward": forward,
        "student backward and loss": best["P own"] - forward - outside - best["P optimizer"],
        "optimizer": best["P optimizer"], "gradient inundation": inundation,
    }  # fmt: skip
    floor = measured.facts["flop"] / max(rates.values())
    result = about | {
        "turns": len(measured.times["Q"]), "seconds_per_step": best["Q"], "steps_per_second": 1 / best["Q"],
        "step_over_float_step": best["Q"] / best["F"], "student_over_float_student": best["Q own"] / best["F own"],
        "quantizer_seconds": best["P own"] - best["F own"],
        "gi_overhead": inundation / best["P"], "parts": parts, "matrix_rate": rates,
        "floor_seconds": floor, "step_over_floor": best["Q"] / floor, **measured.facts,
    }  # fmt: skip
    if "reference" in best:
        result |= {"reference_seconds": best["reference"], "speedup_over_reference": best["reference"] / best["Q"]}
    return result


def every_recipe(given: argparse.Namespace) -> dict[str, Any]:
    """Each recipe measured in a process of its own, so that peaks of memory are its own.

    Args:
        given: the command line.
    """
    found: dict[str, Any] = {"recipes": []}
    with TemporaryDirectory() as folder:
        for recipe in recipes.names():
            file = Path(folder) / f"{recipe}.json"
            command = [sys.executable, __file__, "--recipe", recipe, "--json", str(file)]
            for name in ("teacher", "batch", "bits", "cycles", "seconds", "threads", "device", "precision"):
                command += [f"--{name}", str(getattr(given, name))]
            try:
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=given.limit)
                row = json.loads(file.read_text(encoding="utf-8"))
            except subprocess.TimeoutExpired:
                row = {"recipe": recipe, "failed": f"not finished in {given.limit:.0f} s"}
            found |= {key: row.pop(key) for key in ("device", "versions", "commit") if key in row}
            found["recipes"].append(row)
            print(recipe, row.get("failed") or row.get("steps_per_second"), file=sys.stderr, flush=True)
            if given.json is not None:
                write_json_atomic(given.json, found)
    return found


def main() -> None:
    """Measure, print what was found, and write the file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="ait", choices=recipes.names())
    parser.add_argument("--teacher", default="resnet20-cifar10")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120, help="for the turns; one cycle of them is always taken")
    parser.add_argument("--limit", type=float, default=600, help="seconds of the clock per recipe, with --all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.all:
        result = every_recipe(given)
    elif given.sweep:
        result = sweep(run)
    else:
        teacher = load_teacher(given.teacher, device=given.device)
        teacher = replace(teacher, precision=choose_precision(given.precision, teacher.device))
        about = {"recipe": given.recipe, "batch": given.batch, "bits": given.bits}
        against = given.recipe in WITH_REFERENCE and teacher.device.type == "cpu"
        measured = run(teacher, cycles=given.cycles, against=against, seconds=given.seconds, **about)
        result = summary(measured, teacher=teacher, **about)
    for name, value in result.items():
        print(f"{name}: {value}")
    if given.json is not None:
        write_json_atomic(given.json, result)


if __name__ == "__main__":
    main()
