"""Tables of what a step, a start and a compiler cost, from what the benchmarks wrote. `render_results` places them."""

from __future__ import annotations

from typing import Any


def speed(found: dict[str, Any]) -> list[str]:
    """Where a step's time goes, and what it is compared with."""
    whole = found["seconds_per_step"]
    lines = ["| part of a step | ms | share |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * t:.1f} | {100 * t / whole:.1f} % |" for name, t in found["parts"].items()]
    lines.append(f"| whole step, measured | {1000 * whole:.1f} | |")
    ratios = {
        "whole step over float step": f"{found['step_over_float_step']:.3f}",
        "student over float student": f"{found['student_over_float_student']:.3f}",
        "gradient inundation, added share": f"{100 * found['gi_overhead']:.2f} %",
        "reads of a number per unlogged step": f"{found['host_syncs_per_step']}",
        "whole step over arithmetic floor": f"{found['step_over_floor']:.2f}",
        "precision": found.get("precision", "bf16"),
        "peak memory": f"{found['peak_memory_bytes'] / 2**20:.0f} MiB",
        "matrix rate, float32 and bfloat16": " and ".join(f"{v / 1e9:.0f}" for v in found["matrix_rate"].values())
        + " GFLOP/s",
    }
    if "speedup_over_reference" in found:
        ratios["plain implementation over whole step"] = f"{found['speedup_over_reference']:.2f}"
    return [*lines, "", "| measure | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in ratios.items())]


def scaling(found: dict[str, Any]) -> list[str]:
    """How time and arithmetic grow with each quantity: exponents from the first to the last value."""
    lines = ["| varied | values | ms per step | exponent, time | exponent, arithmetic |", "|---|---|---|---|---|"]
    for row in found["sweep"]:
        values = ", ".join(str(point["value"]) for point in row["points"])
        times = ", ".join(f"{1000 * point['seconds']:.0f}" for point in row["points"])
        lines.append(f"| {row['what']} | {values} | {times} | {row['exponent']:.2f} | {row['exponent_flop']:.2f} |")
    return lines


def by_recipe(found: dict[str, Any]) -> list[str]:
    """A row per recipe: steps per second, memory, numbers read from the device, and where the time of a step goes."""
    heads = ("source", "teacher", "student forward", "student backward", "optimizer", "inundation")
    firsts = "| recipe | steps/s | peak, MiB | over float step | numbers read | "
    lines = [firsts + " | ".join(f"{h}, %" for h in heads) + " |", "|---|" + "---|" * (4 + len(heads))]
    for row in found["recipes"]:
        if "failed" in row:
            lines.append(f"| {row['recipe']} | {row['failed']} |" + " |" * (3 + len(heads)))
            continue
        peak = f"{row['peak_memory_bytes'] / 2**20:.0f}"
        if "parts" not in row:
            each = "; ".join(f"{1000 * t:.0f} ms per step of {name}" for name, t in row["seconds_per_step"].items())
            lines.append(f"| {row['recipe']} | {each} | {peak} |" + " |" * (2 + len(heads)))
            continue
        shares = " | ".join(f"{100 * t / row['seconds_per_step']:.1f}" for t in row["parts"].values())
        ratio = f"{row['step_over_float_step']:.2f} | {row['host_syncs_per_step']}"
        lines.append(f"| {row['recipe']} | {row['steps_per_second']:.2f} | {peak} | {ratio} | {shares} |")
    return lines


def starts(found: dict[str, Any]) -> list[str]:
    """Starts against a bare interpreter, and the demo."""
    lines = ["| what | CPU seconds | times a bare `python` |", "|---|---|---|"]
    for name, row in found["starts"].items():
        lines.append(f"| `{name}` | {row['seconds']:.3f} | {row['over_python']:.1f} |")
    if "demo" in found:
        demo = found["demo"]
        ratio = demo["cpu_seconds"] / found["starts"]["python"]["seconds"]
        lines.append(f"| `make demo` behind its setup | {demo['cpu_seconds']:.1f} | {ratio:.0f} |")
        lines.append(f"| the same, seconds by the clock | {demo['seconds']:.1f} | |")
    return lines


def parts(found: dict[str, Any]) -> list[str]:
    """Peaks with and without parts."""
    lines = ["| batch | `--micro-batch` | peak, GiB | of it before the first step, GiB |", "|---|---|---|---|"]
    for row in found["cases"]:
        peak, before = (f"{row[key] / 2**30:.2f}" for key in ("peak_memory_bytes", "before_bytes"))
        lines.append(f"| {row['batch']} | {row['micro_batch'] or 'none'} | {peak} | {before} |")
    return lines


def compiled(found: dict[str, Any]) -> list[str]:
    """What compiling gains and costs."""
    lines = ["| part | eager, ms | compiled, ms | gain | compiling, s |", "|---|---|---|---|---|"]
    for name, row in found["parts"].items():
        if "failed" in row:
            lines.append(f"| {name} | | {row['failed']} | | |")
            continue
        eager, fast = 1000 * row["eager"], 1000 * row["compiled"]
        lines.append(f"| {name} | {eager:.0f} | {fast:.0f} | {row['gain']:.2f} | {row['compile_seconds']:.0f} |")
    return lines
