"""Loss terms between two readings: kept on their device, read all at once, refused when not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import RunFailed

RESERVED = frozenset({"stage", "step", "seconds"})  # the other keys of a line of metrics.jsonl


class Meter:
    """Means of the terms that a run logs.

    Each `add` costs one small kernel; nothing is read from the device before `read`, which reads everything in one go.

    Example:
        >>> meter = Meter("fit")
        >>> meter.add(1, {"kl": torch.tensor(1.0)}); meter.add(2, {"kl": torch.tensor(3.0)})
        >>> meter.take()
        {'kl': 2.0}
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._waiting: list[tuple[int, list[str], Tensor]] = []  # values still on their device
        self._rows: list[tuple[int, dict[str, float]]] = []  # values read, not yet taken

    def add(self, step: int, terms: Mapping[str, Tensor | float]) -> None:
        """Remember the terms of one step.

        Args:
            step: number of the step, from 1.
            terms: one-element tensors or numbers; tensors are copied, so they may change afterwards.

        Raises:
            ValueError: for a reserved name or a tensor of several elements.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for name, value in terms.items():
            if name in RESERVED:
                raise ValueError(f"log: expected a name other than {', '.join(sorted(RESERVED))}, got {name!r}")
            if not isinstance(value, Tensor):
                numbers[name] = float(value)
            elif value.numel() == 1:
                tensors[name] = value.detach().reshape(()).to(torch.float32)
            else:
                raise ValueError(f"log: expected one number for {name!r}, got shape {list(value.shape)}; log its mean")
        if numbers:
            self._rows.append((step, numbers))
        if tensors:
            device = next(iter(tensors.values())).device
            together = torch.stack([value.to(device, non_blocking=True) for value in tensors.values()])
            self._waiting.append((step, list(tensors), together))

    def read(self) -> None:
        """Read what is waiting, with one copy from the device.

        Raises:
            RunFailed: if a term is not finite; it names the term, the stage and the interval.
        """
        if self._waiting:
            device = self._waiting[0][2].device
            values = iter(torch.cat([part.to(device) for _, _, part in self._waiting]).tolist())
            self._rows += [(step, {name: next(values) for name in names}) for step, names, _ in self._waiting]
            self._rows.sort(key=lambda row: row[0])  # stable: a step's terms stay in order
            self._waiting.clear()
        for step, row in self._rows:
            bad = [f"{name!r} = {value}" for name, value in row.items() if not math.isfinite(value)]
            if bad:
                first, last = self._rows[0][0], self._rows[-1][0]
                raise RunFailed(
                    f"stage {self.stage}: expected finite loss terms, got {', '.join(bad)} at step {step}"
                    f" (logged interval: steps {first} to {last})."
                )

    def take(self) -> dict[str, float]:
        """Read, return the mean of each term since the last `take`, and start anew.

        Raises:
            RunFailed: as `read`.
        """
        self.read()
        columns: dict[str, list[float]] = {}
        for _, row in self._rows:
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        self._rows.clear()
        return {name: math.fsum(values) / len(values) for name, values in columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Read, and return what a resumed run needs to write the same means."""
        self.read()
        return {"rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of an interval."""
        self._waiting.clear()
        self._rows = list(state["rows"])


def check_weights(stage: str, objects: Mapping[str, Any]) -> None:
    """Refuse weights that are not finite: a finite loss can have an infinite gradient.

    Args:
        stage: for the message.
        objects: name to object; only the parameters of modules are looked at, with one read per device.

    Raises:
        RunFailed: naming the parameter.
    """
    for name, module in objects.items():
        if not isinstance(module, nn.Module):
            continue
        weights = {key: value.detach() for key, value in module.named_parameters() if value.is_floating_point()}
        for device in {value.device for value in weights.values()}:
            here = {key: value for key, value in weights.items() if value.device == device}
            finite = torch.stack([value.isfinite().all() for value in here.values()]).tolist()
            if bad := [key for key, fine in zip(here, finite, strict=True) if not fine]:
                raise RunFailed(
                    f"stage {stage}: expected finite weights, got inf or nan in {name}: {', '.join(bad[:3])}."
                )
