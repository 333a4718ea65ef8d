"""Everything a report says, as one JSON-able object: read from a run directory, measured on its saved images."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsq import pipeline
from zsq.analysis import INSTRUMENTS
from zsq.analysis.sensitivity import Sensitivity, sensitivity
from zsq.checkpoint import plain, read_json
from zsq.finished import open_run
from zsq.footprint import footprint
from zsq.insert import QuantSpec
from zsq.insert.access import freeze_ranges
from zsq.reporting.layers import Row, Size, measure, size, with_changes, with_costs
from zsq.reporting.opinions import album, distance
from zsq.reporting.pictures import Album
from zsq.reporting.saved import damaged, labelled_images, saved_images
from zsq.run.progress import Progress
from zsq.teachers import Teacher

WORK = 2e12  # multiply-accumulates that measuring may take: a minute or two on a CPU
LOOK, TRY = 256, 128  # images looked at, and images that sensitivity is measured on, at most
FEW = 16  # ... and at least
POINTS = 300  # points of a training curve
NEEDED = ("teacher", "recipe", "base", "weight_bits", "act_bits", "placement", "seed", "steps", "seconds", "device",
          "agreement", "agreement_inputs")  # fmt: skip


NUMBERS = ("weight_bits", "act_bits", "steps", "seconds", "agreement")


@dataclass(frozen=True)
class Facts:
    """What a report says.

    Attributes:
        run: name of the run directory.
        place: how to name it on the command line: its path as given, unless that is absolute.
        task: of the teacher.
        summary: contents of summary.json.
        real_images: what `--images` named, if the run was made from real images; None for synthetic ones.
        size: bytes of the float and of the packed network.
        layers: one row per quantized weight and activation, in the order of execution.
        floats: what stays float: name, op, why.
        notes: what else differs from the network that was given.
        sensitivity: agreement and KL with each quantizer alone; None if not measured.
        training: per stage of the run its steps and loss terms; empty without metrics.jsonl.
        images: the images looked at and what both networks say of them; None without images.safetensors.
        labelled: the same of the first images of the last evaluation, and its name; None without one.
        analysis: instrument -> name of its figure within the run directory.
        exports: target -> contents of export-TARGET.json.
        missing: what is not there, and how to get it.
        reproduce: command, versions, seed, machine, hashes.
    """

    run: str
    place: str
    task: str
    summary: dict[str, Any]
    real_images: str | None
    size: Size
    layers: list[Row]
    floats: list[dict[str, str]]
    notes: list[str]
    sensitivity: Sensitivity | None
    training: dict[str, dict[str, Any]]
    images: dict[str, Any] | None
    labelled: dict[str, Any] | None
    analysis: dict[str, str]
    exports: dict[str, dict[str, Any]]
    missing: dict[str, str]
    reproduce: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give the same as plain data."""
        table = plain(asdict(self))
        table["size"] |= {"packed": self.size.packed, "ratio": self.size.ratio}
        return table


def collect(
    path: Path, *, count: int | None, with_sensitivity: bool, device: torch.device | str, shown: Progress
) -> tuple[Facts, Album | None, Album | None]:
    """Read and measure.

    Args:
        path: a finished run directory.
        count: images that sensitivity is measured on; chosen by the size of the network if None.
        with_sensitivity: whether to measure it.
        device: where to compute.
        shown: progress display.

    Returns:
        The facts, and what the page shows: the run's images, and labelled ones of an evaluation.

    Raises:
        BadInput: if the run is not finished, or one of its files is damaged.
    """
    teacher, student, summary = open_run(path, device)
    _check(path / "summary.json", summary)
    freeze_ranges(student)
    kept, config = _student_facts(path), read_json(path / "config.json")
    images, labels = saved_images(path, teacher)
    missing = _missing(path, labelled=labels is not None)
    macs = footprint(teacher.net, torch.zeros(1, *teacher.image, device=teacher.device)).macs
    look = None if images is None else images[: _affordable(LOOK, macs * 2)].to(teacher.device)
    rows = measure(student, look, teacher.image, {site["name"]: site["op"] for site in kept["sites"]})
    examples = labelled_images(path, teacher)
    names = None if examples is None else examples.classes
    pictures, shown_too = None, None
    if look is not None:
        pictures = album(teacher, student, look, None if labels is None else labels[: len(look)], names=names)
    if examples is not None:
        seen = examples.images.to(teacher.device)
        shown_too = album(teacher, student, seen, examples.truth, worst=0, names=names)
    effect = None
    if look is not None and with_sensitivity:
        tries = _affordable(TRY, macs * (len(rows) + 3)) if count is None else count
        tried: Any = images[:tries].to(teacher.device)  # type: ignore[index]
        effect = sensitivity(student, teacher.net, kept["spec"], tried, compare=distance(teacher), shown=shown)
    elif not with_sensitivity:
        missing["sensitivity"] = "The sensitivity of single layers was not measured (--no-sensitivity)."
    pool = config["config"].get("images")
    facts = Facts(
        run=path.resolve().name,
        place=path.resolve().name if path.is_absolute() else str(path),
        task=teacher.task,
        summary=summary,
        real_images=pool if pool is not None and pipeline.is_real(pool) else None,
        size=size(teacher.net, student, rows),
        layers=with_costs(with_changes(rows, path), effect),
        floats=kept["floats"],
        notes=kept["notes"],
        sensitivity=effect,
        training=training(path / "metrics.jsonl"),
        images=None if pictures is None else pictures.facts(),
        labelled=None if shown_too is None or examples is None else {"name": examples.name, **shown_too.facts()},
        analysis=_figures(path),
        exports=_exports(path),
        missing=missing,
        reproduce=_reproduce(path, config, teacher, student),
    )
    return facts, pictures, shown_too


def _check(file: Path, summary: Any) -> None:
    """Refuse a summary that lacks what every run writes, or holds other than numbers where numbers belong."""
    summary = summary if isinstance(summary, dict) else {}
    scores = ("teacher_score", "student_score", "eval_count", "metric")
    needed = NEEDED + (scores if "student_score" in summary else ())
    if absent := [key for key in needed if key not in summary]:
        damaged(file, "the summary of a run", f"one without {', '.join(absent[:4])}")
    for key in {*NUMBERS, *scores[:3]} & set(summary):
        if isinstance(summary[key], bool) or not isinstance(summary[key], int | float):
            damaged(file, "the summary of a run", f"{key} {summary[key]!r:.40}")


def training(file: Path) -> dict[str, dict[str, Any]]:
    """The curves of metrics.jsonl, thinned to at most `POINTS` points by averaging neighbours.

    Args:
        file: metrics.jsonl; need not exist.

    Returns:
        Per stage ``steps``, ``seconds`` and ``terms`` (name -> values, None where a line has none).

    Raises:
        BadInput: naming the first damaged line.
    """
    stages: dict[str, list[dict[str, Any]]] = {}
    text = _text(file) if file.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
            stages.setdefault(str(record.pop("stage")), []).append({k: float(v) for k, v in record.items()})
            stages[next(reversed(stages))][-1]["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged(file, "one JSON object per line, with stage, step and numbers", f"something else in line {number}")
    found = {}
    for stage, lines in stages.items():
        width = -(-len(lines) // POINTS)
        groups = [lines[i : i + width] for i in range(0, len(lines), width)]
        names = dict.fromkeys(key for line in lines for key in line if key not in ("step", "seconds"))
        found[stage] = {
            "steps": [int(group[-1]["step"]) for group in groups],
            "seconds": lines[-1].get("seconds"),
            "terms": {name: [_mean([x[name] for x in group if name in x]) for group in groups] for name in names},
        }
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _affordable(most: int, macs: float) -> int:
    """How many images of that cost stay within `WORK`."""
    return max(FEW, min(most, int(WORK / max(macs, 1))))


def _student_facts(path: Path) -> dict[str, Any]:
    file = path / "student.json"
    kept = read_json(file)
    try:
        rows = {kind: [{k: str(row[k]) for k in keys} for row in kept[kind]]
                for kind, keys in (("sites", ("name", "op")), ("floats", ("name", "op", "why")))}  # fmt: skip
        return {**rows, "notes": [str(note) for note in kept["notes"]], "spec": QuantSpec.from_json(kept["spec"])}
    except (KeyError, TypeError):
        return damaged(file, "what a run wrote about its student", "something else")


def _missing(path: Path, *, labelled: bool) -> dict[str, str]:
    """What the run directory lacks, in sentences."""
    lacks = {}
    if not (path / "metrics.jsonl").exists() or not _text(path / "metrics.jsonl").strip():
        lacks["training"] = "No training curves: the run has no metrics.jsonl, or logged nothing."
    if not (path / "images.safetensors").exists():
        lacks["images"] = (
            "No images.safetensors: there are no images to show, and activations, agreement and sensitivity of single "
            "layers could not be measured."
        )
    elif not labelled:
        lacks["labels"] = "The images were not made for particular classes."
    if len(list((path / "history").glob("[0-9]*.safetensors"))) < 2:
        lacks["changed"] = "No history of two snapshots: how many integer weights changed is unknown."
    return lacks


def _figures(path: Path) -> dict[str, str]:
    return {name: f"analysis/{name}.png" for name in INSTRUMENTS if (path / "analysis" / f"{name}.png").exists()}


def _exports(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(path.glob("export-*.json")):
        record = read_json(file)
        if not isinstance(record, dict) or "agreement" not in record:
            damaged(file, "the result of `zsq export`", "something else")
        found[file.stem.removeprefix("export-")] = record
    return found


def _reproduce(path: Path, config: dict[str, Any], teacher: Teacher, student: nn.Module) -> dict[str, Any]:
    command = config.get("command")
    return {
        "command": _typed(command) if isinstance(command, list) else None,
        "versions": config.get("versions") or {},
        "seed": config.get("seed"),
        "threads": config.get("threads"),
        "hardware": config.get("hardware"),
        "resumed": len(config.get("resumed") or []),
        "hashes": {
            f"teacher {teacher.name}": teacher.fingerprint,
            "configuration": config.get("fingerprint"),
            **{name: _sha256(path / name) for name in ("student.safetensors", "images.safetensors")
               if (path / name).exists()},
        },
    }  # fmt: skip


def _typed(command: list[Any]) -> str:
    """A command line as a user types it: the program is zsq, however it was started."""
    program, *rest = map(str, command or ["zsq"])
    return shlex.join(["zsq" if Path(program).stem in ("cli", "__main__", "zsq") else program, *rest])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return damaged(file, "a text file", "something else")
