"""Site by site: does a program round as the student does, given the same inputs?

Comparing only what comes out proves little: a value on a tie that falls the other way is no error, but at few bits the
layers behind it amplify it. So every site is compared alone, and the next one gets the student's values again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zsq.errors import RunFailed
from zsq.insert.access import SITES, activation_quantizers

IMAGES, BATCH, ENDS = 64, 8, 8  # activations of all sites are kept for one batch
LARGEST_SHARE = 0.01  # of all rounded values, one step off
LARGEST_RELATIVE = 1e-4  # of the largest logit, every site given the student's values


class SiteCheck(NamedTuple):
    """How far two networks are apart, every site alone.

    Attributes:
        max_lsb: largest difference, in steps of the site's grid.
        share_off: share of all rounded values that differ.
        worst: name of the site with the largest difference.
        relative: largest difference of the output, over the largest logit.
    """

    max_lsb: int
    share_off: float
    worst: str
    relative: float

    def require(self) -> None:
        """Refuse a difference that ties cannot explain.

        Raises:
            RunFailed: naming the site.
        """
        if self.max_lsb > 1 or self.share_off > LARGEST_SHARE or not self.relative <= LARGEST_RELATIVE:
            raise RunFailed(
                f"export: expected every site to round as the student does (at most one step off, in at most"
                f" {LARGEST_SHARE:.0%} of its values; output within {LARGEST_RELATIVE:g}), got {self.max_lsb} steps at"
                f" {self.worst!r}, {self.share_off:.2%} of the values and {self.relative:.2g}. No file was written."
            )


def compare_sites(student: nn.Module, twin: nn.Module, images: Tensor) -> SiteCheck:
    """Run both on the first images and on noise at the ends of their range.

    Args:
        student: with frozen ranges.
        twin: the same graph with other modules at the sites.
        images: shape [n, c, h, w].

    Returns:
        The largest differences.
    """
    quantizers = activation_quantizers(student)
    steps = {name: quantizer.grid(torch.zeros(1)).inv_step for name, quantizer in quantizers.items()}
    generator = torch.Generator().manual_seed(0)
    coins = torch.rand(ENDS, *images.shape[1:], generator=generator) < 0.5
    ends = torch.where(coins, images.min(), images.max()) * 1.25
    off, count, worst, relative = 0, 0, (0.0, ""), []
    with torch.no_grad():
        for part in torch.cat([images[:IMAGES], ends]).split(BATCH):
            values: dict[str, Tensor] = {}
            distance: dict[str, Tensor] = {}
            ours = _watched(student, part, values, distance, steps)
            theirs = _watched(twin, part, values, distance, steps)
            relative.append((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
            off += sum(int((d > 0).sum()) for d in distance.values())
            count += sum(d.numel() for d in distance.values())
            worst = max(worst, *((float(d.max()), name) for name, d in distance.items()))
    return SiteCheck(int(worst[0]), off / max(count, 1), worst[1], float(torch.stack(relative).max()))


def _watched(
    net: nn.Module, x: Tensor, values: dict[str, Tensor], distance: dict[str, Tensor], steps: dict[str, Tensor]
) -> Tensor:
    """Run a network; its sites give the values already there, and notice how far their own would have been."""
    holder: Any = getattr(net, SITES)
    hooks = []
    for name, key in holder.names.items():

        def watch(_: Any, args: Any, output: Tensor, *, name: str = name) -> Tensor | None:
            if name not in values:
                values[name] = output
                return None
            distance[name] = ((output - values[name]) * steps[name]).round().abs()
            return values[name]

        hooks.append(getattr(holder, key).register_forward_hook(watch))
    try:
        return net(x)
    finally:
        for hook in hooks:
            hook.remove()
