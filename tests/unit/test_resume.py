"""A run that is killed and resumed, again and again, ends with the bits of one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zsq.checkpoint import load_tree

PROGRAM = Path(__file__).with_name("resume_program.py")
CAMPAIGNS = ["timed-0", "timed-1", "timed-2", "calls-0", "calls-1", "calls-2", "signals"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program and its campaigns left behind."""
    folder = tmp_path_factory.mktemp("resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True, check=False,
                          env=environment, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def sessions(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((folder / "log.json").read_text())
    return found


def test_every_campaign_ends_and_was_attacked(folder: Path) -> None:
    log = sessions(folder)
    assert log["straight"] == [0]
    for name in CAMPAIGNS:
        assert (folder / name / "summary.json").exists(), log[name]
        assert len(log[name]) > 2, log
        assert set(log[name]) <= {0, -9, -15, 130, 143}, (
            log
        )  # -15: a signal between two stages ends the process at once


def test_there_were_many_kills(folder: Path) -> None:
    assert sum(codes.count(-9) for codes in sessions(folder).values()) >= 12


def test_signals_end_with_their_code(folder: Path) -> None:
    assert {130, 143} <= set(sessions(folder)["signals"])


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_same_result_byte_for_byte(folder: Path, name: str) -> None:
    expected = (folder / "straight" / "student.safetensors").read_bytes()
    assert (folder / name / "student.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_same_history_byte_for_byte(folder: Path, name: str) -> None:
    def snapshots(run: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (folder / run / "history").iterdir()}

    expected = snapshots("straight")
    assert sorted(expected) == [f"{step:06d}.safetensors" for step in (0, 5, 10, 15, 20)]
    assert snapshots(name) == expected


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_same_metrics_but_for_the_time(folder: Path, name: str) -> None:
    def lines(run: str) -> list[dict[str, Any]]:
        text = (folder / run / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text]

    assert lines(name) == lines("straight")
    assert [(line["stage"], line["step"]) for line in lines(name)][-7:] == [
        ("fit", step) for step in (3, 6, 9, 12, 15, 18, 20)
    ]


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_same_checkpoints(folder: Path, name: str) -> None:
    def flat(tree: Any, where: str = "") -> dict[str, Any]:
        if isinstance(tree, dict):
            return {k: v for key, item in tree.items() for k, v in flat(item, f"{where}/{key}").items()}
        if isinstance(tree, list | tuple):
            return {k: v for i, item in enumerate(tree) for k, v in flat(item, f"{where}/{i}").items()}
        return {where: tree.tolist() if isinstance(tree, torch.Tensor) else tree}

    def states(run: str) -> dict[str, Any]:
        files = sorted((folder / run / "checkpoint").iterdir())
        return {file.name: flat({k: v for k, v in load_tree(file).items() if k not in ("seconds", "metrics_bytes")})
                for file in files}  # fmt: skip

    expected = states("straight")
    assert list(expected) == [
        f"{i:03d}-{name}.safetensors" for i, name in enumerate(["warm-up", "trial", "fit", "empty"])
    ]
    assert states(name) == expected


@pytest.mark.parametrize("name", ["straight", *CAMPAIGNS])
def test_nothing_is_left_behind(folder: Path, name: str) -> None:
    assert not list((folder / name).rglob(".*.tmp"))
    if sessions(folder)[name][-1] == 0:  # else the last kill came after the result, and the lock died with the process
        assert not (folder / name / ".lock").exists()


def test_sessions_are_on_record(folder: Path) -> None:
    for name, codes in sessions(folder).items():
        resumed = json.loads((folder / name / "config.json").read_text())["resumed"]
        assert len(resumed) < len(codes), name  # a session killed before it wrote its line has none
