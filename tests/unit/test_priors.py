"""Priors on pixels: golden values, a float64 oracle of the filter, and that they do what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tiny import tiny_teacher
from zsq.recipes.hast import source
from zsq.run import Run
from zsq.sources.priors import energy, gaussian_response, high_frequency, low_pass, pixel_priors, total_variation


def images(size: int = 8) -> Tensor:
    return torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def wave(cycles: int, size: int = 16) -> Tensor:
    x = torch.arange(size, dtype=torch.float64) / size
    return torch.cos(2 * math.pi * cycles * x).expand(1, 1, size, size)


@pytest.mark.parametrize("cycles", [0, 1, 3, 8])
def test_a_wave_is_damped_by_the_gaussian(cycles: int) -> None:
    x = wave(cycles)
    assert torch.allclose(low_pass(x, 4.0), math.exp(-(cycles**2) / 32) * x, atol=1e-7)
    assert torch.allclose(low_pass(x.mT, 4.0), math.exp(-(cycles**2) / 32) * x.mT, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9)])
def test_the_filter_is_a_sum_over_frequencies(shape: tuple[int, int]) -> None:
    height, width = shape
    x = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spectrum = torch.fft.fft2(x)
    for i in range(height):
        for j in range(width):
            u, v = min(i, height - i), min(j, width - j)
            spectrum[..., i, j] *= math.exp(-(u * u + v * v) / (2 * 2.5**2))
    assert torch.allclose(low_pass(x, 2.5), torch.fft.ifft2(spectrum).real, atol=1e-6)
    assert gaussian_response(height, width, 2.5).shape == (height, width // 2 + 1)


def test_by_hand() -> None:
    x = torch.tensor([[[[0.0, 2.0], [4.0, 0.0]]]])
    assert energy(x).item() == 5.0
    assert total_variation(x).item() == pytest.approx((16 + 4) / 2 + (4 + 16) / 2)
    flat = torch.full((1, 1, 4, 4), 3.0)
    assert high_frequency(flat, 1.0).item() == pytest.approx(0, abs=1e-10)
    nyquist = wave(8)  # alternates between 1 and -1
    assert high_frequency(nyquist, 4.0).item() == pytest.approx((1 - math.exp(-2)) ** 2, rel=1e-6)


def test_it_is_differentiable() -> None:
    x = images(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: high_frequency(z, 1.5), (x,), atol=1e-4)


def test_a_cutoff_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="above 0"):
        low_pass(images(), 0.0)


def test_weights_of_zero_leave_terms_out() -> None:
    x = images()
    assert pixel_priors(x, smooth=0.0, norm=0.0, slow=0.0) == {}
    found = pixel_priors(x, smooth=2.0, norm=3.0, slow=4.0)
    expected = {"i_smooth": 2 * total_variation(x), "i_norm": 3 * energy(x), "i_slow": 4 * high_frequency(x, 2.0)}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(("weight", "prior"), [("smooth", total_variation), ("norm", energy), ("slow", high_frequency)])
def test_images_follow_their_prior(weight: str, prior: object) -> None:
    measured = []
    for value in (0.0, 30.0):
        made = source(tiny_teacher(), batch=4, count=8, iterations=25, group=9, **{weight: value})
        with Run(None, progress=False) as run:
            made.prepare(run)
        x = made.pick(8, torch.Generator()).images
        measured.append(float(high_frequency(x, 2.0) if weight == "slow" else prior(x)))  # type: ignore[operator]
    assert measured[1] < 0.7 * measured[0]
