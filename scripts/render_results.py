"""Write the tables of README.md, docs/findings.md and docs/performance.md from bench/results/*.json.

    python scripts/render_results.py            # write
    python scripts/render_results.py --check    # only say whether they are up to date

A table stands between ``<!-- results: NAME LAYOUT -->`` and ``<!-- end -->``: NAME.json, and LAYOUT `wide` (a row per
method, a column per teacher and bit width), `long` (a row per method and bit width, with agreements and minutes),
`instruments` (a column per analysed cell), `times` (bench/analysis_time.py), `memory` (bench/generator_memory.py),
`speed`, `scaling` and `recipes` (bench/speed.py), `parts` (bench/memory.py), `starts` (bench/startup.py), `compiled`
(bench/compile_trial.py), or `exported`, `files`, `latency` and `kernels` (bench/export.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_tables
import speed_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md", ROOT / "docs" / "performance.md")
# A marker at the beginning of a line ends the old table: an empty block is one too, and never reaches into the next.
BLOCK = re.compile(r"(<!-- results: (\w+) (\w+) -->\n)(?:(?!<!-- ).*\n)*(?=<!-- end -->)")
BEGINNING = re.compile(r"<!-- results: .*-->")
TRACES = {"ce": "CE", "kl_as_trained": "KL as trained, T=20", "kl_batchmean": "KL, batch mean, T=20",
          "kl_t1": "KL, batch mean, T=1"}  # fmt: skip


def score(row: dict[str, Any]) -> str:
    """Mean over seeds in percent, with the deviation where there are several."""
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
    return f"{100 * row['student_score']:.2f}{spread}"


def wide(rows: list[dict[str, Any]]) -> list[str]:
    """A row per method, a column per bit width; of several teachers a group of columns each."""
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    columns = [(teacher, bits) for teacher in teachers for bits in widths]
    found = {(row["method"], row["teacher"], row["bits"]): row for row in rows}
    floats = {row["teacher"]: f"{100 * row['teacher_score']:.2f}" for row in rows}
    heads = [bits if len(teachers) == 1 else f"{teacher} {bits}" for teacher, bits in columns]
    lines = ["| method | seeds | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(columns)]
    lines.append("| float | | " + " | ".join(floats[teacher] for teacher, _ in columns) + " |")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [found.get((method, *column)) for column in columns]
        seeds = "/".join(dict.fromkeys(str(row["seeds"]) for row in mine if row))
        lines.append(f"| {method} | {seeds} | " + " | ".join("" if row is None else score(row) for row in mine) + " |")
    return lines


def long(rows: list[dict[str, Any]]) -> list[str]:
    """A row per method and bit width, with what no label is needed for."""
    lines = [
        "| bits | method | seeds | student | drop, points | agreement, own images | agreement, probe | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['bits']} | {row['method']} | {row['seeds']} | {score(row)} | {row['drop_points']:.2f} "
        f"| {100 * row['agreement']:.1f} | {100 * row['probe_agreement']:.1f} | {row['seconds'] / 60:.1f} |"
        for row in rows
    ]
    return lines


def instruments(found: dict[str, Any]) -> list[str]:
    """What the instruments say of the cells of a study, a column each."""
    keys = found["analysis"]
    scores = {(row["method"], row["bits"]): row for row in found["table"]}
    names = [f"{key['method']}, {key['bits']}" for key in keys]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(keys)]
    rows: dict[str, list[str]] = {"student, top-1 %": [score(scores[key["method"], key["bits"]]) for key in keys]}
    for name, when in (("early", "first"), ("late", "last")):
        rows[f"weights changed in the {when} tenth, %"] = [
            f"{100 * key[f'flips_{name}']:.4f} (layers {100 * key[f'flips_{name}_least']:.3f}"
            f" to {100 * key[f'flips_{name}_most']:.3f})"
            for key in keys
        ]
    for kind in keys[0]["cosine"]:
        rows[f"cosine of CE and KL, {kind}"] = [f"{key['cosine'][kind]:.2f}" for key in keys]
    for kind in keys[0]["trace"]:
        rows[f"trace, {TRACES[kind]}"] = [f"{key['trace'][kind][0]:.0f} ± {key['trace'][kind][1]:.0f}" for key in keys]
    for kind in keys[0]["trace"]:
        rows[f"trace over loss, {TRACES[kind]}"] = [f"{key['trace'][kind][2]:.0f}" for key in keys]
    return lines + [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]


def memory(found: dict[str, Any]) -> list[str]:
    """Forecast and measured memory of a step at ImageNet size."""
    lines = ["| network | step of | parameters, M | GMAC per image | forecast, GiB | measured, GiB | a run, GiB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in found["table"]:
        what = row["of"] + ("" if not row["options"] else ", whole embedding")
        taken = "not run" if row["measured"] is None else f"{row['measured']:.2f}"
        whole = f"{row['run']:.2f}" if "run" in row else ""
        lines.append(f"| {row['net']} | {what} | {row['parameters'] / 1e6:.1f} | {row['macs'] / 1e9:.2f} "
                     f"| {row['forecast']:.2f} | {taken} | {whole} |")  # fmt: skip
    return lines


def times(found: dict[str, Any]) -> list[str]:
    """How long the instruments take."""
    lines = ["| instrument | processor seconds | seconds by the clock |", "|---|---|---|"]
    plain = found["second_derivatives"]
    compared = f"for comparison: traces with second derivatives, {plain['probes']} probes at one moment"
    rows = {**found["instruments"], "**all**": found["total"], compared: plain}
    return lines + [f"| {name} | {row['cpu_seconds']:.1f} | {row['seconds']:.1f} |" for name, row in rows.items()]


LAYOUTS: dict[str, Callable[[Any], list[str]]] = {
    "wide": lambda found: wide(found["table"]), "long": lambda found: long(found["table"]),
    "instruments": instruments, "memory": memory, "times": times, "speed": speed_tables.speed,
    "scaling": speed_tables.scaling, "recipes": speed_tables.by_recipe, "starts": speed_tables.starts,
    "parts": speed_tables.parts, "compiled": speed_tables.compiled,
    "exported": export_tables.exported, "files": export_tables.files, "latency": export_tables.latency,
    "kernels": export_tables.kernels,
}  # fmt: skip


def rendered(text: str, results: Path = ROOT / "bench" / "results") -> str:
    """A page with every table made again.

    Raises:
        ValueError: for a block without its end, or a layout that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        if match[3] not in LAYOUTS:
            raise ValueError(f"results block {match[2]}: expected one of {', '.join(LAYOUTS)}, got {match[3]!r}")
        found = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + "\n".join(LAYOUTS[match[3]](found)) + "\n"

    made, count = BLOCK.subn(table, text)
    if count != len(BEGINNING.findall(text)):
        whole = {match[1].strip() for match in BLOCK.finditer(text)}
        broken = next((line for line in BEGINNING.findall(text) if line not in whole), "a results block")
        raise ValueError(f"{broken}: expected a line <!-- end --> after its table, got none before the next block")
    return made


def main() -> None:
    """Write the pages, or with ``--check`` end with 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        try:
            after = rendered(before)
        except ValueError as error:
            sys.exit(f"{page.name}: {error}")
        if check and before != after:
            sys.exit(f"{page.name} is out of date: python scripts/render_results.py")
        page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
