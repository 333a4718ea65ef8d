"""Facts, charts and pictures as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from zsq.checkpoint import read_json
from zsq.errors import BadInput
from zsq.reporting.facts import Facts
from zsq.reporting.pictures import Album, data_uri
from zsq.reporting.readings import reading
from zsq.reporting.words import METRICS, amount, percent, remarks, title, verdict

PACKAGES = {"matplotlib": "matplotlib", "jinja2": "jinja2", "PIL": "pillow"}
MOST_CURVES = 12  # per stage
ABOUT = {
    "cosine": "Do cross entropy and distillation pull the weights the same way? 1: yes, 0: nothing in common.",
    "trace": "How sharp is the minimum? The trace of the loss's Hessian: the higher, the sharper.",
    "landscape": "What does the loss look like around the student, along random directions of the weights?",
    "flips": "Which integer weights moved, early and late in training?",
}


def require_packages() -> None:
    """Say how to install what draws and writes, before anything is computed.

    Raises:
        BadInput: naming the packages that are not installed.
    """
    absent = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise BadInput("zsq report", expected="matplotlib, jinja2 and pillow", got=f"no {', no '.join(absent)}",
                       fix='Install them: pip install "zsq[report]".')  # fmt: skip


def render(path: Path, facts: Facts, pictures: Album | None, labelled: Album | None = None) -> str:
    """Write the page.

    Args:
        path: the run directory, for the figures of its analysis.
        facts: what it says.
        pictures: the run's images that it shows.
        labelled: labelled images that it shows.

    Returns:
        HTML without a link to anything outside itself.

    Raises:
        BadInput: if a figure of the analysis is damaged.
    """
    from jinja2 import Environment, StrictUndefined

    from zsq.reporting.charts import cost_chart, curves

    folder = files("zsq.reporting")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Names come from users' files: everything is escaped but our own style, script and figures.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = {"percent": percent, "amount": amount, "picture": data_uri, "number": number, "breakable": breakable}
    environment.filters |= filters
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    charts = {stage: curves(stage, record) for stage, record in facts.training.items()}
    return template.render(
        facts=facts,
        s=facts.summary,
        album=pictures,
        labelled=labelled,
        title=title(facts),
        verdict=verdict(facts),
        remarks=remarks(facts),
        metric=METRICS.get(facts.summary.get("metric", ""), facts.summary.get("metric")),
        charts={stage: own[:MOST_CURVES] for stage, own in charts.items()},
        left_out={stage: [chart.title for chart in own[MOST_CURVES:]] for stage, own in charts.items()},
        cost=cost_chart(facts.layers),
        most=max((row.kl for row in facts.layers if row.kl is not None), default=0.0),
        figures={name: _figure(path / file) for name, file in facts.analysis.items()},
        about=ABOUT,
        readings={name: _reading(path, name) for name in facts.analysis},
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _reading(path: Path, name: str) -> str:
    file = path / "analysis" / f"{name}.json"
    record = read_json(file) if file.exists() else {}
    return reading(name, record) if isinstance(record, dict) else ""


def number(value: Any, digits: int = 4) -> str:
    """A number with a few significant digits; a dash for None.

    Example:
        >>> number(0.123456), number(12), number(None)
        ('0.1235', '12', '–')
    """
    if value is None:
        return "–"
    return f"{value:.{digits}g}".replace("-", "−") if isinstance(value, float) else str(value)


def breakable(name: str) -> Any:
    """A dotted name, escaped, that a narrow column may break at its dots and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))


def _figure(file: Path) -> str:
    """A figure of the analysis as a data URI."""
    from PIL import Image, UnidentifiedImageError

    damaged = BadInput(str(file), expected="a PNG figure of `zsq analyse`", got="damaged data",
                       fix="Make it again: zsq analyse RUN.")  # fmt: skip
    try:
        data = file.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            image.verify()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise damaged from error
    return "data:image/png;base64," + base64.b64encode(data).decode()
