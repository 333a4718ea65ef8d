"""One stage of a run: its objects, how far it is, and how both are saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from zsq.checkpoint import load_tree, save_tree
from zsq.errors import BadInput
from zsq.run.metrics import Meter, check_weights

KEYS = frozenset({"stage", "step", "total", "seconds", "metrics_bytes", "meter", "rng", "rng_gpu", "objects"})


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, a schedule, a source."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class Stage:
    """A stage while it runs.

    Attributes:
        name: unique within the run.
        total: number of steps.
        position: 0 for the first stage of the program.
        objects: name to object with state.
        history_of: gives the tensors of a snapshot, or None.
        meter: loss terms since the last line of metrics.jsonl.
        done: finished steps.
        saved: finished steps that the checkpoint on disk holds; None without one.
        points: numbers of finished steps at which the history is written.
    """

    name: str
    total: int
    position: int
    objects: Mapping[str, Stateful]
    history_of: Callable[[], Mapping[str, Any]] | None
    meter: Meter
    done: int = 0
    saved: int | None = None
    points: set[int] = field(default_factory=set)

    def check(self) -> None:
        """Read what was logged and look at the weights.

        Raises:
            RunFailed: if anything is not finite.
        """
        self.meter.read()
        check_weights(self.name, self.objects)

    def save(self, file: Path, *, device: torch.device, seconds: float, metrics_bytes: int) -> None:
        """Write the checkpoint.

        Args:
            file: where to.
            device: whose random state to keep besides the CPU's.
            seconds: that the run took so far.
            metrics_bytes: size of metrics.jsonl that belongs to this state.

        Raises:
            BadInput: if the file system refuses; the previous checkpoint is intact then.
        """
        tree = {
            "stage": self.name,
            "step": self.done,
            "total": self.total,
            "seconds": seconds,
            "metrics_bytes": metrics_bytes,
            "meter": self.meter.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_gpu": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "objects": {name: thing.state_dict() for name, thing in self.objects.items()},
        }
        save_tree(file, tree)
        self.saved = self.done

    def restore(self, file: Path, *, device: torch.device) -> float:
        """Give the objects the state in a checkpoint.

        Args:
            file: the checkpoint.
            device: whose random state to restore besides the CPU's.

        Returns:
            Seconds that the run had taken.

        Raises:
            BadInput: if the file is damaged or belongs to another program.
        """
        tree = read_checkpoint(file)
        fix = "Resume with the version of the program that began the run, or choose another --run."
        mine, found = _facts(self.name, self.total, self.objects), _facts(tree["stage"], tree["total"], tree["objects"])
        if mine != found:
            raise BadInput(str(file), expected=mine, got=found, fix=fix)
        for name, thing in self.objects.items():
            try:
                thing.load_state_dict(tree["objects"][name])
            except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                got = " ".join(str(error).split())[:300]
                raise BadInput(str(file), expected=f"a state that fits {name!r}", got=got, fix=fix) from error
        self.meter.load_state_dict(tree["meter"])
        torch.set_rng_state(tree["rng"])
        if tree["rng_gpu"] is not None:
            torch.cuda.set_rng_state(tree["rng_gpu"], device)
        self.done = self.saved = tree["step"]
        return float(tree["seconds"])


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint that `Stage.save` wrote.

    Raises:
        BadInput: if it is damaged or something else.
    """
    tree = load_tree(file)
    if not isinstance(tree, dict) or not set(tree) >= KEYS:
        raise BadInput(str(file), expected="the checkpoint of a run", got="other data", fix="Choose another --run.")
    return tree


def _facts(stage: str, total: int, objects: Mapping[str, Any]) -> str:
    return f"stage {stage} of {total} steps with {', '.join(sorted(objects)) or 'no state'}"
