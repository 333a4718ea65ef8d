"""Exported files of many shapes and widths in both runtimes: agreement, largest step, integer share, size, speed.

    python bench/export.py --output bench/results/export.json

Run it from the top of the repository: the untrained shapes are those of the tests. Students are only calibrated, on the
probe pool of their teacher (made from the teacher alone) or, for untrained shapes, on noise: what is measured is the
file, not the method. `--data` names the labelled set on which file and student are scored.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import zoo_export  # noqa: E402
from zsq.bench import commit  # noqa: E402
from zsq.checkpoint import write_json_atomic  # noqa: E402
from zsq.errors import ZsqError  # noqa: E402
from zsq.export import benchmark, onnx_program  # noqa: E402
from zsq.export.float_model import float_onnx  # noqa: E402
from zsq.insert import QuantSpec  # noqa: E402
from zsq.machine import describe_device, versions  # noqa: E402
from zsq.onnx_session import open_file, session  # noqa: E402
from zsq.probe import probe_pool  # noqa: E402
from zsq.teachers import Teacher, load_teacher  # noqa: E402

BITS = ((8, 8), (4, 8), (4, 4), (3, 3))
TRAINED = ("digits", "resnet20-cifar10", "resnet20-cifar100")
TARGETS = ("ort", "openvino")
KEPT = ("agreement", "images", "max_lsb", "lsb_share", "integer_conv_share", "convolutions", "size_ratio", "runtime")


def subjects() -> Iterator[tuple[str, bool, Teacher, Tensor]]:
    """Name, whether trained, teacher and images of every network."""
    for name in TRAINED:
        teacher = load_teacher(name)
        yield name, True, teacher, probe_pool(teacher)
    for name in zoo_export.NETS:
        yield f"{name} (untrained)", False, *zoo_export.teacher_of(name)


def exported(name: str, *, trained: bool, teacher: Teacher, images: Tensor, folder: Path) -> Iterator[dict[str, Any]]:
    """A row per width and target; `failure` holds the message of an export that was refused."""
    for weight_bits, act_bits in BITS:
        student = zoo_export.student_of(teacher, images, QuantSpec(weight_bits, act_bits, "deploy"))
        for target in TARGETS:
            row: dict[str, Any] = {"network": name, "trained": trained, "bits": f"W{weight_bits}A{act_bits}"}
            row |= {"target": target, "failure": None}
            try:
                found = onnx_program.write(student, teacher, images, folder / f"{target}.onnx", target=target)
                row |= {key: found[key] for key in KEPT}
            except ZsqError as error:
                row["failure"] = str(error)
            print(row, file=sys.stderr, flush=True)
            yield row


def scored(data: Path, folder: Path, bits: tuple[int, int]) -> dict[str, Any]:
    """Scores of student and file on labelled images, CIFAR-10."""
    from zsq.data import load_data
    from zsq.evaluation import label_rank

    teacher = load_teacher("resnet20-cifar10")
    pool = probe_pool(teacher)
    student = zoo_export.student_of(teacher, pool, QuantSpec(*bits, "deploy"))
    labelled = load_data(f"npz:{data}[2000:]", teacher)
    runs = {}
    for target in TARGETS:
        onnx_program.write(student, teacher, pool, folder / "m.onnx", target=target)
        runs[target] = session(open_file(folder / "m.onnx"), target)
    right = dict.fromkeys(("student", *TARGETS), 0)
    count = 0
    with torch.no_grad():
        for images, labels in labelled.batches(250):
            logits = {"student": student(images)}
            logits |= {name: torch.from_numpy(run(images.numpy()).copy()) for name, run in runs.items()}
            for name, values in logits.items():
                right[name] += int((label_rank(values, labels) == 0).sum())
            count += len(labels)
    return {
        "network": "resnet20-cifar10", "bits": f"W{bits[0]}A{bits[1]}", "data": data.name + "[2000:]", "count": count,
        **{f"{name}_score": hits / count for name, hits in right.items()},
    }  # fmt: skip


def timed(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """ResNet-18 shape at 224 pixels, batch 1, one thread, against its float file in the same runtime."""
    torch.manual_seed(0)
    net, images = zoo_export.ResNet18(64, 1000), torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        for _ in range(6):
            net.train()(images)
    teacher = Teacher(net.eval().requires_grad_(False), "resnet18", "classify", 1000, (3, 224, 224))
    float_onnx(teacher, folder / "float.onnx")
    for bits in ((8, 8), (4, 4)):
        student = zoo_export.student_of(teacher, images, QuantSpec(*bits, "deploy"))
        for target in TARGETS:
            path = folder / "m.onnx"
            # Random weights give near-tied logits: the comparison site by site holds, that of decisions means nothing.
            found = onnx_program.write(student, teacher, images, path, target=target, least_agreement=0)
            measured = benchmark.measure(path, folder / "float.onnx", target, batches=(1,), seconds=seconds)
            row = {"network": "resnet18 at 224 (untrained)", "bits": f"W{bits[0]}A{bits[1]}", **measured}
            row |= {key: found[key] for key in ("max_lsb", "integer_conv_share", "convolutions")}
            print(row, file=sys.stderr, flush=True)
            yield row


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="cifar10_test.npz")
    parser.add_argument("--seconds", type=float, default=5.0, help="per file and runtime")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"device": describe_device("cpu"), "versions": versions(), "commit": commit()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["speed"] = list(timed(folder, given.seconds))
        result["scores"] = [scored(given.data, folder, bits) for bits in ((4, 4), (3, 3))] if given.data else []
        result["files"] = []
        for name, trained, teacher, images in subjects():  # written after each: an interrupted run keeps what it has
            result["files"] += exported(name, trained=trained, teacher=teacher, images=images, folder=folder)
            write_json_atomic(given.output, result)


if __name__ == "__main__":
    main()
