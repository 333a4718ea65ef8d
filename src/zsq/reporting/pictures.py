"""Images and what teacher and student make of them: one card per image, in the words and marks of the task."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zsq.teachers import Teacher

SMALL = 96  # pixels: smaller images are kept as they are and shown enlarged
LARGE = 192  # pixels: larger ones are scaled down, a page is for looking at


@dataclass(frozen=True)
class Opinion:
    """What a network says of an image, in words.

    Attributes:
        who: teacher or student.
        text: its decision.
        confidence: softmax probability of it, a fraction; None where there is no single one.
    """

    who: str
    text: str
    confidence: float | None = None


@dataclass(frozen=True)
class View:
    """One picture.

    Attributes:
        title: what it shows; empty for the plain image.
        alt: the same for people who do not see it.
        pixels: uint8 [h, w, 3].
    """

    title: str
    alt: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Card:
    """An image with what both networks say.

    Attributes:
        index: number of the image in its file.
        agreement: 1 if both decide the same, 0 if not; for dense tasks the share of equal decisions.
        opinions: of teacher and student.
        asked: what the image was made to show; None where nobody asked.
        views: one or more pictures.
    """

    index: int
    agreement: float
    opinions: list[Opinion]
    asked: str | None
    views: list[View] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """Everything but the pixels."""
        opinions = {o.who: {"says": o.text, "confidence": o.confidence} for o in self.opinions}
        return {"index": self.index, "agreement": self.agreement, "asked": self.asked, **opinions}


@dataclass(frozen=True)
class Album:
    """A sample of a run's images.

    Attributes:
        count: images looked at.
        agreement: mean over them.
        sample: the first ones, as they come: what is typical.
        differing: those the student differs on most, the surest opinions of the teacher first.
        scaled: whether colours are stretched per image, because the network's normalisation is not known.
        legend: name and colour (as in CSS) of every class, where pictures are painted over with classes.
    """

    count: int
    agreement: float
    sample: list[Card]
    differing: list[Card]
    scaled: bool
    legend: list[tuple[str, str]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Everything but the pixels."""
        return {
            "count": self.count, "agreement": self.agreement, "scaled": self.scaled,
            "sample": [card.facts() for card in self.sample], "differing": [card.facts() for card in self.differing],
        }  # fmt: skip


Draw = Callable[[int], Card]
Drawn = tuple[Sequence[float], Sequence[float], Draw]  # agreement and sureness per image, and a card by number


def pixels_of(teacher: Teacher, images: Tensor) -> NDArray[np.uint8]:
    """Undo a teacher's normalisation.

    Args:
        teacher: knows mean, std and channel order; without mean and std each image is stretched to its own range.
        images: shape [n, c, h, w], in its input space.

    Returns:
        uint8 RGB [n, h, w, 3]; of other than one or three channels the first one or three.
    """
    x = images.detach().float().cpu()
    if teacher.mean is not None and teacher.std is not None:
        mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.mean, teacher.std))
        x = x * std + mean
    else:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp_min(1e-12)
    x = x.nan_to_num(0).flip(1) if teacher.channels == "bgr" else x.nan_to_num(0)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """A picture as a data URI: small ones as PNG, pixel by pixel; larger ones scaled down, as JPEG."""
    from PIL import Image

    image = Image.fromarray(pixels)
    out = BytesIO()
    if max(image.size) <= SMALL:
        image.save(out, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    image.thumbnail((LARGE, LARGE))
    image.save(out, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
