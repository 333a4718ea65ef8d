"""A name, or anyone's file, becomes a `Teacher`: a frozen float network with everything known about it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.teachers import nets, zoos
from zsq.teachers.facts import Facts, fit_together, read_facts
from zsq.teachers.weight_files import (
    check_finite,
    fingerprint,
    flush_denormals,
    load_weights,
    named_tensors,
    read_weights,
)  # fmt: skip

FOLDER = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Teacher:
    """A float network that a student learns from.

    Attributes:
        net: the network; eval mode, no parameter requires a gradient.
        name: short name for summaries; of a user's file only its last part.
        task: ``"classify"``: [b, c, h, w] to logits [b, classes].
        classes: number of classes.
        image: input shape (c, h, w).
        mean: mean per channel in 0..1 units, in the network's channel order; None if nobody said.
        std: standard deviation per channel, same units and order; None if nobody said.
        channels: ``"rgb"`` or ``"bgr"``, the order the network wants.
        resize: shorter side that test images are resized to; None keeps their size.
        crop: side of the centre crop; None does not crop.
        fingerprint: SHA-256 over names, shapes and bytes of parameters and buffers.
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


@dataclass(frozen=True)
class _Embedded:
    build: Callable[[], nn.Module]
    weights: str
    facts: Facts
    about: str


EMBEDDED = {
    "digits": _Embedded(
        nets.digits_net,
        "digits.safetensors",
        Facts("classify", 10, (1, 8, 8), (0.305,), (0.376,)),
        "small residual network for scikit-learn's 8x8 digits; top-1 99.50 % on the 599 held out",
    ),
    "resnet20-cifar10": _Embedded(
        lambda: nets.resnet20(10),
        "resnet20_cifar10.safetensors",
        Facts("classify", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "ResNet-20 with projection shortcuts, CIFAR-10; top-1 90.92 % on cifar10_test.npz[2000:]",
    ),
    "resnet20-cifar100": _Embedded(
        lambda: nets.resnet20(100),
        "resnet20_cifar100.safetensors",
        Facts("classify", 100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "ResNet-20 with projection shortcuts, CIFAR-100; top-1 64.33 % on cifar100_test.npz[2000:]",
    ),
}

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
    return make_teacher(found.net, said.or_else(found.facts), name=short, device=device)


def make_teacher(net: nn.Module, facts: Facts, *, name: str, device: torch.device | str = "cpu") -> Teacher:
    """Make a teacher of a network in memory; the network itself is frozen, put into eval mode and moved.

    Args:
        net: a network with trained weights.
        facts: at least the image shape.
        name: short name for summaries.
        device: where to put the network.

    Returns:
        The teacher, checked with one forward of two black images.

    Raises:
        BadInput: if weights or output are not finite, the network refuses images of that shape, or the number of
            classes is not the width of its output.
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
    classes = _output_width(net, image, name, device)
    if facts.classes not in (None, classes):
        raise BadInput(
            "--classes",
            expected=f"{classes}, the width of the output of {name}",
            got=facts.classes,
            fix="Correct the number, or leave it out.",
        )
    return Teacher(
        net=net,
        name=name,
        task=facts.task or "classify",
        classes=classes,
        image=image,
        mean=facts.mean,
        std=facts.std,
        channels=facts.channels or "rgb",
        resize=facts.resize,
        crop=facts.crop,
        fingerprint=fingerprint(net),
    )


def _output_width(net: nn.Module, image: tuple[int, int, int], name: str, device: torch.device | str) -> int:
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
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 2:
        got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise BadInput(f"teacher {name}", expected="logits of shape [batch, classes]", got=got,
                       fix="Wrap the network so that it returns the logits alone.")  # fmt: skip
    if not bool(out.isfinite().all()):
        raise BadInput(f"teacher {name}", expected="finite logits for a black image", got="NaN or infinity",
                       fix="Check the weights, above all BatchNorm's running_var (never negative).")  # fmt: skip
    return out.shape[1]


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
