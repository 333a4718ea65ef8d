"""The images that an exported file is checked on."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from zsq.teachers import Teacher


def of_the_networks_size(images: Tensor, teacher: Teacher) -> Tensor:
    """Give images as the file will get them: of the network's own size, whatever size a run made them in.

    The file's input has the size of the images it is recorded with.

    Args:
        images: normalised, shape [n, c, h, w].
        teacher: whose `image` says the size.

    Returns:
        Float32 on the CPU; enlarged or shrunk (bilinear) where the size was another.
    """
    images = images.detach().float().cpu()
    size = tuple(teacher.image[1:])
    return images if images.shape[2:] == size else F.interpolate(images, size, mode="bilinear", align_corners=False)
