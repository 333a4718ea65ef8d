"""How a recipe's presets become numbers, and what a recipe gives back."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from zsq.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from zsq.insert import QuantReport
    from zsq.sources.base import Source

Choice = TypeVar("Choice")


class Outcome(NamedTuple):
    """What a recipe returns.

    Attributes:
        student: the quantized network, eval mode.
        report: what was quantized and what stayed float.
        source: where the images came from; held-out images for the agreement are sampled from it.
        plan: every number the presets and options settled on, JSON-able.
    """

    student: nn.Module
    report: QuantReport
    source: Source
    plan: dict[str, Any]


def choose(option: str, name: str, table: Mapping[str, Choice]) -> Choice:
    """Look up a preset by name.

    Raises:
        BadInput: if the table has no such preset.
    """
    if name not in table:
        raise BadInput(option, expected=f"one of {', '.join(table)}", got=repr(name), fix="Choose one of these.")
    return table[name]


def settle(*tables: Mapping[str, Any], **given: Any) -> SimpleNamespace:
    """Merge presets, later tables winning; a value given by the caller (not None) wins over all of them.

    Args:
        tables: preset rows, e.g. ``BUDGETS["quick"]`` and ``FIDELITY["best"]``.
        given: the caller's options; None means "as the preset says".

    Returns:
        A namespace with one attribute per name; ``vars()`` of it goes into the run's summary.

    Example:
        >>> settle({"steps": 600, "batch": 64}, steps=None, batch=32)
        namespace(steps=600, batch=32)
    """
    merged: dict[str, Any] = {}
    for table in tables:
        merged.update(table)
    merged.update({name: value for name, value in given.items() if value is not None or name not in merged})
    return SimpleNamespace(**merged)


def student_milestones(steps: int, image: tuple[int, int, int]) -> tuple[int, ...]:
    """When learning rate and flip rate decay, in student updates: the published moments, scaled to a run of `steps`.

    The papers decay at epochs 100, 200 and 300 of 400, of which the first 4 (up to 64 pixels) or 50 (above) train no
    student. Scaling the student's own part keeps the order of events when a short run spends a larger share on warm-up.

    Args:
        steps: student updates of this run.
        image: (c, h, w) of the teacher's input.

    Returns:
        Three step numbers, at least 1 each.

    Example:
        >>> student_milestones(79_200, (3, 32, 32)), student_milestones(300, (3, 32, 32))
        ((19200, 39200, 59200), (73, 148, 224))
    """
    warmup = 4 if max(image[1:]) <= 64 else 50
    return tuple(max(1, round(steps * (epoch - warmup) / (400 - warmup))) for epoch in (100, 200, 300))


def generator_budget(name: str, image: tuple[int, int, int]) -> dict[str, Any]:
    """Steps and batch of the generator family (GDFQ, Qimera, AutoReCon, AIT), by budget and image size.

    `paper` is the published schedule: 400 epochs of 200 iterations, of which 4 (up to 64 pixels) or 50 (above) train
    only the generator. The other two are ours, chosen by agreement on synthetic images (docs/findings.md).

    Args:
        name: "quick", "standard" or "paper".
        image: (c, h, w) of the teacher's input.

    Returns:
        ``warmup`` (generator-only steps), ``steps`` (student updates after them), ``batch``.

    Raises:
        BadInput: for an unknown budget.

    Source: GDFQ, Qimera and AIT, section "implementation details"; released configurations.
    """
    small = max(image[1:]) <= 64
    table = {
        "quick": {"warmup": 300, "steps": 300, "batch": 64 if small else 16},
        "standard": {"warmup": 600, "steps": 2400, "batch": 128 if small else 16},
        "paper": {"warmup": 800, "steps": 79_200, "batch": 200}
        if small
        else {"warmup": 10_000, "steps": 70_000, "batch": 16},
    }
    return dict(choose("--budget", name, table))
