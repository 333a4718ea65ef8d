"""Figures of the page: inline SVG with the colours and the font of the page, so that it follows light and dark."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from zsq.reporting.layers import Row

# matplotlib wants colours, not CSS: each of these stands for a word of the style sheet.
_INK, _LINE, _FIRST, _SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
_CSS = {_INK: "currentColor", _LINE: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "zsq", "font.size": 9, "font.family": "sans-serif", "text.color": _INK,
    "axes.edgecolor": _LINE, "axes.labelcolor": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": _LINE, "grid.linewidth": 0.6, "xtick.color": _INK,
    "ytick.color": _INK, "lines.linewidth": 1.6, "axes.formatter.useoffset": False,
}  # fmt: skip
MEANING = {
    "kl": "distance of the student's outputs from the teacher's, what training lowers",
    "ce": "cross entropy of the student on the labels the images were made for",
    "g_ce": "image source: cross entropy of the teacher on the labels asked for",
    "g_bns": "image source: distance of the images' statistics from those in BatchNorm",
}


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        title: a few words.
        about: one sentence: what is drawn, and what it comes to.
        svg: markup without any text of users' files but labels, escaped by matplotlib.
    """

    title: str
    about: str
    svg: str


def curves(stage: str, record: dict[str, Any]) -> list[Chart]:
    """One chart per loss term of a stage.

    Args:
        stage: its name.
        record: from `zsq.reporting.facts.training`.
    """
    charts = []
    for name, values in record["terms"].items():
        points = [(step, value) for step, value in zip(record["steps"], values, strict=True) if value is not None]
        if not points:
            continue
        steps, heights = zip(*points, strict=True)
        meaning = f" ({MEANING[name]})" if name in MEANING else ""
        about = f"{name}{meaning}: {heights[0]:.4g} at step {steps[0]}, {heights[-1]:.4g} at step {steps[-1]}."
        charts.append(Chart(name, about, _curve(f"{stage}-{name}", steps, heights)))
    return charts


def cost_chart(rows: Sequence[Row]) -> Chart | None:
    """What every quantizer costs alone, in the order of execution; None if it was not measured."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    known = [(i, row.kind, row.name, row.kl) for i, row in enumerate(rows, start=1) if row.kl is not None]
    if not known:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.4), layout="constrained")
        axes = figure.subplots()
        for kind, color in (("weight", _FIRST), ("activation", _SECOND)):
            own = [(i, kl) for i, k, _, kl in known if k == kind]
            axes.bar([i for i, _ in own], [kl for _, kl in own], 0.8, color=color)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="number in the table below", ylabel="KL, nats", xlim=(0.3, len(rows) + 0.7))
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        svg = _svg(figure, "costs")
    first = max(known, key=lambda row: row[3])
    about = (
        f"The dearest of the {len(known)} quantizers is the {first[1]} {first[2]} (number {first[0]}) with "
        f"{first[3]:.3g} nats; the median is {statistics.median(row[3] for row in known):.3g}."
    )
    return Chart("What each quantizer costs alone", about, svg)


def _curve(key: str, steps: Sequence[int], values: Sequence[float]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 1.9), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, values, color=_FIRST, marker="o" if len(steps) == 1 else "", ms=4)
        if low > 0 and high / low > 30:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        return _svg(figure, key)


def _svg(figure: Any, key: str) -> str:
    """Markup of a figure for a page that holds several: own identifiers, colours and fonts of the page."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = re.sub(r"[^A-Za-z0-9]", "-", key)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--font)", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r">\s+<", "><", text)
    for color, word in _CSS.items():
        text = text.replace(color, word)
    return text
