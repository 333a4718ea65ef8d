"""How integer codes appear in an ONNX graph: quantizers of activations, packed weights, int32 biases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from zsq.export.builder import INT2, INT4, INT8, Builder
from zsq.export.frozen import BiasCodes, Frozen, SiteGrid, WeightCodes


class CodeWriter:
    """Appends the nodes that quantize and dequantize.

    Args:
        builder: where nodes go.
        frozen: codes and grids; None for a float network.
        int2: store 2-bit weights as such.

    Attributes:
        sites: the activation quantizers.
        codes: per site the tensor of its codes (uint8), or of its steps from 0 (float32).
    """

    def __init__(self, builder: Builder, frozen: Frozen | None, *, int2: bool) -> None:
        self.builder, self.int2 = builder, int2
        self.sites: Sequence[SiteGrid] = frozen.sites if frozen else ()
        self.weights: Mapping[str, WeightCodes] = frozen.weights if frozen else {}
        self.biases: Mapping[str, BiasCodes] = frozen.biases if frozen else {}
        self.codes: dict[int, str] = {}

    def quantize(self, name: str, index: int, clamp: tuple[float, float] | None) -> tuple[str, int | None]:
        """Quantize to uint8, clip and dequantize with the grid of a site.

        Args:
            name: of the tensor.
            index: of the site.
            clamp: bounds the values are to be clamped to before; they become part of the clip.

        Returns:
            Name of the result, and the site whose grid an integer runtime sees it on.
        """
        site, build = self.sites[index], self.builder
        low, high = self._bounds(site, clamp)
        scale, zero = self._grid(site)
        if not site.has_zero:  # no uint8 zero point: the window is moved in float, as only paper placement needs
            name = build.add("Add", [name, build.constant(site.zero * site.scale)])
        full = (low, high) == (0, 255)
        codes = build.add("QuantizeLinear", [name, scale, zero], name=f"{site.name}.codes" if full else "q")
        if not full:
            bounds = [build.constant(bound, np.uint8) for bound in (low, high)]
            codes = build.add("Clip", [codes, *bounds], name=f"{site.name}.codes")
        self.codes[index] = codes
        result = build.add("DequantizeLinear", [codes, scale, zero], name=site.name)
        if site.has_zero:
            return result, index
        return build.add("Sub", [result, build.constant(site.zero * site.scale)]), None

    def quantize_in_float(self, name: str, index: int, clamp: tuple[float, float] | None) -> tuple[str, int | None]:
        """Quantize in primitives, which OpenVINO computes as written, behind an integer convolution all the same.

        Of a QuantizeLinear between a convolution and a residual addition OpenVINO drops the rounding ("drop rounding
        one special residual pattern" in the source of its CPU plugin): measured on a ResNet-20 at W4A4, 84 % of the
        decisions remain, and 100 % with this form, at the same speed.

        Args and returns as for `quantize`.
        """
        site, build = self.sites[index], self.builder
        steps = build.add("Round", [build.add("Mul", [name, build.constant(site.grid.inv_step.numpy())])])
        bounds = [build.constant(bound - site.zero) for bound in self._bounds(site, clamp)]
        self.codes[index] = build.add("Clip", [steps, *bounds], name=f"{site.name}.steps")
        return build.add("Mul", [self.codes[index], build.constant(site.scale)], name=site.name), index

    def requantize(self, name: str, site: int | None) -> str:
        """Quantize values that are on a grid already: integer runtimes look for it behind every operator."""
        if site is None or not self.sites[site].has_zero:
            return name
        scale, zero = self._grid(self.sites[site])
        codes = self.builder.add("QuantizeLinear", [name, scale, zero], name="q")
        return self.builder.add("DequantizeLinear", [codes, scale, zero], name="d")

    def apart(self, name: str, index: int) -> str:
        """The same values behind a rounding in float, which OpenVINO does not move an operator across."""
        site, build = self.sites[index], self.builder
        steps = build.add("Mul", [name, build.constant(site.grid.inv_step.numpy())])
        return build.add("Mul", [build.add("Round", [steps]), build.constant(site.scale)])

    def stored(self, path: str) -> str | None:
        """Store a weight or bias as codes; None if that buffer has none."""
        if path in self.weights:
            return self._weight(path, self.weights[path])
        if path not in self.biases:
            return None
        bias, build = self.biases[path], self.builder
        inputs = [build.constant(bias.codes.numpy(), np.int32), build.constant(bias.scale.numpy())]
        return build.add("DequantizeLinear", inputs, {"axis": 0}, name="b")

    def _bounds(self, site: SiteGrid, clamp: tuple[float, float] | None) -> tuple[int, int]:
        low, high = clamp or (-math.inf, math.inf)
        return 0 if math.isinf(low) else site.code(low), site.top if math.isinf(high) else site.code(high)

    def _grid(self, site: SiteGrid) -> tuple[str, str]:
        zero = site.zero if site.has_zero else 0
        return self.builder.constant(site.scale), self.builder.constant(zero, np.uint8)

    def _weight(self, path: str, weight: WeightCodes) -> str:
        build = self.builder
        kind = INT8 if weight.bits > 4 else INT2 if weight.bits == 2 and self.int2 else INT4
        name = path.removesuffix("weight_path.final_weight") + "weight"
        codes = build.packed(name, weight.codes.numpy(), kind)
        if kind != INT8:  # folded when the file is loaded; a sub-byte DequantizeLinear would run in float
            codes = build.add("Cast", [codes], {"to": INT8}, name="w8")
        fits = int(weight.zero.min()) >= -128 and int(weight.zero.max()) <= 127
        zero = weight.zero if fits else torch.zeros_like(weight.zero)
        one = weight.axis is None
        inputs = [
            codes,
            build.constant(weight.scale[0] if one else weight.scale),
            build.constant(zero[0] if one else zero, np.int8),
        ]
        result = build.add("DequantizeLinear", inputs, {} if one else {"axis": weight.axis}, name="w")
        if fits:
            return result
        # A channel far from 0: no int8 zero point, so the offset is subtracted in float.
        offset = (weight.zero.double() * weight.scale.double()).float()
        wide = [-1 if dim == (weight.axis or 0) else 1 for dim in range(weight.codes.dim())]
        return build.add("Sub", [result, build.constant(offset.reshape(wide))], name="w")
