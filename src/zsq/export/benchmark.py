"""How fast an exported file really is: both files in the same runtime, the same process and the same minutes."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zsq.errors import BadInput
from zsq.machine import cpu_model, has_vnni
from zsq.onnx_session import OnnxFile, open_file, package, runtime_version, session

BLOCK = 0.02  # seconds of one file before the other has its turn
ROUNDS = 5  # turns at least, also where one call takes long


def measure(
    quantized: Path | str,
    reference: Path | str,
    runtime: str,
    *,
    threads: int = 1,
    batches: Sequence[int] = (1, 32),
    seconds: float = 3.0,
    image: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Compare size and latency of a quantized file with its float file.

    Both stay loaded and take turns in random order, in short blocks whose first call is not counted, until each had its
    share of time; the figures are medians over all counted calls. On a busy machine the clock on the wall also counts
    the waiting for a processor, and a longer call is more often interrupted: processor time stands beside it.

    Args:
        quantized: the exported file.
        reference: the float network as ONNX.
        runtime: ``"ort"`` or ``"openvino"``.
        threads: threads of one inference.
        batches: batch sizes.
        seconds: time per file and batch size.
        image: input shape (c, h, w); only for files whose input leaves it free.

    Returns:
        Per batch size N ``latency_ms_batchN``, ``latency_ms_float_batchN`` and ``speedup_batchN`` (float time / time),
        all with float parts in float32; the same of processor time, ``cpu_ms_batchN``, ``cpu_ms_float_batchN`` and
        ``speedup_cpu_batchN`` (None with several threads, whose times add up), and ``waited_batchN``, the share of the
        time in which a call waited for a processor. With OpenVINO also ``latency_ms_bf16_batchN`` and
        ``latency_ms_float_bf16_batchN`` (None on a CPU without bf16). ``bytes``, ``float_bytes``, ``size_ratio``; what
        was measured on: ``runtime``, ``threads``, ``cpu``, ``vnni``, ``calls_batchN`` (counted calls of the file with
        the fewest).

    Raises:
        BadInput: if a file or the runtime cannot be used, or a file does not take a batch size.
    """
    files = {"": open_file(quantized), "float_": open_file(reference)}
    runners = {name: session(file, runtime, threads=threads) for name, file in files.items()}
    if runtime == "openvino" and _has_bf16():
        runners |= {f"{name}bf16_": session(f, runtime, threads=threads, precision="bf16") for name, f in files.items()}
    sizes = [Path(path).stat().st_size for path in (quantized, reference)]
    result: dict[str, Any] = {
        "runtime": runtime_version(runtime),
        "threads": threads,
        "cpu": cpu_model(),
        "vnni": has_vnni(),
        "bytes": sizes[0],
        "float_bytes": sizes[1],
        "size_ratio": sizes[1] / sizes[0],
    }
    for batch in batches:
        x = _input(list(files.values()), batch, image)
        for name, file in files.items():
            _try(runners[name], x, file)
        times = interleave({name: _call(run, x) for name, run in runners.items()}, seconds=seconds)
        names = list(files) if runtime == "ort" else [*files, "bf16_", "float_bf16_"]
        result |= _figures(times, names, batch, one_thread=threads == 1)
    return result


class Times(NamedTuple):
    """Seconds of every counted call of one file: on the wall, and of processor time over all threads."""

    wall: list[float]
    cpu: list[float]


def _figures(times: dict[str, Times], names: Sequence[str], batch: int, *, one_thread: bool) -> dict[str, Any]:
    """Medians, and what they say."""
    wall = {name: 1000 * statistics.median(own.wall) for name, own in times.items()}
    cpu = {name: 1000 * statistics.median(own.cpu) for name, own in times.items()} if one_thread else {}
    found: dict[str, Any] = {f"latency_ms_{name}batch{batch}": wall.get(name) for name in names}
    found |= {f"cpu_ms_{name}batch{batch}": cpu.get(name) for name in names}
    found[f"speedup_batch{batch}"] = wall["float_"] / wall[""]
    found[f"speedup_cpu_batch{batch}"] = cpu["float_"] / cpu[""] if cpu else None
    busy, whole = (sum(map(sum, clock)) for clock in zip(*((own.cpu, own.wall) for own in times.values()), strict=True))
    found[f"waited_batch{batch}"] = max(0.0, 1 - busy / whole) if one_thread else None
    found[f"calls_batch{batch}"] = min(len(own.wall) for own in times.values())
    return found


def interleave(calls: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, Times]:
    """Time several functions in turns.

    Args:
        calls: by name; each is called once before anything is timed.
        seconds: time that each gets at least, together with at least `ROUNDS` turns.

    Returns:
        Seconds of every counted call.
    """
    order = random.Random(0)
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(BLOCK / max(time.perf_counter() - start, 1e-6)))
    times = {name: Times([], []) for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    for turn in itertools.count(1):
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            call()  # brings its weights back into the caches
            for _ in range(repeats[name]):
                start, before = time.perf_counter(), time.process_time()
                call()
                times[name].cpu.append(time.process_time() - before)
                times[name].wall.append(time.perf_counter() - start)
        if turn >= ROUNDS and time.perf_counter() >= end:
            return times
    return times


def _call(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> Callable[[], object]:
    return lambda: run(x)


def _try(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray, file: OnnxFile) -> None:
    try:
        run(x)
    except Exception as error:  # both runtimes raise classes of their own
        raise BadInput(
            str(file.path), expected=f"a file that takes images of shape {list(x.shape)}",
            got=" ".join(str(error).split())[:200], fix="Export it with a free batch size.",
        ) from error  # fmt: skip


def _input(files: list[OnnxFile], batch: int, image: Sequence[int] | None) -> np.ndarray:
    """Noise of the shape that both files take."""
    shapes = [list(file.facts["image"]) for file in files if file.facts.get("image")]
    shape = list(image) if image is not None else next(iter(shapes), None)
    if shape is None or any(other != shape for other in shapes):
        raise BadInput(
            "benchmark", expected="two files for the same images", got=" and ".join(map(str, shapes)) or "free shapes",
            fix="Give the quantized file together with the float file it was made from, or the image shape.",
        )  # fmt: skip
    for file in files:
        if file.batch not in (None, batch):
            raise BadInput(str(file.path), expected=f"a file that takes batches of {batch}", got=f"batch {file.batch}",
                           fix="Export it with a free batch size.")  # fmt: skip
    return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)


def _has_bf16() -> bool:
    return "BF16" in package("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
