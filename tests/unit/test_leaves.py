"""Images drawn by chance: natural in their statistics, a function of the seed, in any size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tiny import tiny_teacher
from zsq.errors import BadInput
from zsq.run import Run
from zsq.sources.leaves import LeavesSource, dead_leaves
from zsq.teachers import load_teacher
from zsq.view import look


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(source: LeavesSource) -> LeavesSource:
    with Run(None, progress=False) as run:
        source.prepare(run)
    return source


@pytest.mark.parametrize("image", [(3, 32, 32), (3, 96, 160), (1, 8, 8), (4, 7, 19), (1, 1, 1)])
def test_any_size_between_black_and_white(image: tuple[int, int, int]) -> None:
    drawn = dead_leaves(3, image, rng())
    assert drawn.shape == (3, *image) and drawn.dtype == torch.float32
    assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn, dead_leaves(3, image, rng())) and not torch.equal(drawn, dead_leaves(3, image, rng(1)))


def slope(images: Tensor) -> float:
    """Exponent of the mean power spectrum along the frequency, of square images."""
    side = images.shape[-1]
    power = torch.fft.rfft2(images - images.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    radius = (torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side)[None].square()).sqrt() * side
    at = [2, 4, 8, 16, 32]
    means = [float(power[(radius > r * 0.8) & (radius < r * 1.25)].mean().log()) for r in at]
    x = torch.tensor([math.log(r) for r in at])
    y = torch.tensor(means)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_statistics_of_photographs() -> None:
    """Power falls like 1/f^2 or faster, and differences of neighbours are mostly tiny and now and then large."""
    drawn = dead_leaves(64, (3, 128, 128), rng())
    assert -3.0 < slope(drawn) < -1.7
    assert slope(torch.rand(16, 3, 128, 128, generator=rng())) > -0.3  # what the measure says of noise
    steps = (drawn[..., 1:] - drawn[..., :-1]).flatten()
    kurtosis = float(steps.pow(4).mean() / steps.var().square())
    assert kurtosis > 10  # 3 for normal noise, 1.8 for a uniform one
    assert 0.35 < drawn.mean() < 0.55 and 0.18 < drawn.std() < 0.32
    colour = drawn - drawn.mean(1, keepdim=True)
    assert 0.02 < colour.std() < 0.1  # coloured, but not far from grey
    assert dead_leaves(4, (1, 16, 16), rng()).shape[1] == 1


def test_nearer_to_what_a_network_was_trained_on_than_noise_is() -> None:
    teacher = load_teacher("resnet20-cifar10")

    def distance(images: Tensor) -> float:
        with torch.no_grad():
            norms = look(teacher.net, images, norms=True).norms
        apart = [((n.mean - n.running_mean).square() / (n.running_var + 1e-5)).mean() for n in norms]
        return float(torch.stack(apart).mean())

    leaves = prepared(LeavesSource(teacher, batch=64, count=128)).draw(rng()).images
    assert distance(leaves) < 0.5 * distance(torch.randn(64, 3, 32, 32, generator=rng()))


def test_more_things_hide_more() -> None:
    few, many = (dead_leaves(8, (1, 64, 64), rng(), leaves=n) for n in (1, 60))
    edges = [float((x[..., 1:] - x[..., :-1]).abs().gt(0.1).float().mean()) for x in (few, many)]
    assert edges[1] > 2 * edges[0]


def test_the_teachers_space() -> None:
    teacher = load_teacher("resnet20-cifar10")
    x = prepared(LeavesSource(teacher, batch=32, count=64)).draw(rng()).images
    mean, std = (torch.tensor(value)[:, None, None] for value in (teacher.mean, teacher.std))
    pixels = x * std + mean
    assert -1e-5 < pixels.min() < 0.1 and 0.9 < pixels.max() < 1 + 1e-5
    unknown = prepared(LeavesSource(tiny_teacher(), batch=32, count=64)).draw(rng()).images
    assert abs(unknown.mean()) < 0.5 and 0.6 < unknown.std() < 1.4


def test_held_out_images_and_new_ones() -> None:
    source = prepared(LeavesSource(tiny_teacher(), batch=8, count=64, image=(1, 8, 8)))
    drawn = source.pick(1000, rng()).images
    assert len(drawn) == 64
    held = source.sample(9, rng()).images
    many = source.sample(40, rng()).images
    assert len(held) == 9 and len(many) == 40 and len(many.flatten(1).unique(dim=0)) == 40
    seen = {tuple(image.flatten().tolist()) for image in drawn}
    assert not any(tuple(image.flatten().tolist()) in seen for image in held)
    source.batch = 5
    assert len(source.draw(rng()).images) == 5


def test_refused() -> None:
    with pytest.raises(BadInput, match="--leaves"):
        LeavesSource(tiny_teacher(), batch=8, count=7)
    with pytest.raises(BadInput, match="dead leaves"):
        dead_leaves(0, (1, 8, 8), rng())
    with pytest.raises(ValueError, match="prepare"):
        LeavesSource(tiny_teacher(), batch=8, count=8).draw(rng())
