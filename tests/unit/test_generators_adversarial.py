"""ZAQ's generators and the space of their images."""

from __future__ import annotations

import pytest
import torch

from zsq.errors import BadInput
from zsq.generators_adversarial import AdversaryGenerator, InputSpace, input_space

FREE = InputSpace(None, None)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_published_sizes() -> None:
    small = AdversaryGenerator((3, 32, 32), FREE)
    assert sum(p.numel() for p in small.parameters()) == 2_329_091  # spec of the released network
    large = AdversaryGenerator((3, 128, 128), FREE)
    assert [tuple(d.weight.shape[:2]) for d in large.doublings] == [(512, 256), (256, 128), (128, 64), (64, 64)]
    assert large.grid == (512, 8, 8)
    assert float(large.doublings[0].weight.detach().std()) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("image", [(3, 32, 32), (1, 9, 7), (3, 80, 100), (1, 300, 65)])
def test_any_size(image: tuple[int, int, int]) -> None:
    net = AdversaryGenerator(image, FREE, width=2, latent=8)
    assert net(torch.randn(2, 8)).shape == (2, *image)


def test_small_images_are_standardised() -> None:
    space = input_space((3, 32, 32), (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))
    x = AdversaryGenerator((3, 32, 32), space, width=8)(torch.randn(16, 256))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(x.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize(
    ("image", "mean", "std"),
    [
        ((3, 128, 128), *IMAGENET),
        ((3, 128, 128), (0.414, 0.405, 0.39), (1 / 255,) * 3),  # 0..255 minus a mean
        ((3, 32, 32), (0.0,) * 3, (1.0,) * 3),  # pixels as they are
    ],
)
def test_bounded_images_lie_between_black_and_white(
    image: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    space = input_space(image, mean, std)
    made = AdversaryGenerator(image, space, width=2)(torch.randn(4, 256)).detach()
    noise = space.noise(4, image, torch.Generator().manual_seed(0))

    def pixels_of(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]

    for x in (made, noise):
        pixels = pixels_of(x)
        assert pixels.min() >= -1e-4 and pixels.max() <= 1 + 1e-4
        assert float(pixels.mean()) == pytest.approx(0.5, abs=0.1)
    assert pixels_of(made).std((0, 2, 3)).tolist() == pytest.approx([0.25] * 3, abs=0.04)  # natural contrast at once


def test_an_unknown_normalisation_means_unit_variance() -> None:
    assert input_space((3, 128, 128), None, None) == FREE
    x = FREE.noise(64, (3, 8, 8), torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(1, abs=0.05)


def test_weights_come_from_the_rng() -> None:
    def build(seed: int) -> torch.Tensor:
        net = AdversaryGenerator((1, 8, 8), FREE, width=2, rng=torch.Generator().manual_seed(seed))
        return net.linear.weight.detach()

    before = torch.random.get_rng_state()
    assert torch.equal(build(1), build(1)) and not torch.equal(build(1), build(2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_sizes_that_cannot_be_meant() -> None:
    with pytest.raises(BadInput, match=r"positive sizes, got image \(3, 0, 8\)"):
        AdversaryGenerator((3, 0, 8), FREE)
