"""Where the time of one AIT step goes, at the published batch of 200: source, teacher, student, quantizers, inundation.

    python bench/step_time.py --output bench/results/step_time.json

Each part is measured on its own, several times, and the best time is kept (the machine may be busy): read the shares.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from zsq import losses
from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.insert import QuantSpec, freeze_ranges, quantize, quantized_weights, without_quantizers
from zsq.inundation import GradientInundation
from zsq.machine import describe_device, versions
from zsq.recipes.gdfq import source
from zsq.teachers import load_teacher
from zsq.view import look


def best(action: Callable[[], Any], repeats: int) -> float:
    """Shortest CPU time of `action` in milliseconds, after one call to warm up."""
    action()
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        action()
        times.append(time.process_time() - begun)
    return 1000 * min(times)


def measure(teacher_name: str, *, batch: int, bits: int, repeats: int) -> dict[str, Any]:
    """Time the parts of one step.

    Returns:
        Milliseconds per part and their sum, with what was measured on.
    """
    teacher = load_teacher(teacher_name)
    torch.set_num_threads(1)  # CPU time is summed over threads
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    student, _ = quantize(teacher.net, QuantSpec(bits, bits))
    images = source(teacher, batch=batch, milestones=())
    drawn = images.draw(generator)
    student(drawn.images)
    freeze_ranges(student)
    sgd = torch.optim.SGD(student.parameters(), 1e-4, momentum=0.9, nesterov=True)

    def forward(*, quantized: bool) -> torch.Tensor:
        with nullcontext() if quantized else without_quantizers(student):
            return losses.kl(student(drawn.images), drawn.view.logits.float())

    def forward_backward(*, quantized: bool) -> None:
        sgd.zero_grad()
        forward(quantized=quantized).backward()

    with_grad = {on: best(lambda on=on: forward_backward(quantized=on), repeats) for on in (True, False)}
    only_forward = {on: best(lambda on=on: forward(quantized=on), repeats) for on in (True, False)}
    plain_step = best(sgd.step, repeats)
    inundation = GradientInundation(sgd, quantized_weights(student), flip_rate=1e-3)
    flooded_step = best(sgd.step, repeats)
    inundation.remove()
    whole_source = best(lambda: images.draw(generator), repeats)
    with torch.no_grad():
        teacher_forward = best(lambda: look(teacher.net, drawn.images), repeats)
    parts = {
        "source (generator step, with the teacher's forward and backward)": whole_source,
        "student forward, without quantizers": only_forward[False],
        "student backward, without quantizers": with_grad[False] - only_forward[False],
        "quantizers, forward and backward": with_grad[True] - with_grad[False],
        "optimizer step": plain_step,
        "gradient inundation": flooded_step - plain_step,
    }
    return {
        "teacher": teacher.name, "batch": batch, "bits": bits, "milliseconds": parts, "step": sum(parts.values()),
        "teacher_forward_float32_alone": teacher_forward, "device": describe_device("cpu"), "versions": versions(),
        "commit": commit(),
    }  # fmt: skip


def main() -> None:
    """Measure, print one line per part, and write the file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="resnet20-cifar10")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = measure(given.teacher, batch=given.batch, bits=given.bits, repeats=given.repeats)
    for part, milliseconds in [*result["milliseconds"].items(), ("whole step", result["step"])]:
        print(f"{milliseconds:9.1f} ms  {100 * milliseconds / result['step']:5.1f} %  {part}")
    if given.output is not None:
        write_json_atomic(given.output, result)


if __name__ == "__main__":
    main()
