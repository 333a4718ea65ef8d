"""Random resized crops and flips of a whole batch at once, and a source whose images are cropped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq.sources.around import Around
from zsq.sources.base import Batch, Source


def crop_boxes(
    count: int, rng: torch.Generator, *, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """One box per image: area uniform in `scale`, aspect ratio log-uniform in `ratio`, place uniform, flip by coin.

    Args:
        count: number of boxes.
        rng: CPU generator.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.

    Returns:
        Shape [count, 2, 3]: the affine maps from the crop's coordinates in [-1, 1] to the image's, as
        ``torch.nn.functional.affine_grid`` takes them; a negative x scale is a flip.

    Example:
        >>> boxes = crop_boxes(2, torch.Generator(), scale=(1, 1), ratio=(1, 1))
        >>> boxes.abs()[:, :, :2].tolist()[0]
        [[1.0, 0.0], [0.0, 1.0]]
    """
    area, shape, x, y, coin = torch.rand(5, count, generator=rng)
    area = scale[0] + area * (scale[1] - scale[0])
    aspect = torch.exp(math.log(ratio[0]) + shape * math.log(ratio[1] / ratio[0]))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    boxes = torch.zeros(count, 2, 3)
    boxes[:, 0, 0] = torch.where(coin < 0.5, -width, width)
    boxes[:, 1, 1] = height
    boxes[:, 0, 2], boxes[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    return boxes


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box out of every image and resize it to the image's size, bilinearly; carries gradients.

    Args:
        images: shape [n, c, h, w].
        boxes: as from `crop_boxes`.

    Returns:
        Shape [n, c, h, w].
    """
    where = F.affine_grid(boxes.to(images.device, images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, where, mode="bilinear", padding_mode="border", align_corners=False)


def reinforce(images: Tensor, rng: torch.Generator, *, scale: tuple[float, float]) -> Tensor:
    """Crop every image of the batch, or, by one coin for all, none.

    Args:
        images: shape [n, c, h, w].
        rng: CPU generator.
        scale: smallest and largest share of the image's area.

    Returns:
        Shape [n, c, h, w].

    Source: IntraQ (arXiv 2111.09136), local object reinforcement.
    """
    if torch.rand((), generator=rng).item() < 0.5:  # of a CPU generator: no device is waited for
        return images
    return crop(images, crop_boxes(len(images), rng, scale=scale))


class CropSource(Around):
    """Another source's images, each drawn one cropped and flipped at random.

    Args:
        source: whose images.
        scale: smallest and largest share of the image's area.
    """

    def __init__(self, source: Source, *, scale: tuple[float, float]) -> None:
        super().__init__(source)
        self._scale = scale

    def changed(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The batch, cropped."""
        with torch.autocast(batch.images.device.type, enabled=False):
            images = crop(batch.images, crop_boxes(len(batch.images), rng, scale=self._scale))
        return Batch(images, batch.labels)
