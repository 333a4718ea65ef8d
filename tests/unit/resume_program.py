"""A small program of four stages, and campaigns that kill it. Run by test_resume.py in a process of its own.

    python resume_program.py FOLDER

writes FOLDER/straight (never interrupted), FOLDER/timed-N (SIGKILL at random times), FOLDER/calls-N (SIGKILL at
random system calls), FOLDER/signals (SIGTERM and SIGINT), and FOLDER/log.json (how each session ended). Every session
is a fork of this process: torch is imported once.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from zsq.checkpoint import save_tree, write_json_atomic
from zsq.errors import ZsqError
from zsq.run import Run

PULSE: list[int] = []  # in a session that will be stopped: where it writes one byte per batch


class Images:
    """A source with a network, an optimizer and a counter of its own."""

    def __init__(self) -> None:
        self.net = nn.Linear(4, 6)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        self.count = 0

    def draw(self, rng: torch.Generator) -> torch.Tensor:
        for descriptor in PULSE:
            os.write(descriptor, b".")
        x = self.net(torch.randn(5, 4, generator=rng))
        self.optimizer.zero_grad()
        (x.mean() ** 2 + (x.std() - 1) ** 2).backward()
        self.optimizer.step()
        self.count += 1
        return x.detach()

    def state_dict(self) -> dict[str, object]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.count = state["count"]


def train(run: Run, stage: str, steps: int, student: nn.Module, images: Images, **more: object) -> None:
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2], 0.5)
    objects = {"student": student, "images": images, "optimizer": optimizer, "schedule": schedule}
    for step in run.steps(stage, steps, **objects, **more):
        x = images.draw(run.rng(stage, step))
        loss = (student(x) - x.sum(1, keepdim=True)).square().mean() + 0.01 * torch.rand(())  # also ambient randomness
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.log(loss=loss, count=images.count)
        time.sleep(0.001)


def program(path: Path, *, resume: bool) -> None:
    """Four stages, one of them empty; between them the program computes from what the stage before left."""
    with Run(path, config={"steps": 20}, seed=3, resume=resume, log_every=3, checkpoint_every=4, history=4,
             progress=False) as run:  # fmt: skip
        images = Images()
        for step in run.steps("warm-up", 7, images=images):
            run.log(mean=images.draw(run.rng("warm-up", step)).mean())
        student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        trial = copy.deepcopy(student)  # the same name, "student", for another object
        train(run, "trial", 9, trial, images)
        with torch.no_grad():  # depends on the state at the end of the stage, not on a later one
            student[0].weight.mul_(1 + images.net.weight.abs().mean()).add_(trial[0].weight)
        weights = {"codes": lambda: (student[0].weight * 8).round().to(torch.int8), "latent": lambda: student[0].weight}
        train(run, "fit", 20, student, images, history_of=lambda: {name: get() for name, get in weights.items()})
        for _ in run.steps("empty", 0, student=student):
            pass
        last = torch.zeros(())
        with torch.no_grad():
            student[3].bias.add_(images.count)
        save_tree(path / "student.safetensors", {**student.state_dict(), "last": last + torch.rand(())})
        write_json_atomic(path / "summary.json", {"seconds": run.seconds})


def die_at(call: str, number: int, *, after: bool) -> Callable[[], None]:
    """Make a session kill itself at call `number` of os.`call`, before or after it took effect."""

    def arm() -> None:
        real, seen = getattr(os, call), [0]

        def deadly(*args: object) -> object:
            seen[0] += 1
            if seen[0] < number:
                return real(*args)
            if after:
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        setattr(os, call, deadly)

    return arm


def session(
    path: Path, *, resume: bool, arm: Callable[[], None] | None = None, send: tuple[int, int, float] | None = None
) -> int:
    """One fork; `send` is a signal, batches to wait for, seconds after that. Its exit code, or minus its signal."""
    stoppable = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stoppable)  # until the child can cope with them
    pulse, mine = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stoppable)
            if send is not None:
                PULSE.append(mine)
            if arm is not None:
                arm()
            program(path, resume=resume)
            code = 0
        except ZsqError as error:
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        except Exception:  # noqa: BLE001 - the parent wants an exit code, the reader a traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stoppable)
    os.close(mine)
    if send is not None:
        signum, batches, seconds = send
        for _ in range(batches):
            os.read(pulse, 1)  # returns at once when the child has ended
        time.sleep(seconds)
        os.kill(child, signum)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(pulse)
    return code


def campaign(path: Path, choose: random.Random, kind: str) -> list[int]:
    """Sessions until the program has ended; the first eight are attacked."""
    codes: list[int] = []
    while not (path / "summary.json").exists():
        arm, send = None, None
        if len(codes) < 8:
            when = choose.randint(0, 14), choose.uniform(0.0, 0.005)
            if kind == "timed":
                send = signal.SIGKILL, *when
            elif kind == "calls":
                name = choose.choice(["write", "fsync", "replace", "open", "close"])
                arm = die_at(name, choose.randint(1, 14), after=choose.random() < 0.5)
            else:
                send = (signal.SIGTERM, signal.SIGINT)[len(codes) % 2], 1 + when[0], when[1]
        codes.append(session(path, resume=(path / "config.json").exists(), arm=arm, send=send))
        if codes[-1] in (1, 2, 70):
            break
    return codes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.optim.Adam(nn.Linear(1, 1).parameters()).step()  # the first optimizer imports much: once, not in every fork
    log = {"straight": [session(folder / "straight", resume=False)]}
    for seed, name in enumerate(["timed-0", "timed-1", "timed-2", "calls-0", "calls-1", "calls-2", "signals"]):
        log[name] = campaign(folder / name, random.Random(seed), name.partition("-")[0])
    (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
