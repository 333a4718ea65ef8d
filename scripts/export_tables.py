"""Tables of exported files, from what bench/export.py wrote. `render_results` puts them into the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAMES = {"ort": "ONNX Runtime", "openvino": "OpenVINO"}  # runtimes in the order of columns and of "a / b"


def both(rows: list[dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> str:
    """What holds for the file of each runtime, once where it is the same."""
    found = [text(row) for row in rows]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def percent(key: str, digits: int = 2) -> Callable[[dict[str, Any]], str]:
    """A share of a row; empty where it was not measured."""
    return lambda row: f"{100 * row[key]:.{digits}f}" if row.get(key) is not None else ""


def pairs(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one network and width side by side."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["bits"]), []).append(row)
    return list(groups.values())


def files(found: dict[str, Any]) -> list[str]:
    """Every exported file: what its check found, and what it does on labelled images."""
    lines = [
        "| network | student | bits | integer convolutions | steps, at most | same decisions | on labelled images "
        "| student | file | smaller |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in pairs(found["files"]):
        first = rows[0]
        cells = [first["network"], first["students"], first["bits"]]
        cells.append(both(rows, lambda r: f"{round(r['integer_conv_share'] * r['convolutions'])}/{r['convolutions']}"))
        cells.append(both(rows, lambda r: str(r["max_lsb"])))
        trained = first.get("metric") is not None
        cells += [both(rows, percent(key)) if trained else "" for key in ("agreement", "labelled_agreement")]
        cells += [percent("student_score")(first), both(rows, percent("file_score"))]
        cells.append(both(rows, lambda r: f"{r['size_ratio']:.1f}"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def exported(found: dict[str, Any]) -> list[str]:
    """The short table: trained students, shapes at 4 bits, and at 8 bits those whose ranges alone were chosen."""
    faster = {(row["network"], row["bits"], row["target"]): row for row in found.get("speed", [])}
    kinds = {"trained": ("W4A4", "W3A3"), "untrained": ("W4A4",)}
    lines = [
        "| network | bits | integer convolutions | same decisions | student | file | smaller | faster in "
        + " | faster in ".join(NAMES.values()) + " |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rows in pairs([row for row in found["files"] if row["bits"] in kinds.get(row["students"], ("W8A8",))]):
        first = rows[0]
        cells = [first["network"], first["bits"], both(rows, percent("integer_conv_share", 0))]
        cells += [both(rows, percent("labelled_agreement")), percent("student_score")(first)]
        cells += [both(rows, percent("file_score")), both(rows, lambda r: f"{r['size_ratio']:.1f}")]
        speeds = [faster.get((first["network"], first["bits"], target)) for target in NAMES]
        cells += ["" if row is None else f"{row['speedup_cpu_batch1']:.1f}" for row in speeds]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def latency(found: dict[str, Any]) -> list[str]:
    """Milliseconds and speed-ups of files in turns with their float files."""
    lines = [
        "| network | bits | runtime | float, ms | file, ms | faster | faster, of time on the clock | faster, batch 32 "
        "| with bf16, ms: float, file |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["speed"]:
        bf16 = [row.get(f"cpu_ms_{name}bf16_batch1") for name in ("float_", "")]
        lines.append(
            f"| {row['network']} | {row['bits']} | {NAMES[row['target']]} | {row['cpu_ms_float_batch1']:.2f} "
            f"| {row['cpu_ms_batch1']:.2f} | {row['speedup_cpu_batch1']:.2f} | {row['speedup_batch1']:.2f} "
            f"| {row['speedup_cpu_batch32']:.2f} | {'' if None in bf16 else ', '.join(f'{ms:.2f}' for ms in bf16)} |"
        )
    return lines


def kernels(found: dict[str, Any]) -> list[str]:
    """What single layers gain: no network of such layers gains more."""
    lines = ["| layer | runtime | float, GFLOP/s | integer, GOP/s | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['network']} | {NAMES[row['target']]} | {row['float_per_second'] / 1e9:.0f} "
        f"| {row['integer_per_second'] / 1e9:.0f} | {row['ratio']:.2f} |"
        for row in found["bound"]
    ]
    return lines
