"""A name, or anyone's file, becomes a `Teacher`: a frozen float network with everything known about it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.tasks import TASKS, Outline, Task
from zsq.teachers import zoos
from zsq.teachers.embedded import EMBEDDED, FOLDER
from zsq.teachers.facts import Facts, fit_together, read_facts
from zsq.teachers.raw import find_raw
from zsq.teachers.weight_files import (
    check_finite,
    fingerprint,
    flush_denormals,
    load_weights,
    named_tensors,
    read_weights,
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """A float network that a student learns from.

    Attributes:
        net: the network; eval mode, no parameter requires a gradient. It gives the raw output of its task.
        name: short name for summaries; of a user's file only its last part.
        task: name of what it does: ``"classify"``, ``"segment"`` or ``"detect"``.
        classes: number of classes.
        image: input shape (c, h, w).
        mean: mean per channel in 0..1 units, in the network's channel order; None if nobody said.
        std: standard deviation per channel, same units and order; None if nobody said.
        channels: ``"rgb"`` or ``"bgr"``, the order the network wants.
        resize: shorter side that test images are resized to; None keeps their size.
        crop: side of the centre crop; None does not crop.
        fingerprint: SHA-256 over names, shapes and bytes of parameters and buffers.
        outputs: what the raw output means: its parts, losses on it, how it is scored. Made from task and classes if not
            given, as far as these suffice.
    """

    net: nn.Module
    name: str
    task: str
    classes: int
    image: tuple[int, int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: str = "rgb"
    resize: int | None = None
    crop: int | None = None
    fingerprint: str = ""
    outputs: Task = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.outputs is None:
            plain: Any = TASKS[self.task]
            object.__setattr__(self, "outputs", plain(self.classes))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def normalise(self, images: Tensor) -> Tensor:
        """Turn pixels into the network's input.

        Args:
            images: shape [b, h, w, c], uint8, RGB for three channels.

        Returns:
            Shape [b, c, h, w], float32, on the network's device: channels in its order, (x / 255 - mean) / std.

        Raises:
            BadInput: for other than uint8 images of `c` channels, or if mean and std are not known.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != self.image[0]:
            raise BadInput(
                "images",
                expected=f"uint8 of shape [b, h, w, {self.image[0]}]",
                got=f"{images.dtype} of shape {list(images.shape)}",
                fix="Convert them.",
            )
        if self.mean is None or self.std is None:
            raise BadInput(
                f"{self.name}: --mean and --std",
                expected="the normalisation the network was trained with, to read real images",
                got="none known",
                fix="Give both, e.g. --mean 0.485 0.456 0.406 --std 0.229 0.224 "
                "0.225; for pixels in 0..1 as they are, --mean 0 --std 1.",
            )
        x = images.to(self.device).permute(0, 3, 1, 2)
        x = (x.flip(1) if self.channels == "bgr" else x).contiguous().to(torch.float32).div_(255)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)


__all__ = ["EMBEDDED", "Teacher", "load_teacher", "make_teacher", "teacher_names"]

_ZOOS = {"torchvision": zoos.from_torchvision, "timm": zoos.from_timm, "pytorchcv": zoos.from_pytorchcv}


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
        load_weights(found.net, read_weights(weights), name=str(weights))
    return make_teacher(found.net, said.or_else(found.facts), name=short, leaf=leaf, device=device)


def make_teacher(
    net: nn.Module, facts: Facts, *, name: str, leaf: Sequence[str] = (), device: torch.device | str = "cpu"
) -> Teacher:
    """Make a teacher of a network in memory; the network itself is frozen, put into eval mode and moved.

    Args:
        net: a network with trained weights.
        facts: at least the image shape.
        name: short name for summaries.
        leaf: patterns of modules kept whole where tracing fails.
        device: where to put the network.

    Returns:
        The teacher, checked with one forward of two black images.

    Raises:
        BadInput: if weights or output are not finite, the network refuses images of that shape, or its output does not
            fit its task or the number of classes.
    """
    image = facts.image
    if image is None:
        raise BadInput(
            "--image", expected=f"the input shape of {name}", got="nothing", fix="Give it, e.g. --image 3x32x32."
        )
    facts = fit_together(facts, image)
    net = net.to(device).eval().requires_grad_(False)
    check_finite(named_tensors(net), name=name)
    flush_denormals(net)
    _first_output(net, image, name, device)  # whatever is wrong shows in the network as it was given
    task, key = facts.task or "classify", fingerprint(net)
    raw = find_raw(net, image, task=task, classes=facts.classes, modules=facts.raw or (), leaf=leaf)
    out = _first_output(raw.net, image, name, device)
    if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != 2:
        got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise BadInput(f"teacher {name}", expected="one tensor [batch, ...], e.g. logits of shape [batch, classes]",
                       got=got, fix="Wrap the network so that it returns one tensor, or name the modules that give "
                       "its raw outputs with --raw MODULE,MODULE.")  # fmt: skip
    outline = Outline(facts.classes, raw.parts, facts.decode, raw.joined)
    outputs = TASKS[task].of(out, outline, name=name)
    return Teacher(
        net=raw.net,
        name=name,
        task=task,
        classes=outputs.classes,
        image=image,
        mean=facts.mean,
        std=facts.std,
        channels=facts.channels or "rgb",
        resize=facts.resize,
        crop=facts.crop,
        fingerprint=key,
        outputs=outputs,
    )


def _first_output(net: nn.Module, image: tuple[int, int, int], name: str, device: torch.device | str) -> object:
    """Run the network once on two black images and check what comes out."""
    shape = "x".join(map(str, image))
    try:
        with torch.no_grad():
            out = net(torch.zeros(2, *image, device=device))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"--image {shape}",
            expected=f"an image shape that {name} accepts",
            got=f"{type(error).__name__} in its forward: {reason}",
            fix="Give the shape the network was trained on as --image CxHxW.",
        ) from error
    if isinstance(out, Tensor) and not bool(out.isfinite().all()):
        raise BadInput(f"teacher {name}", expected="finite logits for a black image", got="NaN or infinity",
                       fix="Check the weights, above all BatchNorm's running_var (never negative).")  # fmt: skip
    return out


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
