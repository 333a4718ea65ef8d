"""What natural images are like, whatever the network: priors on pixels, pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, down plus across.

    Args:
        images: shape [b, c, h, w].

    Returns:
        0-dim tensor.

    Source: as a prior of optimised images DeepInversion (Yin et al., CVPR 2020), there among others.

    Example:
        >>> float(total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])))
        1.0
    """
    return images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()


def energy(images: Tensor) -> Tensor:
    """Mean square of the pixels: the squared L2 norm, per pixel, so that its weight suits every image size.

    Args:
        images: shape [b, c, h, w], in the teacher's normalised space.

    Returns:
        0-dim tensor.

    Example:
        >>> float(energy(torch.full((1, 1, 2, 2), 3.0)))
        9.0
    """
    return images.square().mean()


def gaussian_response(height: int, width: int, cutoff: float) -> Tensor:
    """Gaussian low-pass filter in frequency space, laid out as ``torch.fft.rfft2`` lays out its result.

        H(u, v) = exp(-(u^2 + v^2) / (2 cutoff^2)),    u, v whole cycles per image

    Args:
        height: of the images.
        width: of the images.
        cutoff: standard deviation, in cycles per image, above 0.

    Returns:
        Shape [height, width // 2 + 1]; 1 for the mean.

    Raises:
        ValueError: if the cutoff is not above 0.

    Source: SynQ (ICLR 2025), low-pass filter; there 8 for images of 32 pixels, 20 to 100 for 224.
    """
    if not cutoff > 0:
        raise ValueError(f"expected a cutoff above 0 cycles per image, got {cutoff}")
    u, v = torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.rfftfreq(width, 1 / width)[None, :]
    return torch.exp(-(u.square() + v.square()) / (2 * cutoff**2))


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Images without what varies faster than the cutoff; differentiable, and linear in the images.

    Args:
        images: shape [b, c, h, w].
        cutoff: standard deviation of the filter, in cycles per image.

    Returns:
        Same shape and type.

    Source: SynQ (ICLR 2025); see `gaussian_response`.

    Example:
        >>> flat = torch.full((1, 1, 4, 4), 2.0)
        >>> bool(torch.allclose(low_pass(flat, cutoff=1.0), flat))
        True
    """
    height, width = images.shape[2:]
    response = gaussian_response(height, width, cutoff).to(images.device)
    spectrum = torch.fft.rfft2(images.to(torch.promote_types(images.dtype, torch.float32)))
    return torch.fft.irfft2(spectrum * response, s=(height, width)).to(images.dtype)


def high_frequency(images: Tensor, cutoff: float) -> Tensor:
    """Mean square of what `low_pass` takes away: 0 for images that vary slowly.

    Args:
        images: shape [b, c, h, w].
        cutoff: of the filter, in cycles per image.

    Returns:
        0-dim tensor.
    """
    return (images - low_pass(images, cutoff)).square().mean()


def pixel_priors(images: Tensor, *, smooth: float, norm: float, slow: float) -> dict[str, Tensor]:
    """Weighted priors as terms of a loss of images; a weight of 0 leaves a term out.

    Args:
        images: shape [b, c, h, w].
        smooth: weight of `total_variation`.
        norm: weight of `energy`.
        slow: weight of `high_frequency`, with a cutoff of a quarter of the shorter side (8 for 32 pixels).
    """
    cutoff = min(images.shape[2:]) / 4
    terms = {"i_smooth": (smooth, total_variation), "i_norm": (norm, energy)}
    found = {name: weight * prior(images) for name, (weight, prior) in terms.items() if weight}
    return found | ({"i_slow": slow * high_frequency(images, cutoff)} if slow else {})
