"""A run directory on disk: one owner at a time, one configuration, and what is where (design, section 3)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from zsq import machine
from zsq.checkpoint import TEMPORARY, plain, read_json, write_json_atomic
from zsq.errors import BadInput

LOCK = ".lock"
OWNED = ("metrics.jsonl", "checkpoint", "history", "summary.json", "student.safetensors")  # never without config.json


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, independent of the order of its keys.

    Example:
        >>> fingerprint({"a": 1, "b": 2.0}) == fingerprint({"b": 2.0, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


class RunDirectory:
    """An open run directory, locked until `close`.

    Args:
        path: the directory; made if it does not exist.
        config: plain data that decides the result.
        seed: of the run.
        device: where the run computes; like config and seed, another one must not continue this run.
        resume: go on with an interrupted run.

    Attributes:
        path: as given.
        fingerprint: SHA-256 of configuration, seed and device.
        notes: sentences the user should see.

    Raises:
        BadInput: if the directory cannot be written, is in use, is finished, belongs to another configuration or to
            something else, holds a checkpoint although `resume` is False, or holds nothing although it is True.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, seed: int, device: torch.device, resume: bool) -> None:
        self.path = path
        self.notes: list[str] = []
        self._lock: int | None = None
        facts = {"seed": seed, "device": device.type, **plain(config)}
        self.fingerprint = fingerprint(facts)
        if resume and not (path / "config.json").exists():
            self._refuse("an interrupted run to resume", "nothing to resume", "Leave out --resume, or correct --run.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._check(facts, resume=resume)
            self._begin(plain(config), seed=seed, device=device)
        except OSError as error:
            self.close()
            self._refuse("a directory that can be written", _words(error), "Choose another --run.", error)
        except BadInput:
            self.close()
            raise

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)  # while still locked: see _lock
            os.close(self._lock)
            self._lock = None

    def checkpoints(self) -> list[Path]:
        """One file per stage that was begun, in their order."""
        return sorted((self.path / "checkpoint").glob("*.safetensors"))

    def checkpoint_of(self, position: int, stage: str) -> Path:
        """Where the state of a stage is kept."""
        return self.path / "checkpoint" / f"{position:03d}-{stage}.safetensors"

    def snapshot_of(self, step: int) -> Path:
        """Where the history keeps the weights after a step."""
        return self.path / "history" / f"{step:06d}.safetensors"

    def forget_snapshots(self, *, after: int) -> None:
        """Remove the history newer than a step."""
        for file in (self.path / "history").glob("*.safetensors"):
            if int(file.stem) > after:
                file.unlink()

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl.

        Raises:
            BadInput: if the file system refuses.
        """
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            fix = "The last checkpoint is intact. Make room, then repeat the command with --resume."
            self._refuse("space for another line of metrics.jsonl", _words(error), fix, error)

    def settle_metrics(self) -> int:
        """Wait until metrics.jsonl is on the disk; its size in bytes."""
        if not self._metrics.exists():
            return 0
        with self._metrics.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def cut_metrics(self, size: int) -> None:
        """Drop what was written to metrics.jsonl after its first `size` bytes."""
        if self._metrics.exists() and self._metrics.stat().st_size > size:
            os.truncate(self._metrics, size)

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _refuse(self, expected: str, got: str, fix: str, cause: Exception | None = None) -> NoReturn:
        raise BadInput(f"run directory {self.path}", expected=expected, got=got, fix=fix) from cause

    def _check(self, facts: Mapping[str, Any], *, resume: bool) -> None:
        """Refuse whatever this run would damage."""
        if not (self.path / "config.json").exists():
            if foreign := [name for name in OWNED if (self.path / name).exists()]:
                self._refuse("a new directory", f"{', '.join(foreign)} without a config.json", "Choose another --run.")
            return
        old = read_json(self.path / "config.json")
        if not isinstance(old, dict) or not {"config", "seed", "device", "fingerprint"} <= set(old):
            self._refuse("a run of zsq", "the config.json of something else", "Choose another --run.")
        before, now = _differences({"seed": old["seed"], "device": old["device"], **old["config"]}, facts)
        if before or now:
            self._refuse(
                f"the configuration it was begun with ({before})", now, "Give the same options, or another --run."
            )
        if (self.path / "summary.json").exists():
            self._refuse("an unfinished run", "a finished one (it has its summary.json)",
                         "There is nothing to resume: read its result, or choose another --run.")  # fmt: skip
        if self.checkpoints() and not resume:
            self._refuse("a directory without checkpoints", f"those of {len(self.checkpoints())} stage(s)",
                         "Add --resume to go on with that run, or choose another --run.")  # fmt: skip

    def _begin(self, config: Mapping[str, Any], *, seed: int, device: torch.device) -> None:
        """Write down this start, and remove what a killed one left half done."""
        file, session = self.path / "config.json", provenance(device)
        if file.exists():
            record = read_json(file)
            for key in ("threads", "versions", "hardware"):
                if record.get(key) != session[key]:
                    self.notes.append(
                        f"{key} differ from the run's first session ({record.get(key)} then, {session[key]} now):"
                        " the result may differ in the last bits from an uninterrupted run."
                    )
            write_json_atomic(file, {**record, "resumed": [*record.get("resumed", []), session]})
        else:  # before everything else: without it the rest would look like somebody else's
            facts = {"config": config, "seed": seed, "device": device.type, "fingerprint": self.fingerprint}
            write_json_atomic(file, {**facts, **session, "resumed": []})
        for name in (".", "checkpoint", "history"):
            (self.path / name).mkdir(exist_ok=True)
            for left in (self.path / name).glob(f".*{TEMPORARY}"):
                left.unlink()
        if not self.checkpoints():  # begun and killed before the first one: begin again
            self.cut_metrics(0)
            self.forget_snapshots(after=-1)


def provenance(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides its configuration: command line, versions, threads, machine."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],  # the name only: where it is installed is nobody's business
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "hardware": machine.describe_device(device),
    }


def _lock(folder: Path) -> int:
    """Lock a folder for this process; the kernel lets go when the process ends, however it ends.

    The file is removed by its owner while locked, so a lock on a file that is no longer the one in the folder is void.
    """
    file = folder / LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode("ascii", "replace")
            os.close(descriptor)
            raise BadInput(
                f"run directory {folder}",
                expected="a directory that no other process uses",
                got=f"one in use by process {owner or '(unknown)'}",
                fix="Wait until it ends, or choose another --run.",
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
    """The keys that differ, with their values in each."""
    before, now = _flat(old), _flat(new)
    keys = sorted(key for key in {*before, *now} if before.get(key, ...) != now.get(key, ...))
    return tuple(", ".join(f"{k}={side.get(k, 'absent')}" for k in keys) for side in (before, now))  # type: ignore[return-value]
