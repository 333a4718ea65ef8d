"""A name, or anyone's file, becomes a `Teacher`: a frozen float network with everything known about it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from zsq.errors import BadInput
from zsq.teachers import zoos
from zsq.teachers.embedded import EMBEDDED, FOLDER
from zsq.teachers.facts import read_facts
from zsq.teachers.teacher import Teacher, make_teacher
from zsq.teachers.vision import from_torchvision
from zsq.teachers.weight_files import load_weights, read_weights

__all__ = ["EMBEDDED", "Teacher", "load_teacher", "make_teacher", "teacher_names"]

_ZOOS = {"torchvision": from_torchvision, "timm": zoos.from_timm, "pytorchcv": zoos.from_pytorchcv}


def teacher_names() -> dict[str, str]:
    """What `load_teacher` understands, each with one line."""
    others = {f"{zoo}:NAME": f"a network of {zoo}, with its weights or --weights ({zoos.INSTALL})" for zoo in _ZOOS}
    own = "your network, with --weights FILE.safetensors; facts from the file's ZSQ = {...} or options"
    return {name: entry.about for name, entry in EMBEDDED.items()} | others | {"FILE.py:CALLABLE": own}


def load_teacher(
    name: str,
    *,
    weights: Path | str | None = None,
    task: str | None = None,
    classes: int | None = None,
    image: Sequence[int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str | None = None,
    resize: int | None = None,
    crop: int | None = None,
    raw: Sequence[str] | str | None = None,
    decode: str | Callable[[Any], Any] | None = None,
    leaf: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Teacher:
    """Find, load and check a float network. Arguments win over what its origin says about it.

    Where over a thousandth of the weights are denormal numbers, denormal arithmetic is switched off in the process.

    Args:
        name: see `teacher_names`.
        weights: a safetensors file; needed for FILE.py:CALLABLE, replaces the usual weights of the others.
        task: what the network does.
        classes: number of classes; read off the output if nobody says.
        image: input shape (c, h, w).
        mean: mean per channel in 0..1 units, in the network's channel order; one number counts for all channels.
        std: standard deviation per channel, likewise.
        channels: ``"rgb"`` or ``"bgr"``.
        resize: shorter side that test images are resized to.
        crop: side of the centre crop of test images.
        raw: paths of the modules that give the raw output; found if nobody says.
        decode: of a detector, a function that makes boxes, or FILE.py:F, which names one and runs that file.
        leaf: patterns of modules kept whole where tracing fails.
        device: where to put the network.

    Returns:
        The teacher, ready to be quantized.

    Raises:
        BadInput: for an unknown name, a missing package or file, weights that do not fit, or facts that contradict the
            network.

    Example:
        >>> teacher = load_teacher("resnet20-cifar10")
        >>> teacher.classes, teacher.image
        (10, (3, 32, 32))
    """
    said = read_facts(
        {
            "task": task,
            "classes": classes,
            "image": image,
            "mean": mean,
            "std": std,
            "channels": channels,
            "resize": resize,
            "crop": crop,
            "raw": raw,
            "decode": zoos.function_of(decode) if isinstance(decode, str) else decode,
        }
    )
    kind, _, rest = name.partition(":")
    short = name
    if name in EMBEDDED:
        entry = EMBEDDED[name]
        found = zoos.Found(entry.build(), entry.facts)
        weights = FOLDER / entry.weights if weights is None else weights
    elif kind in _ZOOS and rest:
        found = _ZOOS[kind](rest, pretrained=weights is None)
    elif name.rpartition(":")[0].endswith(".py"):
        found, short = zoos.from_file(name), Path(name).name
        if weights is None:
            raise BadInput(
                "--weights",
                expected=f"the trained weights of {short}, a .safetensors file",
                got="nothing",
                fix="Write them with safetensors.torch.save_file(net.state_dict(), FILE).",
            )
    else:
        raise _unknown(name)
    if weights is not None:
        given = {key: value for key, value in read_weights(weights).items() if not key.startswith(found.unused)}
        load_weights(found.net, given, name=str(weights))
    return make_teacher(found.net, said.or_else(found.facts), name=short, leaf=leaf, device=device)


def _unknown(name: str) -> BadInput:
    if name.endswith(".onnx"):
        return BadInput(f"teacher {Path(name).name}", expected="a network in torch",
                        got="an ONNX file, in which BatchNorm is usually folded away and nothing can be trained",
                        fix="Give the torch network it was exported from, as FILE.py:CALLABLE with --weights. An ONNX "
                        "file can be scored: zsq evaluate FILE.onnx --data DATA.")  # fmt: skip
    close = difflib.get_close_matches(name, EMBEDDED, n=2)
    fix = f"Did you mean {' or '.join(close)}?" if close else "See `zsq list teachers`."
    return BadInput(
        "teacher", expected="a name from `zsq list teachers`, ZOO:NAME or FILE.py:CALLABLE", got=repr(name), fix=fix
    )
