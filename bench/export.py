"""Exported files in both runtimes: agreement with the student, largest step, integer share, size, score, speed.

    python bench/export.py files --output bench/results/export.json     # what the files compute
    python bench/export.py speed --output bench/results/export.json     # how fast they are
    python bench/export.py bound --output bench/results/export.json     # and single layers of the same shapes

Trained students are the runs of bench/export_runs.toml, which are made where they are missing; real networks without a
training run, and shapes with random weights, are only calibrated: what is measured is the file, not the method. Rows
that the output file holds already are kept unless ``--only`` names their network or width: the work can be split.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export_subjects import STACKS, Made, Subject, shape, stack, stack_operations, student_of, subjects
from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.errors import ZsqError
from zsq.export import benchmark, onnx_program
from zsq.export.float_model import float_onnx
from zsq.machine import describe_device, versions
from zsq.onnx_session import open_file, runtime_version, session
from zsq.teachers import Teacher, load_teacher

TARGETS = ("ort", "openvino")
KEPT = (
    "agreement", "images", "max_lsb", "lsb_share", "integer_conv_share", "convolutions", "float_convolutions",
    "size_ratio", "bytes", "runtime",
)  # fmt: skip
TIMED = ("ResNet-18 shape", "MobileNetV2 shape", "SE and Hardswish", "resnet20-cifar10")
TIMED_BITS = ((8, 8), (4, 4))

Row = dict[str, Any]


def file_rows(subject: Subject, folder: Path) -> Iterator[Row]:
    """A row per runtime: what the export says of its file, and what the file does on labelled images.

    An export that is refused is a row with the message as its ``failure``; for agreement below the bar alone none is
    refused here: ``agreement`` and ``labelled_agreement`` say what it is.
    """
    made = subject.make()
    rows: dict[str, Row] = {}
    for target in TARGETS:
        row: Row = {"network": subject.network, "students": subject.students, "bits": subject.width, "target": target}
        row |= {"failure": None}
        try:
            found = onnx_program.write(
                made.student, made.teacher, made.images, folder / f"{target}.onnx", target=target, least_agreement=0
            )
            row |= {key: found[key] for key in KEPT}
        except ZsqError as error:
            row["failure"] = str(error)
        rows[target] = row
    working = [target for target, row in rows.items() if row["failure"] is None]
    if made.data is not None and working:
        for target, scores in scored(made, {t: folder / f"{t}.onnx" for t in working}).items():
            rows[target] |= scores
    yield from rows.values()


def scored(made: Made, files: dict[str, Path]) -> dict[str, Row]:
    """Scores of student and files on the same labelled images, and how often each file decides as the student."""
    assert made.data is not None
    task, threads = made.teacher.outputs, torch.get_num_threads()
    runs = {target: session(open_file(path), target, threads=threads) for target, path in files.items()}
    own, meters = task.scored(), {target: (task.scored(), task.compared()) for target in runs}
    made.student.eval()
    with torch.no_grad():
        for images, truth in made.data.batches(task.batch):
            raw = made.student(images)
            own.add(raw, truth)
            for target, run in runs.items():
                theirs = torch.from_numpy(run(images.contiguous().numpy()).copy())
                meters[target][0].add(theirs, truth)
                meters[target][1].add(theirs, raw)
    student = own.result()
    return {
        target: {
            "metric": student.metric, "data": made.data.name, "data_sha256": made.data.sha256, "count": student.count,
            "student_score": student.value, "file_score": score.result().value,
            "labelled_agreement": same.result().value,
        }
        for target, (score, same) in meters.items()
    }  # fmt: skip


def speed_rows(name: str, bits: tuple[int, int], folder: Path, seconds: float) -> Iterator[Row]:
    """A row per runtime: sizes and latencies of a file and its float network, in turns."""
    teacher, images = embedded(name) if name in ("resnet20-cifar10",) else shape(name)
    student: nn.Module = student_of(teacher, images, bits)
    float_onnx(teacher, folder / "float.onnx")
    for target in TARGETS:
        path = folder / f"{target}.onnx"
        found = onnx_program.write(student, teacher, images, path, target=target, least_agreement=0)
        row: Row = {"network": name, "students": "calibrated", "bits": "W{}A{}".format(*bits), "target": target}
        row |= {key: found[key] for key in ("integer_conv_share", "convolutions", "max_lsb")}
        yield row | benchmark.measure(path, folder / "float.onnx", target, seconds=seconds)


def bound_rows(name: str, bits: tuple[int, int], folder: Path, seconds: float) -> Iterator[Row]:
    """A row per runtime: operations per second of one layer's kernels, in float32 and on integers."""
    teacher, images = stack(name)
    student: nn.Module = student_of(teacher, images, bits)
    float_onnx(teacher, folder / "float.onnx")
    work = stack_operations(name)
    for target in TARGETS:
        path = folder / f"{target}.onnx"
        found = onnx_program.write(student, teacher, images, path, target=target, least_agreement=0)
        measured = benchmark.measure(path, folder / "float.onnx", target, batches=(1,), seconds=seconds)
        rates = {
            f"{kind}_per_second": 1000 * work / measured[f"cpu_ms_{key}batch1"]
            for kind, key in {"integer": "", "float": "float_"}.items()
        }
        yield {
            "network": name, "bits": "W{}A{}".format(*bits), "target": target, "operations": work, **rates,
            "ratio": rates["integer_per_second"] / rates["float_per_second"],
            **{key: found[key] for key in ("integer_conv_share", "convolutions")},
            **{key: measured[key] for key in ("runtime", "threads", "cpu", "vnni", "waited_batch1", "calls_batch1")},
        }  # fmt: skip


def embedded(name: str) -> tuple[Teacher, Tensor]:
    """A teacher of the package, and noise to take ranges from: they do not change the speed."""
    teacher = load_teacher(name)
    return teacher, torch.randn(32, *teacher.image, generator=torch.Generator().manual_seed(0))


def provenance() -> Row:
    """What a row was made with."""
    return {
        "commit": commit(), "device": describe_device("cpu"),
        "versions": versions() | dict(runtime_version(target).split() for target in TARGETS),
    }  # fmt: skip


def jobs(what: str, runs: Path, seconds: float) -> dict[str, Callable[[Path], Iterator[Row]]]:
    """What there is to measure, by network and width: functions of a folder for their files."""
    if what == "files":
        made = sorted(subjects(runs), key=lambda subject: subject.bits, reverse=True)
        return {f"{subject.network} {subject.width}": partial(file_rows, subject) for subject in made}
    names, rows = (TIMED, speed_rows) if what == "speed" else (tuple(STACKS), bound_rows)
    widths = TIMED_BITS if what == "speed" else TIMED_BITS[:1]
    return {f"{n} W{b[0]}A{b[1]}": partial(rows, n, b, seconds=seconds) for n in names for b in widths}


def merged(before: list[Row], new: list[Row], order: list[str]) -> list[Row]:
    """Rows of a result file after some were made again: networks in the given order, for each the given widths."""
    rows = {(f"{row['network']} {row['bits']}", row["target"]): row for row in [*before, *new]}
    networks = list(dict.fromkeys(text.rpartition(" ")[0] for text in order))

    def place(item: tuple[tuple[str, str], Row]) -> tuple[int, ...]:
        (text, target), row = item
        return networks.index(row["network"]), order.index(text), TARGETS.index(target)

    return [row for _, row in sorted((item for item in rows.items() if item[0][0] in order), key=place)]


def wanted(text: str, only: list[str], rows: list[Row]) -> bool:
    """Whether something is measured in this call: what was asked for, or else what is missing."""
    if only:
        return any(word in text for word in only)
    return not any(f"{row['network']} {row['bits']}" == text for row in rows)


def main() -> None:
    """Measure, and write the file after every subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["files", "speed", "bound"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/export"), help="folder of the trained runs")
    parser.add_argument("--only", nargs="*", default=[], help='parts of "NETWORK W4A4" to measure (again)')
    parser.add_argument("--seconds", type=float, default=5.0, help="per file, runtime and batch size")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: Row = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}
    rows: list[Row] = result.get(given.what, [])
    todo = jobs(given.what, given.runs, given.seconds)
    for text, measure in todo.items():
        if not wanted(text, given.only, rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            new = [row | provenance() for row in measure(Path(folder))]
        for row in new:
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows = merged(rows, new, list(todo))
        write_json_atomic(given.output, result | {given.what: rows})
        result[given.what] = rows


if __name__ == "__main__":
    main()
