"""Images drawn by chance alone: things of all sizes in front of each other, the dead leaves model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.generators_adversarial import NATURAL_MEAN, NATURAL_STD, SMALL
from zsq.sources.base import Batch
from zsq.sources.pool import HELD_OUT, MadePool, PoolSource

if TYPE_CHECKING:
    from zsq.run import Run
    from zsq.teachers import Teacher

LEAVES, FEW = 30, 8  # things in an image, and in one of at most 64 pixels
_SMALLEST, _LARGEST = 0.02, 0.5  # their half widths, as a share of the image's shorter side
_CHROMA = 0.06  # how far colours are from grey, standard deviation in 0..1 units
_PART = 16  # images drawn together


def dead_leaves(count: int, image: tuple[int, int, int], rng: torch.Generator, *, leaves: int | None = None) -> Tensor:
    """Draw images in which things of all sizes hide each other, shaded and textured, on a clouded ground.

    Photographs share their statistics with such images: edges between almost even surfaces, power spectra of 1/f^2,
    things of every size. A network's activations on them are nearer to those on photographs than on noise or on images
    that a young generator makes (docs/findings.md), although nothing of the network went into them.

    Args:
        count: number of images.
        image: (channels, height, width).
        rng: CPU generator; the images are a function of its state.
        leaves: things in an image; 30, or 8 up to 64 pixels, if not given.

    Returns:
        Shape [count, c, h, w], values in 0..1 units, black to white.

    Raises:
        BadInput: a number is not positive.

    Source: the dead leaves model (Matheron 1975; Lee, Mumford and Huang, IJCV 2001: radii of density r^-2 to r^-3);
        as training images Baradad et al., Learning to See by Looking at Noise (NeurIPS 2021). Shapes, shading, textures
        and all constants are ours.

    Example:
        >>> dead_leaves(2, (3, 32, 48), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 48])
    """
    leaves = leaves if leaves is not None else FEW if max(image[1:]) <= SMALL else LEAVES
    if min(count, *image, leaves) < 1:
        raise BadInput("dead leaves", expected="positive numbers", got=f"{count} images {image} of {leaves} leaves",
                       fix="Correct them.")  # fmt: skip
    parts = [min(_PART, count - done) for done in range(0, count, _PART)]
    return torch.cat([_draw(part, image, rng, leaves) for part in parts])


def _draw(count: int, image: tuple[int, int, int], rng: torch.Generator, leaves: int) -> Tensor:
    """Some images at once: every image gets its k-th leaf, then all their next one."""
    channels, height, width = image
    up, right = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5

    def chance(low: float, high: float) -> Tensor:
        """One number per image, to be spread over its pixels."""
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=rng)

    ground = 0.15 * _clouds(count, 1, image, rng, chance(1.2, 1.8))
    tint = 0.3 * _CHROMA * _clouds(count, channels, image, rng, chance(1.5, 2.0))
    drawn = _colour(count, channels, rng) + ground + (tint if channels > 1 else 0)
    textures = [_clouds(count, 1, image, rng, chance(0.7, 1.5)) for _ in range(3)]
    for sizes in _radii(count, leaves, rng):
        radius = sizes.reshape(-1, 1, 1, 1) * min(height, width)
        # Half of the things stand upright or lie, as most things do.
        angle = torch.where(chance(0, 1) < 0.5, chance(0, 0.08 * math.pi), chance(0, math.pi))
        dy, dx = up - chance(-0.1, 1.1) * height, right - chance(-0.1, 1.1) * width
        u = (dx * angle.cos() + dy * angle.sin()) / radius
        v = (dy * angle.cos() - dx * angle.sin()) / (radius * chance(0.25, 1.0))
        # Curves |u|^p + |v|^p = 1: discs, rectangles with round corners, lozenges.
        power = torch.where(chance(0, 1) < 0.5, 2.0, torch.where(chance(0, 1) < 0.6, 6.0, 1.2))
        inside = 1 - (u.abs() ** power + v.abs() ** power) ** (1 / power)
        blur = 0.9 + 4.5 * chance(0, 1) ** 3  # pixels from inside to outside; few edges are out of focus
        cover = (inside * radius / blur + 0.5).clamp(0, 1)
        shade = chance(-0.2, 0.2) * u.clamp(-1, 1) + chance(-0.2, 0.2) * v.clamp(-1, 1)
        which, down, along = torch.randint(2**31, (3,), generator=rng).tolist()
        texture = textures[which % 3].roll((down % height, along % width), (2, 3)) * (0.2 * chance(0, 1) ** 2)
        drawn = torch.lerp(drawn, _colour(count, channels, rng) + shade + texture, cover)
    drawn = NATURAL_MEAN + chance(0.45, 1.1) * (drawn - NATURAL_MEAN) + chance(-0.1, 0.1)  # contrast and light
    return drawn.clamp(0, 1)


def _radii(count: int, leaves: int, rng: torch.Generator) -> Tensor:
    """Shares of the image's side, shape [leaves, count], of density r^-2; small things lie in front by and large."""
    share = torch.rand(leaves, count, generator=rng)
    radii = 1 / (1 / _SMALLEST + share * (1 / _LARGEST - 1 / _SMALLEST))
    behind = torch.arange(leaves) + 0.5 * leaves * torch.rand(leaves, generator=rng)
    return radii.sort(0, descending=True).values[behind.argsort()]


def _colour(count: int, channels: int, rng: torch.Generator) -> Tensor:
    """A colour per image, shape [count, c, 1, 1]: any brightness, not far from grey, brighter ones farther."""
    bright = torch.rand(count, 1, generator=rng)
    hue = torch.randn(count, channels, generator=rng)
    hue = (hue - hue.mean(1, keepdim=True)) * _CHROMA
    return (bright + hue * (0.3 + bright)).clamp(0, 1)[:, :, None, None]


def _clouds(count: int, channels: int, image: tuple[int, int, int], rng: torch.Generator, power: Tensor) -> Tensor:
    """Random fields of mean 0 and variance 1 whose amplitudes fall like 1/f^power, shape [count, channels, h, w]."""
    _, height, width = image
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None]
    frequency = (fy.square() + fx.square()).sqrt()
    frequency[0, 0] = 1.0
    field = torch.fft.rfft2(torch.randn(count, channels, height, width, generator=rng)) * frequency**-power
    field[..., 0, 0] = 0.0
    waves = torch.fft.irfft2(field, s=(height, width))
    return waves / waves.std((2, 3), correction=0, keepdim=True).clamp_min(1e-12)


class LeavesSource(MadePool):
    """Images by `dead_leaves`, drawn before the first batch and read many times, in the teacher's normalised space.

    Where the teacher's mean and standard deviation are unknown, pixels are standardised as natural ones are. An eighth
    more images than asked for are drawn and held out: `sample` reads only those, while it has enough of them.

    Args:
        teacher: gives the space of the images, nothing else.
        batch: images per draw.
        count: images to draw from.
        image: (c, h, w) of the images; the teacher's if not given.

    Raises:
        BadInput: fewer than 8 images.
    """

    def __init__(
        self, teacher: Teacher, *, batch: int, count: int, image: tuple[int, int, int] | None = None
    ) -> None:
        if count < 8:
            raise BadInput("--leaves", expected="0 for none, or at least 8 images", got=count, fix="Ask for more.")
        super().__init__(teacher, name="leaves", batch=batch, facts={"count": count})
        self._count, self._image = count, image or teacher.image

    def prepare(self, run: Run) -> None:
        """Draw the images, a function of the run's seed; at once if that is done."""
        if self._pool is not None:
            return
        held_out = max(1, self._count // (HELD_OUT - 1))
        made = self._normalised(dead_leaves(self._count + held_out, self._image, run.rng("leaves", 0)))
        self._pool = PoolSource(made, None, name=self.name, batch=self.batch, held_out=held_out)

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        """Held-out images, each at most once; new ones where more are asked for."""
        held = self._ready().sample(count, rng).images
        if len(held) == count:
            return Batch(held)
        return Batch(torch.cat([held, self._normalised(dead_leaves(count - len(held), self._image, rng))]))

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean = self._teacher.mean or (NATURAL_MEAN,) * self._image[0]
        std = self._teacher.std or (NATURAL_STD,) * self._image[0]
        middle, spread = (torch.tensor(value)[:, None, None] for value in (mean, std))
        return ((pixels - middle) / spread).to(next(self._teacher.net.parameters()).device)
