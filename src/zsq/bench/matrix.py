"""The matrix file of `zsq bench`: which runs, with which options, and what is looked at afterwards."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from zsq.analysis import INSTRUMENTS
from zsq.errors import BadInput


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Attributes:
        teacher: its label in tables.
        method: label of the row.
        recipe: name of the recipe.
        weight_bits: of the weights.
        act_bits: of the activations.
        seed: of the run.
        options: of `zsq quantize`, beside those that all cells share.
        variant: end of the directory's name, for matrices run with another budget than the file's.
        source: TEACHER as on a command line; the label if not given.
    """

    teacher: str
    method: str
    recipe: str
    weight_bits: int
    act_bits: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        """Name of the run directory."""
        method = "".join(c if c.isalnum() else "-" for c in self.method)
        bits = f"W{self.weight_bits}A{self.act_bits}"
        return f"{self.teacher}-{method}-{bits}-s{self.seed}{self.variant}".replace("/", "-")

    def asked(self, shared: dict[str, Any]) -> dict[str, Any]:
        """All options of the run, except bits and seed."""
        return {key.replace("-", "_"): value for key, value in {**shared, **self.options}.items()}

    def command(self, folder: Path, shared: dict[str, Any]) -> list[str]:
        """The command line that makes this cell; running it again goes on where it stopped."""
        options = {
            **shared,
            **self.options,
            "weight-bits": self.weight_bits,
            "act-bits": self.act_bits,
            "seed": self.seed,
        }
        flags = [text for key, value in options.items() for text in _flag(key, value)]
        resume = ["--resume"] if (folder / "checkpoint").is_dir() and any((folder / "checkpoint").iterdir()) else []
        return [sys.executable, "-m", "zsq.cli", "quantize", self.source or self.teacher, "--recipe", self.recipe,
                "--run", str(folder),
                "--json", *flags, *resume]  # fmt: skip


class Look(NamedTuple):
    """What the instruments are pointed at when the cells are finished.

    Attributes:
        what: instruments.
        cells: the cells, in the order of the matrix.
    """

    what: tuple[str, ...]
    cells: list[Cell]


def _flag(key: str, value: object) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [name] if value else []
    return [name, *(str(item) for item in value)] if isinstance(value, list) else [name, str(value)]


def read_matrix(
    path: Path, *, teacher: str | None = None, budget: str | None = None
) -> tuple[list[Cell], dict[str, Any]]:
    """Read MATRIX.toml.

    Args:
        path: a file with ``teachers``, ``bits`` (pairs), ``seeds``, ``[options]`` for every cell, optionally
            ``[teacher.NAME]`` tables with options for the cells of one teacher, facts of a user's network included
            (``weights``, ``mean``, ``decode`` ...; ``source`` is its TEACHER where NAME is only a label), and one
            ``[[method]]`` table per method: ``name``, ``recipe``, and optionally its own ``options``, ``seeds``,
            ``bits``. What a method says goes before what a teacher says, and that before what all cells share.
        teacher: in place of the file's teachers; one of them, or one with a table of its own.
        budget: in place of the shared one.

    Returns:
        The cells in order, and the options they share.

    Raises:
        BadInput: if the file is missing, is not TOML, lacks a key, two cells would share a directory, or nothing says
            what a teacher is scored on.
    """
    table = _table(path)
    try:
        if not isinstance(table["teachers"], list):
            raise ValueError(f"teachers = {table['teachers']!r} is not a list")
        own = {name: dict(options) for name, options in table.get("teacher", {}).items()}
        sources = {name: str(options.pop("source", "")) for name, options in own.items()}
        known = [*table["teachers"], *own]
        if teacher is not None and teacher not in known:
            raise BadInput("--teacher", expected=f"one of {', '.join(dict.fromkeys(known))}", got=repr(teacher),
                           fix=f'Add a table [teacher."{teacher}"] with eval = "DATA" to {path.name}.')  # fmt: skip
        cells = [
            Cell(name, method["name"], method["recipe"], w, a, seed, {**own.get(name, {}), **method.get("options", {})},
                 "" if budget is None else f"-{budget}", sources.get(name, ""))
            for name in (table["teachers"] if teacher is None else [teacher])
            for w, a in table["bits"]
            for method in table["method"]
            if [w, a] in method.get("bits", table["bits"])
            for seed in method.get("seeds", table["seeds"])
        ]  # fmt: skip
        shared = {**table.get("options", {}), **({} if budget is None else {"budget": budget})}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        got = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise BadInput(str(path), expected="teachers, bits, seeds and [[method]] tables in TOML", got=got,
                       fix="See bench/cifar10_main.toml for an example.") from error  # fmt: skip
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(str(path), expected="cells with different names", got=f"{twice[0]} more than once",
                       fix="Names of methods must differ in letters or digits.")  # fmt: skip
    if blind := [cell.name for cell in cells if "eval" not in {**shared, **cell.options}]:
        raise BadInput(str(path), expected="a labelled set for every cell", got=f"none for {blind[0]}",
                       fix='Write eval = "DATA" under [options].')  # fmt: skip
    return cells, shared


def select(cells: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose names match one of some patterns.

    Args:
        cells: of a matrix.
        only: patterns with ``*`` and ``?``.

    Raises:
        BadInput: for a pattern that matches none.
    """
    for pattern in only:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise BadInput("--only", expected="patterns of cells", got=f"{pattern!r}, which matches none",
                           fix=f"Cells are named like {cells[0].name}.")  # fmt: skip
    return [cell for cell in cells if any(fnmatchcase(cell.name, pattern) for pattern in only)]


def read_look(path: Path, cells: list[Cell]) -> Look:
    """Read the table ``[analysis]`` of MATRIX.toml.

    Args:
        path: the file; its table has ``what`` (instruments), and optionally ``methods``, ``bits`` and ``seeds``, which
            choose cells; all of them if not given.
        cells: of the same file.

    Returns:
        Instruments and cells; none without the table.

    Raises:
        BadInput: for an instrument or a method that does not exist, or if no cell is chosen.
    """
    table = _table(path).get("analysis")
    if table is None:
        return Look((), [])
    what, methods = table.get("what", []), table.get("methods")
    labels = list(dict.fromkeys(cell.method for cell in cells))
    where, fix = f"{path}, [analysis]", "See bench/ait_study.toml for an example."
    if not what or not set(what) <= set(INSTRUMENTS):
        raise BadInput(where, expected=f"what = [...] of {', '.join(INSTRUMENTS)}", got=what, fix=fix)
    if methods is not None and not set(methods) <= set(labels):
        raise BadInput(where, expected=f"methods = [...] of {'; '.join(labels)}", got=methods, fix=fix)
    chosen = [
        cell for cell in cells
        if (methods is None or cell.method in methods)
        and [cell.weight_bits, cell.act_bits] in table.get("bits", [[cell.weight_bits, cell.act_bits]])
        and cell.seed in table.get("seeds", [cell.seed])
    ]  # fmt: skip
    if not chosen:
        raise BadInput(where, expected="a choice with at least one cell", got="none", fix=fix)
    return Look(tuple(what), chosen)


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            str(path), expected="a matrix file", got=error.strerror, fix="Give the path of a .toml."
        ) from error
    except ValueError as error:
        raise BadInput(str(path), expected="teachers, bits, seeds and [[method]] tables in TOML", got=error,
                       fix="See bench/cifar10_main.toml for an example.") from error  # fmt: skip
