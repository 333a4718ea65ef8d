"""What a data-free method has to know about a network beyond its weights: input shape, normalisation, classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from zsq.errors import BadInput

TASKS = ("classify", "segment", "detect")


@dataclass(frozen=True)
class Facts:
    """Facts of a network; None where unknown.

    Attributes:
        task: what the network does; one of `TASKS`.
        classes: number of classes.
        image: input shape (c, h, w).
        mean: mean per channel in 0..1 units, in the order of the network's own channels.
        std: standard deviation per channel in 0..1 units, same order.
        channels: ``"rgb"`` or ``"bgr"``: the channel order the network wants.
        resize: shorter side that test images are resized to before the crop; None keeps the size of a classifier's
            images and resizes a segmenter's or detector's to the input shape.
        crop: side of the centre crop of test images; None does not crop.
        raw: paths of the modules whose outputs, side by side, are the raw output; None to find it.
        decode: of a detector, turns what it returns (with `raw`, the tensors of those modules) into boxes [b, n, 6]:
            x1, y1, x2, y2 in units of the image's sides, score, class.
    """

    task: str | None = None
    classes: int | None = None
    image: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: str | None = None
    resize: int | None = None
    crop: int | None = None
    raw: tuple[str, ...] | None = None
    decode: Callable[[Any], Any] | None = None

    def or_else(self, other: Facts) -> Facts:
        """These facts, completed by those of `other`.

        Example:
            >>> Facts(classes=10).or_else(Facts(classes=5, resize=8)).resize
            8
        """
        missing = {f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **missing)


def read_facts(table: Mapping[str, Any], *, where: str = "") -> Facts:
    """Check facts one by one.

    Args:
        table: name -> value as a user wrote it; lists count as tuples, one mean or std counts for all channels.
        where: prefix for messages, e.g. ``"my_net.py: ZSQ"``; empty for options of the command line.

    Returns:
        The facts, each of the right type; unknown ones None.

    Raises:
        BadInput: for an unknown name or a value that cannot be meant.

    Example:
        >>> read_facts({"image": [1, 8, 8], "mean": 0.5}).image
        (1, 8, 8)
    """
    known = [field.name for field in fields(Facts)]
    if unknown := sorted(set(map(str, table)) - set(known)):
        raise BadInput(
            where,
            expected=f"keys out of {', '.join(known)}",
            got=", ".join(unknown),
            fix="Remove or rename these keys.",
        )

    def say(key: str) -> str:
        return f"{where}[{key!r}]" if where else f"--{key}"

    given = {key: value for key, value in table.items() if value is not None}
    for key, choices in (("task", TASKS), ("channels", ("rgb", "bgr"))):
        if key in given and given[key] not in choices:
            raise BadInput(say(key), expected=" or ".join(choices), got=repr(given[key]), fix="Choose one of these.")
    for key in ("classes", "resize", "crop"):
        if key in given:
            given[key] = _whole(given[key], 2 if key == "classes" else 1, say(key))
    if "raw" in given:
        given["raw"] = _paths(given["raw"], say("raw"))
    if "decode" in given and not callable(given["decode"]):
        raise BadInput(say("decode"), expected="a function", got=repr(given["decode"]), fix="Give the function itself.")
    if "image" in given:
        given["image"] = _image(given["image"], say("image"))
    for key, low, high in (("mean", 0.0, 1.0), ("std", 1e-6, 10.0)):
        if key in given:
            given[key] = _per_channel(given[key], low, high, say(key))
    return Facts(**given)


def fit_together(facts: Facts, image: tuple[int, int, int]) -> Facts:
    """Complete facts that follow from others, and refuse those that contradict each other.

    Args:
        facts: what is known.
        image: the input shape (c, h, w).

    Returns:
        The facts with task, channel order, and one mean and std per channel.

    Raises:
        BadInput: if numbers per channel, channel order, resize and crop do not fit the image shape.
    """
    c, h, w = image
    if facts.channels == "bgr" and c != 3:
        raise BadInput("--channels", expected=f"rgb for {c}-channel images", got="bgr", fix="Leave --channels out.")
    if (facts.mean is None) != (facts.std is None):
        given, missing = ("--mean", "--std") if facts.std is None else ("--std", "--mean")
        raise BadInput(
            missing,
            expected=f"to be given together with {given}",
            got="nothing",
            fix="Give both as the network was trained, or neither.",
        )
    if facts.crop is not None and (h, w) != (facts.crop, facts.crop):
        raise BadInput(
            "--crop",
            expected=f"the size of --image, {h}x{w}",
            got=f"{facts.crop}x{facts.crop}",
            fix="Make both the same.",
        )
    if facts.crop is not None and facts.resize is not None and facts.resize < facts.crop:
        raise BadInput(
            "--resize", expected=f"at least the crop, {facts.crop}", got=facts.resize, fix="Enlarge --resize."
        )
    wide = {}
    for key in ("mean", "std"):
        values = getattr(facts, key)
        if values is not None and len(values) not in (1, c):
            raise BadInput(
                f"--{key}",
                expected=f"{c} numbers (or one) for {c}-channel images",
                got=f"{len(values)}",
                fix=f"Give one --{key} per channel.",
            )
        wide[key] = values * c if values is not None and len(values) == 1 else values
    if facts.task in ("segment", "detect") and (facts.crop is not None or facts.resize not in (None, min(h, w))):
        raise BadInput(
            "--crop" if facts.crop is not None else "--resize",
            expected=f"nothing for a network that has to {facts.task}: images are resized to {h}x{w} as they are",
            got=facts.crop or facts.resize, fix="Leave it out; masks and boxes lie over the whole image.",
        )  # fmt: skip
    return replace(facts, **wide, task=facts.task or "classify", channels=facts.channels or "rgb")


def _whole(value: object, low: int, subject: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise BadInput(
            subject, expected=f"a whole number of at least {low}", got=repr(value), fix="Correct the number."
        )
    return value


def _image(value: object, subject: str) -> tuple[int, int, int]:
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(sides) != 3 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise BadInput(
            subject,
            expected="three positive whole numbers (channels, height, width)",
            got=repr(value),
            fix="For example 3x32x32 on the command line, (3, 32, 32) in Python.",
        )
    return sides


def _per_channel(value: object, low: float, high: float, subject: str) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    right = [isinstance(n, int | float) and not isinstance(n, bool) and low <= n <= high for n in numbers]
    if not numbers or not all(right):
        raise BadInput(
            subject,
            expected=f"numbers from {low:g} to {high:g} (pixels in 0..1 units)",
            got=repr(value),
            fix="Divide values for pixels in 0..255 by 255.",
        )
    return tuple(float(n) for n in numbers)


def _paths(value: object, subject: str) -> tuple[str, ...]:
    names = tuple(value.split(",")) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise BadInput(subject, expected="paths of modules, MODULE[,MODULE]", got=repr(value),
                       fix="Paths are those of net.named_modules(), e.g. head.classes,head.boxes.")  # fmt: skip
    return names
