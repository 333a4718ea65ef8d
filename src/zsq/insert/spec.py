"""What to quantize, to how many bits, and with which ranges."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from zsq import quantizer
from zsq.errors import BadInput
from zsq.quantizer import LiveMinMax, Quantizer, RunningMinMax


@dataclass(frozen=True)
class QuantSpec:
    """How to quantize a network.

    Patterns are shell patterns (``fnmatch``); ``*`` also matches dots. Layers are named like their modules, e.g.
    ``layer1.0.conv1``; sites like the module or function whose result is rounded: ``layer1.0.relu``, its second call
    ``layer1.0.relu:2``, ``layer1.0.add``, a layer's output ``conv1.out``, ``input``. The report lists them all.

    Args:
        weight_bits: bits of weights, 2 to 8.
        act_bits: bits of activations, 2 to 8.
        placement: ``"paper"``: weights, and activations of the ReLU family; ``"deploy"``: what integer runtimes need.
        weight: range rule of weights: a class of `zsq.quantizer`, or a ``functools.partial`` of one.
        act: range rule of activations, the same.
        include: patterns; if given, only matching layers and sites get a quantizer.
        exclude: patterns of layers and sites that stay float.
        layer_bits: bits by pattern, for layers and sites; of several matching patterns the last one counts.
        leaf: patterns of modules not to trace into: weights inside are quantized, activations inside stay float.
        edge_bits: deploy only: bits of the input, of global averages, of weights and inputs of the first and last
            layers, and of what the network returns.

    Raises:
        BadInput: if a value is none of the above.

    Example:
        >>> QuantSpec(weight_bits=4, layer_bits={"fc": 8}).to_json()["layer_bits"]
        {'fc': 8}
    """

    weight_bits: int = 4
    act_bits: int = 4
    placement: str = "paper"
    weight: Callable[..., Quantizer] = LiveMinMax
    act: Callable[..., Quantizer] = RunningMinMax
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    leaf: Sequence[str] = ()
    edge_bits: int = 8

    def __post_init__(self) -> None:
        if self.placement not in ("paper", "deploy"):
            raise BadInput("placement", expected="'paper' or 'deploy'", got=repr(self.placement), fix="Choose one.")
        numbers = {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "edge_bits": self.edge_bits}
        numbers |= {f"layer_bits[{pattern!r}]": bits for pattern, bits in self.layer_bits.items()}
        for name, bits in numbers.items():
            if type(bits) is not int or not 2 <= bits <= 8:
                raise BadInput(name, expected="a whole number from 2 to 8", got=bits, fix="Choose 2 to 8.")
        for name in ("include", "exclude", "leaf"):
            if isinstance(getattr(self, name), str):
                given = getattr(self, name)
                raise BadInput(name, expected="a list of patterns", got=repr(given), fix=f"Write ({given!r},).")
        for name in ("weight", "act"):
            _rule_name(name, getattr(self, name))

    def selects(self, name: str) -> bool:
        """Whether a layer or site of that name gets a quantizer."""
        wanted = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def weight_quantizer(self, name: str, *, axis: int, edge: bool) -> Quantizer:
        """Make the quantizer of a layer's weight."""
        if self.placement == "deploy":
            bits = self._bits(name, self.edge_bits if edge else self.weight_bits)
            return self.weight(bits, axis=axis, symmetric=True)
        return self.weight(self._bits(name, self.weight_bits), axis=axis)

    def activation_quantizer(self, name: str, *, edge: bool) -> Quantizer:
        """Make the quantizer of a call site."""
        if self.placement == "deploy":
            return self.act(self._bits(name, self.edge_bits if edge else self.act_bits), include_zero=True)
        return self.act(self._bits(name, self.act_bits))

    def _bits(self, name: str, default: int) -> int:
        return next((bits for key, bits in reversed(list(self.layer_bits.items())) if fnmatchcase(name, key)), default)

    def to_json(self) -> dict[str, Any]:
        """Give the same as plain data; `from_json` reads it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("include", "exclude", "leaf"):
            plain[name] = list(plain[name])
        for name in ("weight", "act"):
            rule = plain[name]
            plain[name] = {"rule": _rule_name(name, rule), "options": dict(getattr(rule, "keywords", {}))}
        return plain | {"layer_bits": dict(self.layer_bits)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> QuantSpec:
        """Rebuild a spec from what `to_json` gave.

        Raises:
            BadInput: if a key or a range rule is unknown.
        """
        values = dict(plain)
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise BadInput("spec", expected="keys of QuantSpec", got=", ".join(sorted(unknown)), fix="Remove them.")
        for name in ("include", "exclude", "leaf"):
            values[name] = tuple(values.get(name, ()))
        for name in set(values) & {"weight", "act"}:
            rule: Any = getattr(quantizer, str(values[name]["rule"]), None)
            _rule_name(name, rule)
            options = values[name].get("options", {})
            values[name] = partial(rule, **options) if options else rule
        return cls(**values)


def _rule_name(name: str, rule: Any) -> str:
    """Name of a range rule; only classes of `zsq.quantizer` can be written down and read back without running code."""
    kind = rule.func if isinstance(rule, partial) else rule
    plain = isinstance(rule, partial) and bool(rule.args)
    if plain or not isinstance(kind, type) or not issubclass(kind, Quantizer):
        raise BadInput(
            name, expected="a Quantizer class, or functools.partial of one with keyword arguments", got=repr(rule),
            fix="For example zsq.quantizer.RunningMinMax.",
        )  # fmt: skip
    return kind.__name__


def check_patterns(
    spec: QuantSpec, names: Sequence[str], *, only: Sequence[str] | None = None, subject: str = ""
) -> None:
    """Check that every pattern matches something.

    Args:
        spec: the spec with the patterns.
        names: layers and sites (or modules, for `only`).
        only: check these patterns instead of include, exclude and layer_bits.
        subject: what to call them in the message.

    Raises:
        BadInput: naming the nearest names, if a pattern matches nothing.
    """
    groups = {"include": spec.include, "exclude": spec.exclude, "layer_bits": tuple(spec.layer_bits)}
    for group, patterns in (groups if only is None else {subject: only}).items():
        for pattern in patterns:
            if any(fnmatchcase(name, pattern) for name in names):
                continue
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4) or list(names[:4])
            raise BadInput(
                f"{group} pattern {pattern!r}", expected="a layer or call site" if only is None else "a module",
                got="no match", fix=f"Near: {', '.join(near) or 'there are none'}. The report lists all names.",
            )  # fmt: skip
