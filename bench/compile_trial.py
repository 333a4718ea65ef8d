"""What torch.compile gains and costs in a step of `ait --base gdfq`, part by part, against eager in the same run.

    python bench/compile_trial.py --json bench/results/compile_trial.json

Parts: the generator (forward and backward), the teacher with the statistics of its BatchNorm inputs (forward, and
backward to the images), the quantized student (forward and backward). Times are the minima over the turns, eager and
compiled in turns, in CPU seconds of one thread. Compiling counts as the first call's time beyond a later one's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.generators import ConditionalGenerator
from zsq.insert import QuantSpec, freeze_ranges, quantize
from zsq.machine import describe_device, versions
from zsq.quantizer import LiveMinMax, Percentile
from zsq.sources.generator import autocast
from zsq.teachers import load_teacher
from zsq.view import frozen, look

CPU = torch.device("cpu")


def plain_look(net: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and BatchNorm statistics in operations that a compiler can fuse."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.extend(torch.var_mean(args[0].float(), (0, 2, 3), correction=0))

    hooks = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    logits = net(images)
    for hook in hooks:
        hook.remove()
    return logits.float(), seen


def parts(batch: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Per part: eager as shipped, and compiled."""
    teacher = load_teacher("resnet20-cifar10")
    generator = ConditionalGenerator(teacher.classes, teacher.image).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z, labels = torch.randn(batch, 100), torch.randint(teacher.classes, (batch,))
    images = generator(z, labels).detach().requires_grad_()
    student, _ = quantize(teacher.net, QuantSpec(4, 4, weight=LiveMinMax, act=Percentile))
    student(images.detach())
    freeze_ranges(student)
    fast = {name: torch.compile(part) for name, part in
            (("generator", generator), ("look", plain_look), ("student", student))}  # fmt: skip

    def make(net: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            with autocast(CPU, "bf16"):
                made = net(z, labels)
            made.float().square().mean().backward()

        return step

    def see(seen: Callable[[], tuple[Tensor, list[Tensor]]]) -> Callable[[], None]:
        def step() -> None:
            with frozen(teacher.net):
                with autocast(CPU, "bf16"):
                    logits, norms = seen()
                (logits.square().mean() + torch.cat(norms).square().mean()).backward(inputs=[images])

        return step

    def learn(net: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: net(images.detach()).square().mean().backward()

    def shipped() -> tuple[Tensor, list[Tensor]]:
        view = look(teacher.net, images, norms=True)
        return view.logits.float(), [part for norm in view.norms for part in (norm.mean, norm.var)]

    return {
        "generator": (make(generator), make(fast["generator"])),
        "teacher": (see(shipped), see(lambda: fast["look"](teacher.net, images))),
        "student": (learn(student), learn(fast["student"])),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name, (eager, compiled) in parts(given.batch).items():
        begun = time.perf_counter()
        try:
            compiled()
        except Exception as error:  # noqa: BLE001  # a trial: what does not compile is a result
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            print(name, found[name], flush=True)
            continue
        first = time.perf_counter() - begun
        times: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(given.turns):
            for arm, step in (("eager", eager), ("compiled", compiled)):
                begun = time.process_time()
                step()
                times[arm].append(time.process_time() - begun)
        best = {arm: min(values) for arm, values in times.items()}
        found[name] = {**best, "compile_seconds": first - best["compiled"], "gain": best["eager"] / best["compiled"]}
        print(name, found[name], flush=True)
    result = {"batch": given.batch, "parts": found, "device": describe_device("cpu"), "versions": versions(),
              "commit": commit()}  # fmt: skip
    if given.json is not None:
        write_json_atomic(given.json, result)


if __name__ == "__main__":
    main()
