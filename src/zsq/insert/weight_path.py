"""From a layer's latent weight and bias to the ones it computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import RunFailed
from zsq.grid import Grid, fake_quantize
from zsq.quantizer import Quantizer

_INT32 = 2**31 - 1
_ROOM = 2.0**30  # largest bias in steps of the accumulator: half of its range stays free for the products


class WeightPath(nn.Module):
    """From the latent weight and bias to what the layer computes with: BatchNorm folding, quantization, bias rounding.

    Args:
        quantizer: quantizer of the weight.
        transposed_groups: groups of a transposed convolution, 0 for any other layer.

    Attributes:
        active: False makes the path exact (folding stays); for comparisons with the float network.
        folded: the BatchNorm folded into the weight, or nothing.
        inputs: per call site of the layer the quantizer whose grid its input is on, or None.
        sources: the same where the bias has to lie on the accumulator's grid; empty where it is not rounded.
        parameter: path of the latent parameter: inside the layer, or inside the student for a functional layer.
        derived: the layer computes its weight from parameters (weight normalisation, standardisation).
        ceiling: largest inv_step of the weight with which the bias fits into int32, as of the last forward; or None.
    """

    def __init__(self, quantizer: Quantizer, *, transposed_groups: int = 0) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.transposed_groups = transposed_groups
        self.active = True
        self.parameter = "weight"
        self.derived = False
        self.seen: Tensor | None = None
        self.ceiling: Tensor | None = None
        # Tuples: modules that live elsewhere in the network must not be registered a second time.
        self.folded: tuple[nn.Module, ...] = ()
        self.inputs: tuple[Quantizer | None, ...] = ()
        self.sources: tuple[Quantizer | None, ...] = ()
        self.integers: Callable[[Tensor, int], Tensor | None] | None = None  # set while a loop computes on integers

    @property
    def norm(self) -> Any:
        """The folded BatchNorm, or None."""
        return self.folded[0] if self.folded else None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> tuple[Tensor, Tensor | None]:
        """Give what to compute with.

        Args:
            x: input of the layer, on the grid of ``sources[site]`` if that is a quantizer.
            weight: latent weight.
            bias: latent bias, or None.
            site: which call site of the layer this is.

        Returns:
            Weight and bias; the bias rounded to multiples of (input step * weight step) if the input is on a grid.
        """
        if self.derived and not torch.compiler.is_compiling():
            self.seen = weight.detach()
        weight, bias = self.fold(weight, bias)
        if not self.active:
            return weight, bias
        quantized = self.quantizer(weight)
        source = self.sources[site] if site < len(self.sources) else None
        if bias is None or source is None:
            return quantized, bias
        own, inputs = self.quantizer.grid(weight), source.grid(x)
        self.ceiling = self._ceiling(bias.detach(), inputs, own)
        grid = self.limited(own)
        # Weights that are almost nothing beside their bias (a channel whose BatchNorm factor is 0): steps so fine that
        # the bias would not fit into the accumulator. Selected by value: a branch would read the device.
        quantized = torch.where(own.inv_step > grid.inv_step, fake_quantize(weight, grid), quantized)
        return quantized, fake_quantize(bias, self.bias_grid(grid, inputs))

    def limited(self, grid: Grid) -> Grid:
        """Grid of the weight with steps coarse enough for the bias to fit into int32.

        Args:
            grid: of the weight, from its quantizer.
        """
        if self.ceiling is None:
            return grid
        return grid._replace(inv_step=torch.minimum(grid.inv_step, self.ceiling))

    def _ceiling(self, bias: Tensor, source: Grid, weight: Grid) -> Tensor:
        """Largest inv_step per channel of `weight`'s grid with which the bias fits."""
        limit = _ROOM / (bias.abs() * source.inv_step.flatten())
        if weight.inv_step.numel() == 1:
            limit = limit.amin()
        elif self.transposed_groups > 1:
            limit = limit.reshape(self.transposed_groups, -1).amin(0)
        return limit.reshape(weight.inv_step.shape)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Fold the BatchNorm: ``w * gamma / sigma`` and ``beta + (b - mean) * gamma / sigma``; without one, nothing."""
        norm, scale = self.norm, self.scale()
        if norm is None or scale is None:
            return weight, bias
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = shift * scale if norm.bias is None else norm.bias + shift * scale
        return weight * self.spread(scale, weight), shift

    def scale(self) -> Tensor | None:
        """Per-channel factor gamma / sigma of the folded BatchNorm, or None."""
        norm = self.norm
        if norm is None:
            return None
        inverse = torch.rsqrt(norm.running_var + norm.eps)
        return inverse if norm.weight is None else norm.weight * inverse

    def spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Shape one number per output channel such that it broadcasts against the weight."""
        tail = [1] * (weight.dim() - 2)
        if not self.transposed_groups:
            return scale.reshape(-1, 1, *tail)
        groups = self.transposed_groups
        per_group = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
        return per_group.reshape(weight.shape[0], -1, *tail)

    def bias_grid(self, weight: Grid, source: Grid) -> Grid:
        """Grid of the accumulator: multiples of (input step * weight step), per output channel.

        Args:
            weight: grid of the weight.
            source: grid of the layer's input.
        """
        inv_step = weight.inv_step.flatten() * source.inv_step.flatten()
        if self.transposed_groups > 1:  # axis 1 of the weight is the output channel within a group
            inv_step = inv_step.repeat(self.transposed_groups)
        return Grid(inv_step, torch.zeros_like(inv_step), -_INT32, _INT32)

    def latent_grid(self, latent: Tensor) -> Grid:
        """Grid of the weight in coordinates of its latent tensor.

        Args:
            latent: the latent weight, or a candidate of its shape.

        Returns:
            A grid g with ``encode(latent, g)`` equal to the codes the layer computes with: inv_step is multiplied by
            the folded gamma / sigma with its sign; a derived weight is related to its latent by a line per channel.

        Raises:
            RunFailed: if a derived weight was never computed.
        """
        with torch.no_grad():
            grid = self.limited(self.quantizer.grid(self.fold(self._derive(latent), None)[0]))
            inv_step, zero = grid.inv_step, grid.zero
            scale = self.scale()
            if scale is not None:
                # A dead channel (gamma 0) holds only code 0; a tiny factor keeps decoding finite.
                inv_step = inv_step * self.spread(torch.where(scale == 0, 1e-12, scale), latent)
            if self.derived:
                slope, offset = self._line(latent)
                inv_step, zero = inv_step * slope, zero - offset * inv_step
        return Grid(inv_step, zero, grid.qmin, grid.qmax)

    def _derive(self, latent: Tensor) -> Tensor:
        if not self.derived:
            return latent
        slope, offset = self._line(latent)
        return latent * slope + offset

    def _line(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Least-squares line per output channel from the latent to the derived weight."""
        if self.seen is None:
            raise RunFailed("the grid of a computed weight is known only after a forward. Run the student once before.")
        axis = 1 if self.transposed_groups else 0
        dims = [d for d in range(latent.dim()) if d != axis]
        w, v = latent - latent.mean(dims, keepdim=True), self.seen.reshape(latent.shape)
        mean = v.mean(dims, keepdim=True)
        slope = (w * v).sum(dims, keepdim=True) / w.square().sum(dims, keepdim=True).clamp_min(1e-30)
        return slope, mean - slope * latent.mean(dims, keepdim=True)


@contextmanager
def exact(paths: Sequence[WeightPath]) -> Iterator[None]:
    """Let the layers compute with their float weights within a ``with`` block."""
    before = [path.active for path in paths]
    for path in paths:
        path.active = False
    try:
        yield
    finally:
        for path, active in zip(paths, before, strict=True):
            path.active = active
