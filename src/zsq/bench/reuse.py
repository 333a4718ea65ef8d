"""Cells that were measured before: taken over from result files if they would be the same run again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsq import pipeline
from zsq.bench.matrix import Cell
from zsq.errors import BadInput
from zsq.insert import QuantSpec
from zsq.teachers import Teacher, load_teacher

# Options that a result file's facts attest, besides those of the recipe, which are in its plan.
ATTESTED = frozenset({"budget", "eval", "placement", "fidelity", "base", "steps", "batch"})


class Measured:
    """Cells of result files, to be asked for by what they were, not by what they were called.

    A cell is taken over if teacher, bits, seed, placement, the source of its images, the labelled set (name and
    checksum) and every number that its recipe settled on are those of the cell asked for. The latter are found by
    rehearsing the recipe: one step of each stage, in memory.

    Args:
        files: result files of `zsq bench`.

    Raises:
        BadInput: if one cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._records: list[dict[str, Any]] = []
        self._teachers: dict[str, Teacher] = {}
        self._sets: dict[tuple[str, str], dict[str, Any]] = {}
        self._rehearsed: dict[str, dict[str, Any]] = {}
        for file in files:
            self._records += _read(file)

    def find(self, cell: Cell, shared: dict[str, Any]) -> dict[str, Any] | None:
        """The finished cell that is this one, under this one's label, or None.

        Raises:
            BadInput: if the cell's options or its labelled set cannot be used.
        """
        if cell.source:  # a label does not say which network it was
            return None
        asked = cell.asked(shared)
        here = {"teacher": cell.teacher, "weight_bits": cell.weight_bits, "act_bits": cell.act_bits, "seed": cell.seed}
        near = [
            record for record in self._records
            if _equal(record, here) and all(record["plan"].get(key, value) == value for key, value in asked.items())
        ]  # fmt: skip
        if not near:
            return None
        facts = self._expected(cell, asked)
        for record in near:
            said = {key: record[key] for key in ("recipe", "fidelity") if key in record}  # since 0.2
            mine = {"recipe": cell.recipe, "fidelity": asked.get("fidelity", "best")}
            plain = set(record.get("asked", ())) <= {*ATTESTED, *record["plan"]}
            if plain and facts is not None and _equal(record, facts) and said == {key: mine[key] for key in said}:
                return {**record, "method": cell.method}
        return None

    def _expected(self, cell: Cell, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What the result of a cell would say besides its scores; None if it has options that results do not name."""
        key = json.dumps([cell.teacher, cell.recipe, cell.weight_bits, cell.act_bits, asked], sort_keys=True)
        if key not in self._rehearsed:
            options = {name: value for name, value in asked.items() if name not in ("eval", "placement")}
            if not set(options) <= set(pipeline.parameters(cell.recipe)):
                return None
            if cell.teacher not in self._teachers:
                self._teachers[cell.teacher] = load_teacher(cell.teacher)
            teacher = self._teachers[cell.teacher]
            spec = QuantSpec(cell.weight_bits, cell.act_bits, placement=asked.get("placement", "paper"))
            outcome = pipeline.rehearse(teacher, recipe=cell.recipe, spec=spec, options=options)
            plan = json.loads(json.dumps(outcome.plan))
            if not set(asked) <= {*ATTESTED, *plan}:
                return None
            self._rehearsed[key] = {
                "placement": spec.placement, "base": outcome.source.name, "steps": plan["steps"], "plan": plan,
                "float_sites": len(outcome.report.floats), "eval_data": self._labelled(asked["eval"], teacher),
            }  # fmt: skip
        return self._rehearsed[key]

    def _labelled(self, text: str, teacher: Teacher) -> dict[str, Any]:
        if (text, teacher.name) not in self._sets:
            data = pipeline.open_data(text, teacher)
            self._sets[text, teacher.name] = {"name": data.name, "sha256": data.sha256}
        return self._sets[text, teacher.name]


def _read(file: Path) -> list[dict[str, Any]]:
    """The cells of a result file, each with commit and versions it was measured with, and the name of the file."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        about = {"commit": result["commit"], "versions": result["versions"], "taken_from": file.name}
        return [about | cell for cell in result["cells"] if isinstance(cell["plan"], dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"no key {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
        raise BadInput(f"--reuse {file}", expected="a result file of `zsq bench`", got=got,
                       fix="Give the JSON that --output wrote.") from error  # fmt: skip


def _equal(record: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(record.get(key) == value for key, value in wanted.items())
