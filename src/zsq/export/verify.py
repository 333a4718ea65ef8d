"""Does the file compute what the student computes? Codes site by site, decisions image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zsq.errors import RunFailed
from zsq.export.frozen import SiteGrid
from zsq.export.onnx_file import Model, exposed
from zsq.export.runtimes import batch_of, ort_run, ort_session
from zsq.grid import decode, encode
from zsq.insert.access import activation_quantizers
from zsq.tasks import Task

MAX_LSB = 1  # values within an ulp of a tie may land on either side of it
MAX_SHARE = 0.01  # of the codes
LEAST_AGREEMENT = 0.995  # of the decisions
LAYER_IMAGES = 32  # that the site-by-site comparison looks at


class Layerwise(NamedTuple):
    """Codes of the file against those of the student, every site given the same inputs.

    Attributes:
        lsb: per site, largest difference in steps.
        share: of all codes that differ.
    """

    lsb: dict[str, int]
    share: float

    @property
    def worst(self) -> tuple[str, int]:
        """Site with the largest difference."""
        return max(self.lsb.items(), key=lambda item: item[1])


def layerwise(model: Model, student: nn.Module, sites: Sequence[SiteGrid], images: Tensor) -> Layerwise:
    """Compare the codes of every site, in ONNX Runtime without optimisations.

    The student computes every site from the values that the file has at the sites before it, so that one value on a tie
    is counted where it happens and nowhere else.

    Args:
        model: the file.
        student: on the CPU, ranges fixed; left as it was.
        sites: its sites.
        images: [n, c, h, w].
    """
    names = [name for name in model.codes if name]
    session = ort_session(exposed(model.proto, names), optimise=False)
    lsb, different, total = {site.name: 0 for site in sites}, 0, 0
    for part in images.split(batch_of(images)):
        found = dict(zip(names, ort_run(session, part, names), strict=True))
        forced = [_Forced(site, found.get(name)) for site, name in zip(sites, model.codes, strict=True)]
        _run_forced(student, forced, part)
        for force in forced:
            lsb[force.site.name] = max(lsb[force.site.name], force.lsb)
            different, total = different + force.different, total + force.total
    return Layerwise(lsb, different / max(total, 1))


class _Forced:
    """Stands in for a quantizer: compares its codes with given ones, and goes on with the given ones."""

    def __init__(self, site: SiteGrid, codes: np.ndarray | None) -> None:
        self.site, self.codes = site, codes
        self.lsb = self.different = self.total = 0

    def __call__(self, x: Tensor) -> Tensor:
        grid, own = self.site.grid, encode(x, self.site.grid)
        if self.codes is None:
            return decode(own, grid)
        first = grid.qmin + (self.site.zero if self.codes.dtype == np.float32 else 0)
        given = torch.from_numpy(self.codes.astype(np.float32)).reshape(x.shape) + first
        difference = (own - given).abs()
        self.lsb = int(difference.max())
        self.different, self.total = int((difference > 0).sum()), difference.numel()
        return decode(given, grid)


def _run_forced(student: nn.Module, forced: Sequence[_Forced], images: Tensor) -> None:
    quantizers = list(activation_quantizers(student).values())
    for quantizer, force in zip(quantizers, forced, strict=True):
        quantizer.__dict__["forward"] = force
    try:
        with torch.no_grad():
            student(images)
    finally:
        for quantizer in quantizers:
            del quantizer.__dict__["forward"]


def range_noise(sites: Sequence[SiteGrid], images: Tensor, count: int = 8) -> Tensor:
    """Images at and beyond the ends of the input's range: what a batch of typical images never reaches.

    Args:
        sites: of the student; the first is the input's in deploy placement.
        images: typical ones, whose extremes count where the input has no site.
        count: how many.
    """
    grid = sites[0].grid if sites and sites[0].name.startswith("input") else None
    low, high = (float(images.min()), float(images.max()))
    if grid is not None:
        low, high = (float(decode(torch.tensor(float(q)), grid)) for q in (grid.qmin, grid.qmax))
    rng = torch.Generator().manual_seed(0)
    size = (count, *images.shape[1:])
    ends = torch.where(torch.rand(size, generator=rng) < 0.5, low, high)
    wide = low + (high - low) * (2 * torch.rand(size, generator=rng) - 0.5)
    flat = torch.linspace(low, high, count)[:, None, None, None].expand(size)
    return torch.cat([ends, wide, flat])


def decisions(runner: Any, student: nn.Module, images: Tensor, task: Task) -> tuple[float, float]:
    """Share of equal decisions of an optimised model and the student, and the largest difference of a logit.

    Args:
        runner: one of `zsq.export.runtimes`.
        student: on the CPU.
        images: [n, c, h, w].
        task: which channels of the raw output are classes.

    Returns:
        Agreement (per position where the output is one decision per position) and the largest absolute difference of
        the whole raw output.
    """
    equal = total = 0
    largest = 0.0
    with torch.no_grad():
        for part in images.split(batch_of(images)):
            ours, theirs = student(part), runner(part)
            same = _classes(ours, task).argmax(1) == _classes(theirs, task).argmax(1)
            equal, total = equal + int(same.sum()), total + same.numel()
            largest = max(largest, float((ours - theirs).abs().max()))
    return equal / total, largest


def _classes(raw: Tensor, task: Task) -> Tensor:
    """The class logits of a raw output; all of it where its channels have no names."""
    return task.parts(raw).get("class", raw)


def require_layerwise(found: Layerwise, file: str) -> None:
    """Refuse a file whose codes are not the student's.

    Raises:
        RunFailed: naming the site.
    """
    site, lsb = found.worst
    if lsb > MAX_LSB or found.share > MAX_SHARE:
        raise RunFailed(
            f"{file}: expected every code within {MAX_LSB} step of the student's and at most {MAX_SHARE:.0%} different,"
            f" got {lsb} steps at site {site!r} and {found.share:.2%} different. No file was written."
        )


def require_agreement(agreement: float, least: float, file: str, runtime: str) -> None:
    """Refuse a file that decides differently from the student once the runtime has optimised it.

    Raises:
        RunFailed: with both shares.
    """
    if agreement < least:
        raise RunFailed(
            f"{file}: expected {runtime} to decide as the student on at least {least:.1%} of the images, got "
            f"{agreement:.2%}. No file was written."
        )
