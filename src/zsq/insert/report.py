"""What was quantized and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from zsq.insert.spec import QuantSpec


class WeightRow(NamedTuple):
    """A quantized weight: layer name, shape, bits, axis of its ranges, and whether its zero point is 0."""

    name: str
    shape: tuple[int, ...]
    bits: int
    axis: int | None
    symmetric: bool


class SiteRow(NamedTuple):
    """An activation quantizer: site name, operation whose result it rounds, bits, path of the module that calls it."""

    name: str
    op: str
    bits: int
    where: str


class FloatRow(NamedTuple):
    """Something that stays float: name, operation or kind, and the reason."""

    name: str
    op: str
    why: str


@dataclass(frozen=True)
class QuantReport:
    """What `zsq.quantize` did; ``str()`` gives tables.

    Attributes:
        placement: ``"paper"`` or ``"deploy"``.
        weights: one row per convolution and linear layer with a quantizer.
        sites: one row per call site with a quantizer.
        floats: one row per tensor (or kind of tensor) that stays float.
        quantized_values: number of weight values with a quantizer; a shared parameter counts once.
        notes: what else differs from the network that was given.
        spec: what was asked for, with the range rules that the student has: what rebuilds it.
    """

    placement: str
    weights: tuple[WeightRow, ...]
    sites: tuple[SiteRow, ...]
    floats: tuple[FloatRow, ...]
    quantized_values: int
    notes: tuple[str, ...] = ()
    spec: QuantSpec | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the same as plain lists and dictionaries."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        for kind in ("weights", "sites", "floats"):
            plain[kind] = [row._asdict() for row in getattr(self, kind)]
        for row in plain["weights"]:
            row["shape"] = list(row["shape"])
        spec = {} if self.spec is None else {"spec": self.spec.to_json()}
        return plain | {"notes": list(self.notes)} | spec

    def __str__(self) -> str:
        head = (
            f"{self.placement} placement: {len(self.weights)} quantized weights ({self.quantized_values:,} values), "
            f"{len(self.sites)} activation quantizers, {len(self.floats)} float entries"
        )
        weights = [
            (
                w.name,
                "x".join(map(str, w.shape)),
                str(w.bits),
                "-" if w.axis is None else str(w.axis),
                _yes(w.symmetric),
            )
            for w in self.weights
        ]
        sites = [(s.name, s.op, str(s.bits), s.where) for s in self.sites]
        parts = [
            head,
            _table("weight", ("shape", "bits", "axis", "symmetric"), weights),
            _table("activation", ("after", "bits", "where"), sites),
            _table("stays float", ("op", "why"), self.floats),
            *self.notes,
        ]
        return "\n\n".join(part for part in parts if part)


def _yes(flag: object) -> str:
    return "yes" if flag else "no"


def _table(first: str, rest: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns; nothing for no rows."""
    if not rows:
        return ""
    lines = [(first, *rest), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rest) + 1)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
