"""ZAQ's generators: latent noise to images without classes, and the input space those images live in."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.generators import UpConv, batch_norm

SMALL = 64  # pixels; above it the images come from the transposed-convolution network
# Of natural images' pixels, in 0..1 units. Without them a generator that begins grey stays so: images of half the
# contrast give activations, and ranges, of half the size that real ones do.
NATURAL_MEAN, NATURAL_STD = 0.45, 0.27
# Standard deviations of natural images in 0..1 units: a network normalised with one of them expects unit variance.
_NATURAL = (0.1, 0.5)


class InputSpace(NamedTuple):
    """Where a teacher's inputs live.

    Attributes:
        mean: per channel, in 0..1 units, shape [c, 1, 1]; None for a space of zero mean and unit variance.
        std: likewise.
    """

    mean: Tensor | None
    std: Tensor | None

    def from_tanh(self, x: Tensor) -> Tensor:
        """Map the output of a tanh: standardised per channel over the batch.

        Where black and white are known, to pixels of a natural mean and contrast, cut to what lies between them.
        """
        x = batch_norm(x, None, None, 1e-5)
        if self.mean is None or self.std is None:
            return x
        return ((NATURAL_MEAN + NATURAL_STD * x).clamp(0, 1) - self.mean) / self.std

    def noise(self, count: int, image: tuple[int, int, int], rng: torch.Generator) -> Tensor:
        """N(0, 1) images; in a space of pixels grey ones, 0.5 + N(0, 1) / 4, cut to black..white."""
        x = torch.randn(count, *image, generator=rng)
        if self.mean is None or self.std is None:
            return x
        return ((0.5 + x.to(self.mean.device) / 4).clamp(0, 1) - self.mean) / self.std


def input_space(
    image: tuple[int, int, int], mean: tuple[float, ...] | None, std: tuple[float, ...] | None,
    device: torch.device | str = "cpu",
) -> InputSpace:  # fmt: skip
    """The space that generated images are put into.

    As published: standardised up to 64 pixels, bounded above. Bounded means by black and white, where mean and standard
    deviation are known; a small network that was not normalised like natural images gets bounded images too.

    Args:
        image: input shape (c, h, w).
        mean: the teacher's, per channel in 0..1 units; None if unknown.
        std: likewise.
        device: of the images.
    """
    natural = std is not None and all(_NATURAL[0] <= value <= _NATURAL[1] for value in std)
    if mean is None or std is None or (max(image[1:]) <= SMALL and natural):
        return InputSpace(None, None)
    return InputSpace(*(torch.tensor(value, device=device)[:, None, None] for value in (mean, std)))


class _Norm(nn.Module):
    """BatchNorm with the statistics of the batch, always: without buffers, sampling changes no state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.weight, self.bias, 1e-5)


class AdversaryGenerator(nn.Module):
    """Latent -> linear -> [c, h/f, w/f] -> BatchNorm -> doublings (each BatchNorm, LeakyReLU 0.2) -> conv 3x3 -> tanh.

    Up to 64 pixels: two doublings (f = 4) by nearest neighbour and a 3x3 convolution, channels 2n, 2n, n. Above: four
    (f = 16) by 4x4 transposed convolutions of stride 2, channels 8n, 4n, 2n, n, n, weights N(0, 0.02). Sizes that f
    does not divide are cut out of the next larger one. All BatchNorms use the statistics of the batch.

    Args:
        image: (channels, height, width) of the images.
        space: where the images live.
        latent: length of z.
        width: n above.
        rng: source of the initial weights (CPU generator); None takes torch's global one.

    Raises:
        BadInput: a size is not positive.

    Source: ZAQ (arXiv 2103.15263), released network, n = 64, latent 256; above 64 pixels that of DFAD (arXiv
        1912.11006), its ancestor. The paper is said to use a quarter of the channels.

    Example:
        >>> net = AdversaryGenerator((3, 32, 32), InputSpace(None, None), width=16)
        >>> net(torch.randn(4, 256)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self, image: tuple[int, int, int], space: InputSpace, *, latent: int = 256, width: int = 64,
        rng: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(*image, latent, width) < 1:
            raise BadInput("generator", expected="positive sizes", got=f"image {image}, latent {latent}, width {width}",
                           fix="Give positive numbers.")  # fmt: skip
        self.image, self.space, self.latent = image, space, latent
        small = max(image[1:]) <= SMALL
        widths = (2 * width, 2 * width, width) if small else (8 * width, 4 * width, 2 * width, width, width)
        factor = 2 ** (len(widths) - 1)
        self.grid = (widths[0], math.ceil(image[1] / factor), math.ceil(image[2] / factor))
        with torch.random.fork_rng(devices=[], enabled=rng is not None):
            if rng is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            self.linear = nn.Linear(latent, math.prod(self.grid))
            self.norms = nn.ModuleList(_Norm(channels) for channels in widths)
            self.doublings = nn.ModuleList(
                UpConv(a, b) if small else nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths)
            )
            self.last = nn.Conv2d(widths[-1], image[0], 3, padding=1)
            if not small:
                for layer in (self.linear, *self.doublings, self.last):
                    nn.init.normal_(layer.weight, std=0.02)

    def forward(self, z: Tensor) -> Tensor:
        """Make images.

        Args:
            z: latent noise, shape [b, latent].

        Returns:
            Images [b, c, h, w] in the given space; float32 under autocast.
        """
        x = self.linear(z).unflatten(1, self.grid)
        if self.last.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.norms[0](x)
        for double, norm in zip(self.doublings, self.norms[1:], strict=True):
            x = F.leaky_relu(norm(double(x)), 0.2, inplace=True)
        x = self.last(x)[..., : self.image[1], : self.image[2]]
        # Half precision ends here: its rounding would show as banding in the image.
        return self.space.from_tanh((x if x.dtype == torch.float64 else x.float()).tanh())
