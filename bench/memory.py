"""Peak memory of `ait --base gdfq` on the shape of a ResNet-50 at 224 pixels, with and without `--micro-batch`.

    python bench/memory.py --json bench/results/memory_resnet50.json

The network has ResNet-50's layers (25.6 M parameters, 1000 classes) and random weights whose BatchNorm statistics
are those of noise: what a step takes does not depend on what the weights know. Each case runs in a process of its own,
with the published batch of 16: one step of the generator alone, then two with the student. Peak memory is that of the
whole process, interpreter and libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.insert import QuantSpec
from zsq.machine import describe_device, versions
from zsq.recipes.ait import ait
from zsq.run import Run
from zsq.teachers import Teacher

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; the last widens four times."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50's layers, random weights, the BatchNorm statistics of noise."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count in STAGES:
        for index in range(count):
            layers.append(Bottleneck(inputs, width, 2 if index == 0 and width > 64 else 1))
            inputs = 4 * width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 224, 224))
    return net.eval().requires_grad_(False)


def case(batch: int, micro_batch: int | None) -> dict[str, Any]:
    """Three steps; what they took."""
    torch.set_num_threads(1)
    net = resnet50()
    teacher = Teacher(net, "resnet50 shape", "classify", 1000, (3, 224, 224))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begun = time.process_time()
    with Run(None, progress=False) as run:
        ait(teacher, run, spec=QuantSpec(4, 4), warmup=1, steps=2, batch=batch, micro_batch=micro_batch)
    return {"batch": batch, "micro_batch": micro_batch, "parameters": sum(p.numel() for p in net.parameters()),
            "before_bytes": before, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "cpu_seconds": time.process_time() - begun}  # fmt: skip


def main() -> None:
    """Every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, nargs="*", default=[0, 4])
    parser.add_argument("--only", type=int, help="run one case here: the size of a part, 0 for no parts")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.only is not None:
        print(json.dumps(case(given.batch, given.only or None)))
        return
    rows = []
    for size in given.micro_batch:
        command = [sys.executable, __file__, "--batch", str(given.batch), "--only", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if given.json is not None:
        about = {"image": [3, 224, 224], "recipe": "ait --base gdfq", "device": describe_device("cpu")}
        write_json_atomic(given.json, {"cases": rows, **about, "versions": versions(), "commit": commit()})


if __name__ == "__main__":
    main()
