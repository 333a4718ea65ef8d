"""Write the tables of README.md and docs/findings.md from bench/results/*.json.

    python scripts/render_results.py            # write
    python scripts/render_results.py --check    # only say whether they are up to date

A table stands between ``<!-- results: NAME LAYOUT -->`` and ``<!-- end -->``: NAME.json, and LAYOUT `wide` (a row per
method, a column per bit width) or `long` (a row per method and bit width, with agreements and minutes).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md")
BLOCK = re.compile(r"(<!-- results: (\w+) (wide|long) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def score(row: dict[str, Any]) -> str:
    """Mean over seeds in percent, with the deviation where there are several."""
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
    return f"{100 * row['student_score']:.2f}{spread}"


def wide(rows: list[dict[str, Any]]) -> list[str]:
    """A row per method, a column per bit width."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    found = {(row["method"], row["bits"]): row for row in rows}
    lines = ["| method | seeds | " + " | ".join(bits) + " |", "|---|---|" + "---|" * len(bits)]
    lines.append("| float | | " + " | ".join([f"{100 * rows[0]['teacher_score']:.2f}"] * len(bits)) + " |")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [found.get((method, width)) for width in bits]
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


def rendered(text: str) -> str:
    """A page with every table made again."""

    def table(match: re.Match[str]) -> str:
        rows = json.loads((ROOT / "bench" / "results" / f"{match[2]}.json").read_text(encoding="utf-8"))["table"]
        return match[1] + "\n".join((wide if match[3] == "wide" else long)(rows)) + match[4]

    return BLOCK.sub(table, text)


def main() -> None:
    """Write the pages, or with ``--check`` end with 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if check and before != after:
            sys.exit(f"{page.name} is out of date: python scripts/render_results.py")
        page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
