"""The run: its loop, its directory, its refusals. (Kills of real processes are in test_resume.py.)"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zsq.checkpoint import load_tree, write_json_atomic
from zsq.errors import BadInput, Interrupted, RunFailed
from zsq.run import Run


class Counter:
    """The smallest object with state."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Crash(Exception):
    """What ends a session in the middle of a step, like a kill would."""


def open_run(path: Path | None, **options: Any) -> Run:
    return Run(path, **{"progress": False, "log_every": 5, "checkpoint_every": 10, **options})


def count(run: Run, total: int = 20, *, stop_at: int | None = None, stage: str = "fit", **more: Any) -> Counter:
    """A stage that counts its steps; `stop_at` crashes in the body of that step."""
    counter = Counter()
    for step in run.steps(stage, total, counter=counter, **more):
        counter.value += 1
        if step == stop_at:
            raise Crash
        run.log(loss=torch.tensor(float(step)), half=step / 2)
    return counter


def crash(path: Path, at: int, total: int = 20, **options: Any) -> None:
    with pytest.raises(Crash), open_run(path, **options) as run:
        count(run, total, stop_at=at)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def saved(path: Path, stage: str = "000-fit") -> Any:
    return load_tree(path / "checkpoint" / f"{stage}.safetensors")


# ---- randomness


def test_rng_depends_on_seed_stage_and_step_only() -> None:
    def draw(seed: int, stage: str, step: int) -> list[float]:
        return torch.randn(3, generator=open_run(None, seed=seed).rng(stage, step)).tolist()

    base = draw(0, "fit", 1)
    torch.randn(5)
    assert draw(0, "fit", 1) == base
    assert (
        len({tuple(draw(*key)) for key in [(0, "fit", 1), (1, "fit", 1), (0, "fit1", 1), (0, "fit", 11), (0, "f", 1)]})
        == 5
    )


def test_rng_is_the_same_in_every_process() -> None:
    assert open_run(None, seed=7).rng("fit", 3).initial_seed() == 60423489106433776


def test_a_run_seeds_the_ambient_generator() -> None:
    open_run(None, seed=5)
    drawn = torch.rand(())
    torch.rand(9)
    open_run(None, seed=5)
    assert torch.rand(()) == drawn


# ---- the loop


def test_in_memory_run_yields_every_step_and_touches_no_signal() -> None:
    run = open_run(None)
    before = signal.getsignal(signal.SIGINT)
    counter, seen = Counter(), []
    for step in run.steps("fit", 7, counter=counter):
        seen.append(step)
        assert signal.getsignal(signal.SIGINT) is before
        run.log(loss=1.0)
    assert seen == list(range(7))
    assert run.path is None


def test_metrics_are_means_over_the_interval(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        count(run, 12)
    found = lines(tmp_path / "r")
    assert [(line["stage"], line["step"]) for line in found] == [("fit", 5), ("fit", 10), ("fit", 12)]
    assert [line["loss"] for line in found] == [2.0, 7.0, 10.5]
    assert [line["half"] for line in found] == [1.0, 3.5, 5.25]
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(found))


def test_terms_may_come_in_parts_and_change_afterwards(tmp_path: Path) -> None:
    buffer = torch.zeros(1)
    with open_run(tmp_path / "r", log_every=2) as run:
        for step in run.steps("fit", 2):
            buffer.fill_(step + 1)
            run.log(a=buffer)
            if step == 0:
                run.log(b=torch.tensor(3, dtype=torch.int64), c=torch.tensor(0.5, dtype=torch.bfloat16))
    (line,) = lines(tmp_path / "r")
    assert {key: line[key] for key in "abc"} == {"a": 1.5, "b": 3.0, "c": 0.5}


@pytest.mark.parametrize(
    ("terms", "message"),
    [({"step": 1.0}, "expected a name other than seconds, stage, step, got 'step'"),
     ({"loss": torch.ones(2)}, r"expected one number for 'loss', got shape \[2\]; log its mean")],
)  # fmt: skip
def test_log_refuses(terms: dict[str, Any], message: str) -> None:
    run = open_run(None)
    with pytest.raises(ValueError, match=message):
        for _ in run.steps("fit", 1):
            run.log(**terms)


def test_log_outside_the_loop() -> None:
    with pytest.raises(ValueError, match=r"log: expected to be called in the body of"):
        open_run(None).log(loss=1.0)


def test_order_of_stages_is_checked(tmp_path: Path) -> None:
    run = open_run(None)
    with pytest.raises(
        ValueError, match="stage inner: expected to begin when stage outer has ended, got 0 of its 2 steps"
    ):
        for _ in run.steps("outer", 2):
            next(iter(run.steps("inner", 1)))
    run = open_run(None)
    count(run)
    for name in ("fit", "a/b", "", "ä"):
        with pytest.raises(ValueError, match="expected a new stage name"):
            count(run, stage=name)
    with pytest.raises(ValueError, match="expected 0 steps or more, got -1"):
        count(run, -1, stage="other")
    with pytest.raises(ValueError, match="expected intervals of at least one step, got 0 and 10"):
        open_run(None, log_every=0)


def test_checkpoint_every(tmp_path: Path) -> None:
    crash(tmp_path / "a", at=9)
    assert not list((tmp_path / "a" / "checkpoint").iterdir())
    crash(tmp_path / "b", at=10)
    assert saved(tmp_path / "b")["objects"] == {"counter": {"value": 10}}
    crash(tmp_path / "c", at=7, checkpoint_seconds=0.0)  # also by the clock
    assert saved(tmp_path / "c")["step"] == 7


def test_saving_by_the_clock_changes_no_result(tmp_path: Path) -> None:
    for name, seconds in [("a", 1e9), ("b", 0.0)]:
        with open_run(tmp_path / name, checkpoint_seconds=seconds) as run:
            count(run)
    a, b = (saved(tmp_path / name) for name in "ab")
    assert (a["objects"], a["step"]) == (b["objects"], b["step"])
    for left, right in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}


# ---- resuming


def test_resume_continues_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "r"
    crash(path, at=17)
    assert [line["step"] for line in lines(path)] == [5, 10, 15]
    with open_run(path, resume=True) as run:
        assert [line["step"] for line in lines(path)] == [5, 10]  # newer than the checkpoint: dropped
        assert count(run).value == 20
        assert run.seconds > run.session_seconds
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(5, 2.0), (10, 7.0), (15, 12.0), (20, 17.0)]


def test_half_an_interval_is_resumed(tmp_path: Path) -> None:
    crash(tmp_path / "r", at=14, checkpoint_every=7)
    assert saved(tmp_path / "r")["step"] == 14
    with open_run(tmp_path / "r", resume=True) as run:
        count(run)
    assert [line["loss"] for line in lines(tmp_path / "r")] == [2.0, 7.0, 12.0, 17.0]


def test_ended_stages_give_the_state_they_had_at_their_end(tmp_path: Path) -> None:
    """Two stages with one object under one name; what the program does in between must see the first stage's end."""

    def program(run: Run, stop_at: int | None = None) -> list[int]:
        counter, seen, more = Counter(), [], Counter()
        for _ in run.steps("one", 6, counter=counter):
            counter.value += 1
        seen.append(counter.value)
        counter.value *= 10
        for step in run.steps("two", 30, counter=counter, more=more):
            counter.value += 1
            more.value += 2
            if step == stop_at:
                raise Crash
        return [*seen, counter.value, more.value]

    expected = program(open_run(None))
    assert expected == [6, 90, 60]
    for name, stop in [("early", 4), ("late", 25)]:
        with pytest.raises(Crash), open_run(tmp_path / name) as run:
            program(run, stop)
        with open_run(tmp_path / name, resume=True) as run:
            assert program(run) == expected
        with open_run(tmp_path / name, resume=True) as run:  # everything had ended, only the summary was missing
            assert program(run) == expected


def test_ambient_randomness_is_resumed(tmp_path: Path) -> None:
    def program(run: Run, stop_at: int | None = None) -> list[float]:
        for step in run.steps("one", 12):
            torch.rand(2)
            if step == stop_at:
                raise Crash
        return torch.rand(3).tolist()

    with open_run(tmp_path / "a") as run:
        expected = program(run)
    with pytest.raises(Crash), open_run(tmp_path / "b") as run:
        program(run, 10)
    with open_run(tmp_path / "b", resume=True) as run:
        assert program(run) == expected


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    for resume in (False, True, False):
        crash(tmp_path / "r", at=7, resume=resume)
        assert [line["step"] for line in lines(tmp_path / "r")] == [5]
    with open_run(tmp_path / "r", resume=True) as run:
        count(run)
    assert len(lines(tmp_path / "r")) == 4


def test_another_program_cannot_resume(tmp_path: Path) -> None:
    path = tmp_path / "r"
    crash(path, at=15)
    for stage, total, more, got in [("fit", 21, {}, "stage fit of 21 steps with counter"),
                                    ("other", 20, {}, "stage other of 20 steps with counter"),
                                    ("fit", 20, {"b": Counter()}, "stage fit of 20 steps with b, ")]:  # fmt: skip
        with (
            open_run(path, resume=True) as run,
            pytest.raises(BadInput, match=f"expected {got}.*, got stage fit of 20 steps with counter"),
        ):
            count(run, total, stage=stage, **more)
    with open_run(path, resume=True) as run, pytest.raises(BadInput, match="expected a state that fits 'counter', got"):
        for _ in run.steps("fit", 20, counter=nn.Linear(1, 1)):
            pass


def test_resuming_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r"
    with open_run(path) as run:
        count(run)
    record = json.loads((path / "config.json").read_text())
    write_json_atomic(path / "config.json", {**record, "threads": 77})
    with open_run(path, resume=True, progress=True) as run:
        count(run)
    told = capsys.readouterr()
    assert "threads differ from the run's first session (77 then, 1 now)" in told.err
    assert "fit: 20 of 20 steps were done in an earlier session" in told.err
    assert told.out == ""
    assert len(json.loads((path / "config.json").read_text())["resumed"]) == 1


# ---- not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_term_that_is_not_finite(tmp_path: Path, bad: float, as_tensor: bool) -> None:
    path = tmp_path / "r"
    with open_run(path) as run, pytest.raises(RunFailed) as caught:
        counter = Counter()
        for step in run.steps("fit", 40, counter=counter):
            counter.value += 1
            value = bad if step == 22 else 1.0
            run.log(fine=torch.tensor(1.0), kl=torch.tensor(value) if as_tensor else value)
    message = str(caught.value)
    assert "stage fit: expected finite loss terms, got 'kl' = " in message
    assert "at step 23 (logged interval: steps 21 to 25)" in message
    assert "The checkpoint after step 20 is kept." in message
    assert caught.value.exit_code == 1
    assert saved(path)["objects"] == {"counter": {"value": 20}}
    assert lines(path)[-1]["step"] == 20


def test_no_checkpoint_after_a_bad_term_of_an_unfinished_interval(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "r", log_every=100, checkpoint_every=4) as run,
        pytest.raises(
            RunFailed, match=r"at step 6 \(logged interval: steps 1 to 8\).* The checkpoint after step 4 is kept"
        ),
    ):
        for step in run.steps("fit", 40):
            run.log(kl=torch.tensor(math.nan if step == 5 else 0.0))
    assert saved(tmp_path / "r")["step"] == 4


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with (
        open_run(tmp_path / "r") as run,
        pytest.raises(
            RunFailed,
            match=r"expected finite weights, got inf or nan in student: bias.* checkpoint after step 10 is kept",
        ),
    ):
        for step in run.steps("fit", 40, student=net):
            if step == 15:
                with torch.no_grad():
                    net.bias[0] = math.inf
            run.log(loss=torch.tensor(1.0))
    assert saved(tmp_path / "r")["step"] == 10


def test_not_finite_before_the_first_checkpoint() -> None:
    run = open_run(None)
    with pytest.raises(RunFailed, match=r"'loss' = nan at step 1 \(logged interval: steps 1 to 5\)"):
        for _ in run.steps("fit", 40):
            run.log(loss=torch.tensor(math.nan))


# ---- signals


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """Own handlers, to be found again afterwards."""
    mine = {signum: (lambda *_: None) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = {signum: signal.signal(signum, handler) for signum, handler in mine.items()}
    yield mine
    for signum, handler in before.items():
        signal.signal(signum, handler)


def restored(handlers: dict[int, Any]) -> bool:
    return all(signal.getsignal(signum) is handler for signum, handler in handlers.items())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path: Path, handlers: dict[int, Any], signum: int) -> None:
    counter, finished = Counter(), 0
    with (
        open_run(tmp_path / "r") as run,
        pytest.raises(Interrupted, match="is saved after step 4 of 20; repeat") as caught,
    ):
        for step in run.steps("fit", 20, counter=counter):
            counter.value += 1
            if step == 3:
                os.kill(os.getpid(), signum)
            finished += 1
    assert caught.value.exit_code == 128 + signum
    assert finished == counter.value == 4
    assert saved(tmp_path / "r")["objects"] == {"counter": {"value": 4}}
    assert restored(handlers)
    with open_run(tmp_path / "r", resume=True) as run:
        assert count(run).value == 20


def test_a_second_interrupt_stops_at_once(tmp_path: Path, handlers: dict[int, Any]) -> None:
    with open_run(tmp_path / "r") as run, pytest.raises(Interrupted, match="The step was not finished") as caught:
        for _ in run.steps("fit", 20):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a supervisor may repeat itself
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("still in the step")
    assert caught.value.signum == signal.SIGINT
    assert restored(handlers)


def test_a_signal_during_the_last_save_is_not_lost(tmp_path: Path, handlers: dict[int, Any]) -> None:
    class Late(Counter):
        def state_dict(self) -> dict[str, int]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().state_dict()

    with open_run(tmp_path / "r") as run, pytest.raises(Interrupted, match="after step 3 of 3"):
        for _ in run.steps("fit", 3, counter=Late()):
            pass
    assert saved(tmp_path / "r")["step"] == 3
    assert restored(handlers)


def test_handlers_come_back_after_a_stage(tmp_path: Path, handlers: dict[int, Any]) -> None:
    with open_run(tmp_path / "r") as run:
        for _ in run.steps("fit", 3):
            assert not restored(handlers)
        assert restored(handlers)


def test_handlers_come_back_after_an_error(tmp_path: Path, handlers: dict[int, Any]) -> None:
    with pytest.raises(Crash), open_run(tmp_path / "r") as run:
        for _ in run.steps("fit", 3):
            assert not restored(handlers)
            raise Crash
    assert restored(handlers)


def test_an_ignored_signal_stays_ignored(tmp_path: Path, handlers: dict[int, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open_run(tmp_path / "r") as run:
        for _ in run.steps("fit", 3):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_leave_signals_alone(tmp_path: Path, handlers: dict[int, Any]) -> None:
    seen: list[bool] = []

    def work() -> None:
        with open_run(tmp_path / "r") as run:
            for _ in run.steps("fit", 2):
                seen.append(restored(handlers))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, True]


# ---- a disk that says no


def refuse_writes(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """No space for files whose name contains `text`."""
    real = os.open

    def broken(path: Any, *args: Any, **named: Any) -> int:
        if text in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **named)

    monkeypatch.setattr(os, "open", broken)


def test_disk_full_while_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    with open_run(path) as run, pytest.raises(BadInput, match=r"no space left on device. Nothing on disk was damaged"):
        for step in run.steps("fit", 20, counter=Counter()):
            if step == 15:
                refuse_writes(monkeypatch, "000-fit")
    monkeypatch.undo()
    assert saved(path)["step"] == 10
    assert [file.name for file in (path / "checkpoint").iterdir()] == ["000-fit.safetensors"]
    with open_run(path, resume=True) as run:
        assert count(run).value == 10  # the counter was not counted in the first session


def test_disk_full_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def broken(self: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **named)

    monkeypatch.setattr(Path, "open", broken)
    with (
        open_run(tmp_path / "r") as run,
        pytest.raises(BadInput, match=r"another line of metrics.jsonl, got no space left"),
    ):
        count(run)


# ---- the directory


def test_config_says_how_to_repeat_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "zsq"), "quantize", "--run", "runs/x"])
    with open_run(tmp_path / "r", config={"bits": 4, "range": (0, math.inf), "file": Path("a/b")}, seed=9) as run:
        pass
    record = json.loads((tmp_path / "r" / "config.json").read_text())
    assert record["config"] == {"bits": 4, "range": [0, "inf"], "file": "a/b"}
    assert record["command"] == ["zsq", "quantize", "--run", "runs/x"]
    assert (record["seed"], record["device"], record["threads"]) == (9, "cpu", 1)
    assert set(record["versions"]) == {"zsq", "torch", "numpy", "python"}
    assert record["hardware"].startswith("cpu (")
    assert record["fingerprint"] == run.fingerprint
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text.replace(record["hardware"], "")


def test_fingerprint_follows_everything_that_decides() -> None:
    base = open_run(None, config={"a": 1, "b": 2}).fingerprint
    assert open_run(None, config={"b": 2, "a": 1}).fingerprint == base
    assert open_run(None, config={"a": 1, "b": 3}).fingerprint != base
    assert open_run(None, config={"a": 1, "b": 2}, seed=1).fingerprint != base


def refusal(path: Path, message: str, **options: Any) -> None:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.is_dir() else {}
    with pytest.raises(BadInput, match=message) as caught:
        open_run(path, **options)
    assert caught.value.exit_code == 2
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.is_dir() else {}
    assert after == before


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r"
    crash(path, at=12, config={"bits": 4, "spec": {"placement": "paper", "leaf": []}, "old": 1})
    config = {"bits": 3, "spec": {"placement": "deploy", "leaf": []}, "new": True}
    for resume in (False, True):
        refusal(
            path,
            r"configuration it was begun with \(bits=4, new=absent, old=1, seed=0, spec.placement=paper\), "
            r"got bits=3, new=True, old=absent, seed=2, spec.placement=deploy\. Give the same options",
            config=config, seed=2, resume=resume,
        )  # fmt: skip


def test_a_checkpoint_needs_resume(tmp_path: Path) -> None:
    crash(tmp_path / "r", at=12)
    refusal(tmp_path / "r", r"those of 1 stage\(s\). Add --resume to go on with that run, or choose another --run")


def test_nothing_to_resume(tmp_path: Path) -> None:
    refusal(
        tmp_path / "r", "expected an interrupted run to resume, got nothing to resume. Leave out --resume", resume=True
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_finished_run_is_left_alone(tmp_path: Path, resume: bool) -> None:
    with open_run(tmp_path / "r") as run:
        count(run)
    write_json_atomic(tmp_path / "r" / "summary.json", {})
    refusal(tmp_path / "r", "got a finished one .* nothing to resume: .* choose another --run", resume=resume)


def test_directories_of_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    refusal(tmp_path, "expected a run of zsq, got the config.json of something else")
    (tmp_path / "config.json").write_text('{"model_type"')
    refusal(tmp_path, "config.json: expected a JSON file, got damaged text")
    (tmp_path / "config.json").unlink()
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "thesis.txt").write_text("years of work")
    refusal(tmp_path, "expected a new directory, got history without a config.json")


def test_other_files_in_the_directory_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("first try")
    with open_run(tmp_path) as run:
        count(run)


def test_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file", "expected a directory that can be written, got file exists. Choose another --run")
    refusal(tmp_path / "file" / "r", "expected a directory that can be written, got not a directory")


def test_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **named: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    refusal(tmp_path, "expected a directory that can be written, got permission denied")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_really_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refusal(tmp_path / "r", "expected a directory that can be written, got permission denied")
    refusal(tmp_path, "expected a directory that can be written, got permission denied")


def test_a_damaged_checkpoint_is_refused_and_the_directory_unlocked(tmp_path: Path) -> None:
    crash(tmp_path / "r", at=12)
    file = tmp_path / "r" / "checkpoint" / "000-fit.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(BadInput, match=r"000-fit.safetensors: .* got a truncated file"):
        open_run(tmp_path / "r", resume=True)
    file.write_bytes(whole)
    with open_run(tmp_path / "r", resume=True) as run:
        assert count(run).value == 20


TAKE = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with open_run(path):
        other = subprocess.run([sys.executable, "-c", TAKE, path / ".lock"], stdin=subprocess.DEVNULL, check=False,
                               capture_output=True, text=True)  # fmt: skip
        assert "BlockingIOError" in other.stderr
        with pytest.raises(
            BadInput, match=f"no other process uses, got one in use by process {os.getpid()}. Wait until"
        ):
            open_run(path)
    assert not (path / ".lock").exists()
    with subprocess.Popen([sys.executable, "-c", TAKE, path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other_one:  # fmt: skip
        assert other_one.stdout is not None
        assert other_one.stdout.readline() == "locked\n"
        with pytest.raises(BadInput, match="in use by process"):
            open_run(path)
        other_one.kill()  # a lock dies with its process; the file stays
    assert (path / ".lock").exists()
    with open_run(path) as run:
        count(run)


# ---- history


def test_history_at_evenly_spaced_points(tmp_path: Path) -> None:
    weight = torch.zeros(3)

    def tensors() -> dict[str, dict[str, Tensor]]:
        return {"fc.weight": {"codes": (weight * 2).to(torch.int8), "latent": weight}}

    with open_run(tmp_path / "r", history=3) as run:
        for _ in run.steps("before", 2):
            pass
        for _ in run.steps("fit", 20, history_of=tensors):
            weight += 1
        with pytest.raises(ValueError, match="stage again: expected one stage with a history, got a second one"):
            next(iter(run.steps("again", 2, history_of=tensors)))
    files = sorted((tmp_path / "r" / "history").iterdir())
    assert [file.name for file in files] == [f"{step:06d}.safetensors" for step in (0, 7, 13, 20)]
    for file in files:
        tree = load_tree(file)["fc.weight"]
        assert tree["latent"].tolist() == [float(int(file.stem))] * 3
        assert tree["codes"].tolist() == [int(file.stem) * 2] * 3
        assert b'"step":"' + str(int(file.stem)).encode() + b'"' in file.read_bytes()


def test_history_newer_than_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r"
    tensors: Callable[[], dict[str, Tensor]] = lambda: {"w": torch.zeros(1)}  # noqa: E731
    with pytest.raises(Crash), open_run(path) as run:
        count(run, stop_at=17, history_of=tensors)
    assert max(file.stem for file in (path / "history").iterdir()) == "000016"
    with open_run(path, resume=True) as run:
        loop = run.steps("fit", 20, counter=Counter(), history_of=tensors)
        assert next(iter(loop)) == 10
        assert max(file.stem for file in (path / "history").iterdir()) == "000010"
        loop.close()


def test_no_history(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", history=0) as run:
        count(run, history_of=lambda: pytest.fail("asked for a snapshot"))
    count(open_run(None), history_of=lambda: pytest.fail("asked for a snapshot"))
