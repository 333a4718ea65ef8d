"""Short texts of the command line: image shapes, sizes, bits of layers. Imports no torch."""

from __future__ import annotations

import re

from zsq.errors import BadInput


def image_shape(text: str) -> tuple[int, int, int]:
    """Read 3x32x32.

    Raises:
        BadInput: for anything but three positive whole numbers.

    Example:
        >>> image_shape("3x32x32")
        (3, 32, 32)
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise BadInput("--image", expected="CxHxW such as 3x32x32", got=repr(text), fix="Give channels, height, width.")
    c, h, w = (int(number) for number in match.groups())
    return c, h, w


def height_width(text: str) -> tuple[int, int]:
    """Read 128x160.

    Raises:
        BadInput: for anything but two positive whole numbers.

    Example:
        >>> height_width("128x160")
        (128, 160)
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise BadInput("--synthetic", expected="HxW such as 128x160", got=repr(text), fix="Give height and width.")
    return int(match.group(1)), int(match.group(2))


def layer_bits(items: list[str]) -> dict[str, int]:
    """Read PATTERN=N items.

    Raises:
        BadInput: for an item without a number after its last equals sign.

    Example:
        >>> layer_bits(["*.conv1=8", "output=6"])
        {'*.conv1': 8, 'output': 6}
    """
    table: dict[str, int] = {}
    for item in items:
        pattern, _, number = item.rpartition("=")
        if not pattern or not re.fullmatch("[0-9]+", number):
            raise BadInput(
                "--layer-bits", expected="PATTERN=N", got=repr(item), fix="For example --layer-bits 'output=8'."
            )
        table[pattern] = int(number)
    return table
