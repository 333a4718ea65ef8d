"""Progress goes to standard error, in the form that fits it."""

from __future__ import annotations

import io
import sys

import pytest

from zsq.run import Run
from zsq.run.progress import Bar, Lines, Silent, progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str], seconds_per_step: float, total: int, done: int = 0) -> list[str]:
    clock = Clock()
    shown = Lines(clock)
    shown.start("fit", total, done)
    for step in range(done, total):
        clock.now += seconds_per_step
        shown.update(step + 1, {"kl": 1 / (step + 1)} if (step + 1) % 5 == 0 else None)
    shown.stop()
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.splitlines()


def test_a_quick_stage_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, 0.01, 100) == ["fit 100/100  0:01 min  kl 0.01"]


def test_a_tenth_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, 1.5, 100)
    assert len(lines) == 10
    assert lines[0] == "fit 10/100  2:15 min left  kl 0.1"
    assert lines[-1] == "fit 100/100  2:30 min  kl 0.01"


def test_never_silent_for_more_than_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, 30.0, 1000)
    assert len(lines) == 500
    assert lines[0] == "fit 2/1000  8:19 h left"


def test_time_left_counts_this_session_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, 15.0, 40, done=30)[0] == "fit 34/40  1:30 min left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_form_follows_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress(enabled=False), Silent)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress(), Lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(progress(), Bar)


def test_a_live_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    run = Run(None, log_every=2)
    for _ in run.steps("calibrate", 4):
        run.log(kl=0.25)
    text = terminal.getvalue()
    assert "calibrate" in text
    assert "4/4" in text
    assert "kl 0.25" in text
    assert capsys.readouterr().out == ""


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Run(None, progress=False).steps("fit", 3):
        pass
    assert capsys.readouterr() == ("", "")
