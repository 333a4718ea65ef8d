"""A frozen float network with everything known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.tasks import TASKS, Outline, Task
from zsq.teachers.facts import Facts, fit_together
from zsq.teachers.raw import find_raw
from zsq.teachers.weight_files import check_finite, fingerprint, flush_denormals, named_tensors


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
        precision: what training on it multiplies in. ``"bf16"``: generator and teacher in bfloat16, the student on its
            integers where it can; ``"float32"``: everything in float32.
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
    precision: Literal["bf16", "float32"] = "bf16"
    outputs: Task = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.outputs is None:
            plain: Any = TASKS[self.task]
            object.__setattr__(self, "outputs", plain(self.classes))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def sized(self, size: tuple[int, int] | None) -> Teacher:
        """The same network for images of another size; itself for None.

        Args:
            size: height and width.

        Raises:
            BadInput: if the network does not take images of that size, or its output has then another number of
                channels.
        """
        if size is None:
            return self
        image = (self.image[0], *size)
        expected = f"a size that {self.name} accepts: only networks without a fixed grid take others than their own"
        try:
            with torch.no_grad():
                out: Tensor = self.net(torch.zeros(2, *image, device=self.device))
                self.outputs.parts(out)
        except Exception as error:
            got = f"{type(error).__name__} in its forward: {' '.join(str(error).split())[:200]}"
            raise BadInput(f"--synthetic {size[0]}x{size[1]}", expected=expected, got=got,
                           fix="Choose another one, or leave it out.") from error  # fmt: skip
        return replace(self, image=image, resize=None, crop=None)

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
