"""How a recipe's presets become numbers, and what a recipe gives back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from zsq.errors import BadInput
from zsq.quantizer import MseRange, Percentile, RunningMinMax, WideningMinMax

if TYPE_CHECKING:
    from torch import nn

    from zsq.insert import QuantReport
    from zsq.sources.base import Source

Choice = TypeVar("Choice")

# Activation ranges by name. The share of the percentile is a first value, not a searched one (docs/findings.md).
RANGES: dict[str, Callable[..., Any]] = {
    "percentile": partial(Percentile, share=0.999),
    "ema": RunningMinMax,
    "mse": MseRange,
    "cubed": partial(MseRange, power=3.0),
    "official": partial(RunningMinMax, correction="official"),
    "widening": WideningMinMax,
}


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

    Raises:
        BadInput: for a given number that is negative or not finite.

    Example:
        >>> settle({"steps": 600, "batch": 64}, steps=None, batch=32)
        namespace(steps=600, batch=32)
    """
    for name, value in given.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise BadInput(option, expected="a number from 0", got=value, fix="Correct it, or leave it out.")
    merged: dict[str, Any] = {}
    for table in tables:
        merged.update(table)
    merged.update({name: value for name, value in given.items() if value is not None or name not in merged})
    return SimpleNamespace(**merged)


def feed(
    images: Source | None, make: Callable[[], Source], *, batch: int, say: Callable[[str], None] | None = None
) -> Source:
    """Give the source of a recipe: the caller's images if there are any, else its own.

    Args:
        images: another source, or None.
        make: makes the recipe's own.
        batch: images per draw that the recipe settled on; the caller's source then draws as many.
        say: is told what a step of the recipe's own source costs, where it knows.

    Raises:
        BadInput: for an empty batch.
    """
    if images is None:
        made = make()
        cost = getattr(made, "cost", None)
        if say is not None and cost is not None:
            say(str(cost))
        return made
    if batch < 1:
        raise BadInput("--batch", expected="at least 1 image", got=batch, fix="Choose a larger batch.")
    images.batch = batch
    return images


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
        "standard": {"warmup": 600, "steps": 1500, "batch": 64 if small else 16},
        "paper": {"warmup": 800, "steps": 79_200, "batch": 200}
        if small
        else {"warmup": 10_000, "steps": 70_000, "batch": 16},
    }
    return dict(choose("--budget", name, table))


def adversary_budget(name: str, image: tuple[int, int, int]) -> dict[str, Any]:
    """Steps and batch of ZAQ, by budget and image size.

    `paper` is the schedule of the released code: 300 epochs of 60 iterations of 5 student updates. The others are ours.

    Args:
        name: "quick", "standard" or "paper".
        image: (c, h, w) of the generated images.

    Returns:
        ``warmup`` (batches the ranges are taken from), ``steps`` (student updates), ``batch``.

    Raises:
        BadInput: for an unknown budget.

    Source: ZAQ, the released code.
    """
    small = max(image[1:]) <= 64
    table = {
        "quick": {"warmup": 8, "steps": 100, "batch": 64} if small else {"warmup": 6, "steps": 200, "batch": 16},
        "standard": {"warmup": 8, "steps": 400, "batch": 64} if small else {"warmup": 6, "steps": 800, "batch": 16},
        "paper": {"warmup": 50, "steps": 90_000, "batch": 256 if small else 64},
    }
    return dict(choose("--budget", name, table))


def adversary_by_subject(image: tuple[int, int, int], bits: tuple[int, int]) -> dict[str, Any]:
    """ZAQ's corrected values that depend on the subject.

    Ranges are wide from 6 bits on, where too narrow costs more than too wide. A step of the student is measured in
    steps of its grid: half the rate for each bit of the weights above 4. Large images take memory: there are fewer, and
    a narrow generator makes them (docs/findings.md).

    Args:
        image: (c, h, w) of the generated images.
        bits: of weights and activations.

    Example:
        >>> adversary_by_subject((3, 32, 32), (4, 4))
        {'ranges': 'cubed', 'leaves': 1024, 'lr': 0.0001}
    """
    large, many = max(image[1:]) > 64, bits[1] >= 6
    chosen = {
        "ranges": "widening" if many else "mse" if large else "cubed",
        "leaves": max(8, min(384, 2**26 // math.prod(image))) if large else 1024,  # 256 MB at most
        "lr": (3e-5 if large else 1e-4) * min(1.0, 2.0 ** (4 - bits[0])),
    }
    return chosen | ({"width": 16} if large else {})


def noise_budget(name: str, image: tuple[int, int, int]) -> dict[str, Any]:
    """Images, steps and batch of the recipes that optimise a pool from noise and train on it (IntraQ, HAST).

    `paper` is the published schedule: 5,120 images of 1,000 iterations, 4 epochs of 200 iterations for the ranges and
    147 for the student. The other two are ours.

    Args:
        name: "quick", "standard" or "paper".
        image: (c, h, w) of the teacher's input.

    Returns:
        ``count`` (images), ``iterations`` (per image), ``group`` (images optimised together), ``warmup`` (batches for
        the ranges), ``steps`` (student updates), ``batch``.

    Raises:
        BadInput: for an unknown budget.

    Source: IntraQ and HAST, released configurations.
    """
    small = max(image[1:]) <= 64
    table = {
        "quick": {"count": 512, "iterations": 150, "warmup": 50, "steps": 200, "batch": 64 if small else 16},
        "standard": {"count": 1024, "iterations": 150, "warmup": 50, "steps": 200, "batch": 64 if small else 16},
        "paper": {"count": 5120, "iterations": 1000, "warmup": 800, "steps": 29_400, "batch": 256 if small else 16},
    }
    return {"group": 256 if name == "paper" else 288, **choose("--budget", name, table)}


def size_class(classes: int, image: tuple[int, int, int]) -> str:
    """Which column of the noise papers' tables is nearest: "cifar10", "cifar100" or "imagenet".

    Args:
        classes: number of classes.
        image: (c, h, w) of the teacher's input.

    Example:
        >>> size_class(10, (1, 8, 8)), size_class(100, (3, 32, 32)), size_class(10, (3, 224, 224))
        ('cifar10', 'cifar100', 'imagenet')
    """
    if max(image[1:]) > 64:
        return "imagenet"
    return "cifar10" if classes <= 30 else "cifar100"


def image_size(text: str) -> tuple[int, int]:
    """Read HxW.

    Raises:
        BadInput: for anything but two positive whole numbers.

    Example:
        >>> image_size("176x240")
        (176, 240)
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise BadInput("--size", expected="HxW such as 176x240", got=repr(text), fix="Give height and width.")
    return int(match[1]), int(match[2])


def milestones_at(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    """Step numbers, at least 1 each, at these shares of a run.

    Example:
        >>> milestones_at((0.5, 0.75), 300)
        (150, 225)
    """
    return tuple(max(1, round(share * steps)) for share in shares)
