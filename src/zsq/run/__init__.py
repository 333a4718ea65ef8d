"""A run: the loop that logs, checks, saves, resumes and stops cleanly, so that recipes need not.

A run is a sequence of stages in program order. Each stage has one checkpoint file with the state of the objects it was
given. A resumed program runs from its first line again; each stage that had ended only gives its objects the state they
had at its end, so everything between stages sees exactly what it saw the first time.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from zsq.checkpoint import save_tree
from zsq.errors import BadInput, Interrupted, RunFailed
from zsq.run.metrics import Meter
from zsq.run.progress import progress as make_progress
from zsq.run.rundir import RunDirectory, fingerprint
from zsq.run.signals import StopSignals
from zsq.run.stage import Stage, Stateful, read_checkpoint


class Run:
    """Where progress, checkpoints and results of a recipe go.

    Creating a run also seeds torch's global generator, so that weights drawn by constructors follow the seed.

    Args:
        path: run directory (design, section 3); None keeps nothing on disk and leaves signals alone.
        config: plain data that decides the result; a directory made with another one is refused.
        seed: of everything random.
        device: where the recipe computes.
        resume: go on with the interrupted run in `path`.
        log_every: steps between two lines of metrics.jsonl, each the mean over the steps since the last.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: also save after a step when the last checkpoint is older than this.
        history: number of evenly spaced snapshots of a stage that has `history_of`, besides its start; 0 for none.
        progress: show progress on standard error.

    Attributes:
        path, seed, device, log_every: as given.
        fingerprint: SHA-256 of config, seed and device.

    Raises:
        BadInput: if the directory cannot be used (see `RunDirectory`) or its checkpoint is damaged.

    Example:
        >>> run = Run(None, progress=False)
        >>> for step in run.steps("fit", 3):
        ...     run.log(kl=torch.tensor(0.5))
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        resume: bool = False,
        log_every: int = 20,
        checkpoint_every: int = 200,
        checkpoint_seconds: float = 60.0,
        history: int = 10,
        progress: bool = True,
    ) -> None:
        if min(log_every, checkpoint_every) < 1:
            raise ValueError(f"expected intervals of at least one step, got {log_every} and {checkpoint_every}")
        self.path = None if path is None else Path(path)
        self.seed, self.device = seed, torch.device(device)
        self.log_every, self._history = log_every, history
        self._checkpoint_every, self._checkpoint_seconds = checkpoint_every, checkpoint_seconds
        self._stage: Stage | None = None  # the one whose loop is running
        self._begun: list[Stage] = []
        self._earlier, self._opened = 0.0, time.monotonic()  # seconds of earlier sessions; begin of this one
        self._saved_at = self._opened
        self._signals = StopSignals()
        self._progress = make_progress(enabled=progress)
        self._directory: RunDirectory | None = None
        if self.path is None:
            self.fingerprint = fingerprint({"seed": seed, "device": self.device.type, **(config or {})})
        else:
            self._directory = RunDirectory(self.path, config or {}, seed=seed, device=self.device, resume=resume)
            self.fingerprint = self._directory.fingerprint
            self._rewind(self._directory)
        torch.manual_seed(seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the directory; what is on disk stays."""
        self._progress.stop()
        self._signals.restore()
        if self._directory is not None:
            self._directory.close()

    @property
    def session_seconds(self) -> float:
        """Seconds since this run was opened."""
        return time.monotonic() - self._opened

    @property
    def seconds(self) -> float:
        """Seconds that the run took so far, earlier sessions (up to their last checkpoint) included."""
        return self._earlier + self.session_seconds

    def rng(self, stage: str, step: int) -> torch.Generator:
        """Stateless randomness: the same generator for the same seed, stage and step, whatever ran before.

        Args:
            stage: name of the stage.
            step: number of the step.

        Returns:
            A generator on the CPU, so that all devices get the same numbers. (torch's CPU generator uses 32 bits of the
            seed: among 100,000 steps about one pair shares its numbers, which harms nothing.)
        """
        digest = hashlib.blake2b(f"{self.seed}\0{stage}\0{step}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def note(self, text: str) -> None:
        """Show a line beside the progress bar; it is not recorded."""
        self._progress.note(text)

    def log(self, **terms: Tensor | float) -> None:
        """Note loss terms of the current step; may be called several times per step.

        Args:
            **terms: one-element tensors (read only when a line is written) or numbers.

        Raises:
            ValueError: outside `steps`, for a reserved name, or for a tensor of several elements.
        """
        if self._stage is None:
            raise ValueError("log: expected to be called in the body of a `for step in run.steps(...)` loop")
        self._stage.meter.add(self._stage.done + 1, terms)

    def steps(
        self,
        stage: str,
        total: int,
        *,
        history_of: Callable[[], Mapping[str, Any]] | None = None,
        **stateful: Stateful,
    ) -> Iterator[int]:
        """The loop of a stage: yields 0 to total - 1, and logs, checks, saves and shows progress after each body.

        A resumed run first gives `stateful` its saved state, then yields the steps that are left: none if the stage had
        ended.

        Args:
            stage: name, unique within the run; letters, digits, ``.``, ``_`` and ``-``.
            total: number of steps.
            history_of: gives the tensors of one history snapshot, e.g. integer codes and latent weights.
            **stateful: everything that the body changes and a later step needs.

        Yields:
            Step numbers.

        Raises:
            RunFailed: if a logged term or a weight is not finite; the last good checkpoint is kept.
            Interrupted: after SIGINT or SIGTERM, once the step is finished and saved.
            BadInput: if the disk refuses a checkpoint, or the one found does not fit the program.
        """
        active = self._enter(stage, total, stateful, history_of)
        try:
            if active.saved == total:
                self._progress.note(f"{stage}: {total} of {total} steps were done in an earlier session")
                return
            self._progress.start(stage, total, active.done)
            with nullcontext() if self._directory is None else self._signals:
                if active.done == 0:
                    self._snapshot(active)
                    if total == 0:
                        self._save(active)
                for step in range(active.done, total):
                    yield step
                    active.done = step + 1
                    self._after(active)
            self._stop(active)  # a signal during the last save
        finally:
            self._stage = None
            self._progress.stop()

    def _enter(
        self, name: str, total: int, objects: dict[str, Any], history_of: Callable[[], Mapping[str, Any]] | None
    ) -> Stage:
        """Check the program, restore the objects, and make the stage current."""
        if self._begun and self._begun[-1].done < self._begun[-1].total:
            before = self._begun[-1]
            raise ValueError(
                f"stage {name}: expected to begin when stage {before.name} has ended,"
                f" got {before.done} of its {before.total} steps"
            )
        if name in [other.name for other in self._begun] or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise ValueError(f"expected a new stage name of letters, digits, '.', '_' and '-', got {name!r}")
        if total < 0:
            raise ValueError(f"stage {name}: expected 0 steps or more, got {total}")
        if history_of is not None and any(other.history_of is not None for other in self._begun):
            raise ValueError(f"stage {name}: expected one stage with a history, got a second one")
        stage = Stage(name, total, len(self._begun), objects, history_of, Meter(name))
        self._begun.append(stage)
        self._restore(stage)
        if self._directory is not None and history_of is not None and self._history > 0:
            stage.points = {round(total * i / self._history) for i in range(self._history + 1)}
            self._directory.forget_snapshots(after=-1 if stage.saved is None else stage.saved)
        self._stage = stage
        return stage

    def _after(self, stage: Stage) -> None:
        """What follows the body of a step."""
        stop, last = self._signals.signum, stage.done == stage.total
        logged = last or stage.done % self.log_every == 0
        try:
            means = stage.meter.take() if logged else None
            if means is not None and self._directory is not None:
                line = {"stage": stage.name, "step": stage.done, **means, "seconds": round(self.seconds, 3)}
                self._directory.append_metrics(line)
            self._progress.update(stage.done, means)
            self._snapshot(stage)
            late = time.monotonic() - self._saved_at >= self._checkpoint_seconds
            if stop is not None or last or late or stage.done % self._checkpoint_every == 0:
                self._save(stage)
        except RunFailed as error:
            raise RunFailed(f"{error} {self._kept(stage)}") from error
        if stop is not None:
            self._stop(stage)

    def _stop(self, stage: Stage) -> None:
        """Give in to a signal, if one arrived; the stage is saved."""
        if self._directory is not None and self._signals.signum is not None:
            where = f"Stage {stage.name} is saved after step {stage.done} of {stage.total}"
            raise Interrupted(self._signals.signum, f"{where}; repeat the command with --resume.")

    def _kept(self, stage: Stage) -> str:
        advice = "Try a lower learning rate, or more bits."
        if self._directory is None:
            return advice
        if stage.saved is None:
            return f"No checkpoint of this stage was written before. {advice}"
        return f"The checkpoint after step {stage.saved} is kept. {advice}"

    def _snapshot(self, stage: Stage) -> None:
        """Write the history if this step is one of its points."""
        if self._directory is not None and stage.history_of is not None and stage.done in stage.points:
            stage.meter.read()
            facts = {"stage": stage.name, "step": str(stage.done), "total": str(stage.total)}
            save_tree(self._directory.snapshot_of(stage.done), dict(stage.history_of()), metadata=facts)

    def _save(self, stage: Stage) -> None:
        """Write the checkpoint of the stage, if everything in it is finite."""
        stage.check()
        if self._directory is not None:
            file = self._directory.checkpoint_of(stage.position, stage.name)
            size = self._directory.settle_metrics()
            stage.save(file, device=self.device, seconds=self.seconds, metrics_bytes=size)
            self._saved_at = time.monotonic()

    def _rewind(self, directory: RunDirectory) -> None:
        """Drop what was logged after the last checkpoint."""
        try:
            if files := directory.checkpoints():
                directory.cut_metrics(read_checkpoint(files[-1])["metrics_bytes"])
        except BadInput:
            directory.close()
            raise
        for text in directory.notes:
            self._progress.note(text)

    def _restore(self, stage: Stage) -> None:
        """Give the objects of a stage what an earlier session saved, if it did."""
        files = [] if self._directory is None else self._directory.checkpoints()
        if stage.position < len(files):
            self._earlier = stage.restore(files[stage.position], device=self.device)
