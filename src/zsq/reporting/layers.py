"""One row per quantized weight and activation: bits, range, how much it clips, how much noise its rounding adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.analysis.sensitivity import Sensitivity
from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.grid import Grid
from zsq.insert.access import activation_quantizers, weight_paths

BATCH = 64


@dataclass(frozen=True)
class Row:
    """A quantized weight, or the activations of a call site.

    Attributes:
        name: of the layer or site.
        kind: weight or activation.
        op: kind of layer, or the operation whose result is rounded.
        shape: of the weight; empty for an activation.
        bits: of a code.
        scales: number of step sizes: 1, or one per output channel.
        symmetric: whether its zero point is 0 by construction.
        low: smallest number its grids can hold.
        high: largest number its grids can hold.
        clipped: share of the values outside their grid, which become its first or last code; None if not measured.
        sqnr: signal to quantization noise, 10 log10(sum x^2 / sum (x - q)^2) in dB; None if not measured or undefined.
        changed: share of the integer weights that differ between the first and the last snapshot of the run, each on
            its own grid; None for activations or without a history.
        kl: what it costs alone: KL(teacher || float network with this quantizer only), in nats; None if not measured.
        changes: share of decisions that this quantizer alone changes.
    """

    name: str
    kind: str
    op: str
    shape: tuple[int, ...]
    bits: int
    scales: int
    symmetric: bool
    low: float | None = None
    high: float | None = None
    clipped: float | None = None
    sqnr: float | None = None
    changed: float | None = None
    kl: float | None = None
    changes: float | None = None


class _Tally:
    """Sums over what a quantizer was given, on its device."""

    def __init__(self) -> None:
        self.count, self.scales = 0, 1
        self.sums, self.ends = torch.zeros(3), torch.zeros(2)
        self.shape: tuple[int, ...] = ()

    def add(self, x: Tensor, q: Tensor, grid: Grid) -> None:
        """Count values outside the grid, signal and noise."""
        code = torch.round(x * grid.inv_step - grid.zero)
        outside = ((code < grid.qmin) | (code > grid.qmax)).sum(dtype=torch.float64)
        noise = (x - q).double().square().sum()
        sums = torch.stack([outside, x.double().square().sum(), noise])
        low, high = ((end + grid.zero) / grid.inv_step for end in (grid.qmin, grid.qmax))
        self.ends = torch.stack([low.amin(), high.amax()])
        self.sums = sums if self.count == 0 else self.sums + sums
        self.count += x.numel()
        self.shape, self.scales = tuple(x.shape), grid.inv_step.numel()

    def facts(self) -> dict[str, Any]:
        """What a row says about it."""
        outside, signal, noise = self.sums.tolist()
        low, high = self.ends.tolist()
        sqnr = None if noise <= 0 or signal <= 0 else float(10 * torch.log10(torch.tensor(signal / noise)))
        return {"low": low, "high": high, "clipped": outside / max(self.count, 1), "sqnr": sqnr}


def measure(
    student: nn.Module, images: Tensor | None, image: tuple[int, int, int], sites: Mapping[str, str]
) -> list[Row]:
    """Pass images through a student and watch its quantizers.

    Args:
        student: with frozen ranges, in eval mode.
        images: shape [n, c, h, w], normalised, on its device; None measures the weights only.
        image: input shape.
        sites: operation by name of a call site.

    Returns:
        A row per quantizer in the order of execution; weights of layers that are never called are left out.
    """
    tallies: dict[tuple[str, str], _Tally] = {}
    layers = {named.name: (place, named) for place, named in weight_paths(student).items()}
    quantizers = activation_quantizers(student)
    handles = []

    for name, (_, named) in layers.items():

        def weight(module: Any, args: Any, output: Any, key: tuple[str, str] = ("weight", name)) -> None:
            if key not in tallies:
                own, _ = module.fold(args[1], args[2])
                tallies[key] = _Tally()
                tallies[key].add(own, output[0], module.limited(module.quantizer.grid(own)))

        handles.append(named.path.register_forward_hook(weight))
    for name, quantizer in quantizers.items():

        def site(module: Any, args: Any, output: Tensor, key: tuple[str, str] = ("activation", name)) -> None:
            tallies.setdefault(key, _Tally()).add(args[0], output, module.grid(args[0]))

        handles.append(quantizer.register_forward_hook(site))
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            for part in [torch.zeros(2, *image, device=device)] if images is None else images.split(BATCH):
                student(part)
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    for (kind, name), tally in tallies.items():
        if kind == "weight":
            place, named = layers[name]
            op, rule = type(student.get_submodule(place)).__name__.removeprefix("Quantized"), named.path.quantizer
            rows.append(Row(name, kind, op, tally.shape, rule.bits, tally.scales, rule.symmetric, **tally.facts()))
        else:
            quantizer = quantizers[name]
            facts = tally.facts() if images is not None else {k: tally.facts()[k] for k in ("low", "high")}
            rows.append(Row(name, kind, sites.get(name, ""), (), quantizer.bits, tally.scales, quantizer.symmetric,
                            **facts))  # fmt: skip
    return rows


def with_changes(rows: list[Row], path: Path) -> list[Row]:
    """Add the share of changed integer weights over a run.

    Args:
        rows: from `measure`.
        path: the run directory; without a history of two snapshots the rows stay as they are.

    Raises:
        BadInput: if a snapshot is damaged or belongs to another network.
    """
    files = sorted((path / "history").glob("[0-9]*.safetensors"))
    if len(files) < 2:
        return rows
    first, last = load_tree(files[0]), load_tree(files[-1])
    found = []
    for row in rows:
        before, after = (tree.get(f"{row.name}.codes") for tree in (first, last))
        if row.kind != "weight" or before is None or after is None:
            found.append(row)
            continue
        if before.shape != after.shape:
            raise BadInput(str(files[-1]), expected="a snapshot of this run's student", got="one of another network",
                           fix="The files were changed or mixed up: quantize again.")  # fmt: skip
        found.append(replace(row, changed=float((before != after).double().mean())))
    return found


def with_costs(rows: list[Row], measured: Sensitivity | None) -> list[Row]:
    """Add what each quantizer costs alone."""
    if measured is None:
        return rows
    costs = [(measured.weights if row.kind == "weight" else measured.sites)[row.name] for row in rows]
    return [replace(row, kl=cost.kl, changes=1 - cost.agreement) for row, cost in zip(rows, costs, strict=True)]


@dataclass(frozen=True)
class Size:
    """Bytes of the low-bit network when its codes are packed, against the float network.

    Graph, names and the runtime's own overhead are in neither.

    Attributes:
        whole: parameters and BatchNorm statistics of the float network.
        codes: integer weights at their own number of bits, each tensor filled up to whole bytes.
        scales: a float32 step per range, and an int32 zero point where the grid is not symmetric.
        rest: what stays float (biases, BatchNorm, layers left out), and the int32 biases of folded BatchNorms.
    """

    whole: int
    codes: int
    scales: int
    rest: int

    @property
    def packed(self) -> int:
        """Bytes of the low-bit network."""
        return self.codes + self.scales + self.rest

    @property
    def ratio(self) -> float:
        """Float bytes over packed bytes."""
        return self.whole / max(self.packed, 1)


def size(teacher: nn.Module, student: nn.Module, rows: list[Row]) -> Size:
    """Count bytes.

    Args:
        teacher: the float network.
        student: its low-bit copy, after a forward.
        rows: from `measure`.
    """
    layers = {named.name: (place, named) for place, named in weight_paths(student).items()}
    seen: set[int] = set()
    codes = scales = rest = 0
    for row in rows:
        if row.kind == "weight":
            place, (_, path, parameter) = layers[row.name]
            latent = id(path) if parameter is None else id(parameter)
            if latent in seen:  # shared by several layers
                continue
            seen.add(latent)
            codes += -(-torch.Size(row.shape).numel() * row.bits // 8)
            if path.norm is not None:
                seen |= {id(tensor) for tensor in chain(path.norm.parameters(), path.norm.buffers())}
                rest += 4 * path.norm.num_features if getattr(student.get_submodule(place), "bias", None) is None else 0
        scales += row.scales * (4 if row.symmetric else 8)
    inside = [named.path.quantizer for _, named in layers.values()] + list(activation_quantizers(student).values())
    for quantizer in inside:
        seen |= {id(tensor) for tensor in chain(quantizer.parameters(), quantizer.buffers())}
    rest += _bytes(student, seen)
    return Size(_bytes(teacher, set()), codes, scales, rest)


def _bytes(net: nn.Module, apart_from: set[int]) -> int:
    tensors = {id(t): t for t in chain(net.parameters(), net.buffers()) if t.is_floating_point()}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in apart_from)
