"""What an export found, in words and units: the table that `zsq export` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BUSY = 0.1  # share of the time spent waiting above which milliseconds say more about the machine than about the file


def in_words(result: Mapping[str, Any]) -> dict[str, str]:
    """The contents of export-TARGET.json for people.

    Example:
        >>> in_words({"file": "m.onnx", "bytes": 2048, "size_ratio": 6.5, "runtime": "onnxruntime 1.32",
        ...           "agreement": 0.9995, "images": 2000})["size"]
        '2,048 bytes, 6.50 times smaller than the float file'
    """
    words = {
        "file": str(result["file"]),
        "size": f"{result['bytes']:,} bytes, {result['size_ratio']:.2f} times smaller than the float file",
        "checked in": str(result["runtime"]),
        "same decisions": f"{100 * result['agreement']:.2f} % of those of the student, on {result['images']:,} images",
    }
    if "lsb_share" in result:
        words["same decisions"] += ", with the runtime's optimisations"
        words["codes, site by site"] = (
            f"{_steps(result['max_lsb'])} apart at most, {100 * result['lsb_share']:.4f} % differ, not optimised"
        )
        whole = round(result["integer_conv_share"] * result["convolutions"])
        words["convolutions on integers"] = f"{whole} of {result['convolutions']}"
        if result["float_convolutions"]:
            words["in float"] = ", ".join(result["float_convolutions"])
        words["operators that run"] = ", ".join(f"{kind} {count}" for kind, count in result["operators"].items())
    if "site_max_lsb" in result:
        words["codes, site by site"] = (
            f"{_steps(result['site_max_lsb'])} apart at most, {100 * result['site_share_off']:.4f} % differ"
        )
        words["layers between integers"] = (
            f"{100 * result['lowerable_conv_share']:.2f} %; torch itself computes in float"
        )
    return words | _speed(result)


def _speed(result: Mapping[str, Any]) -> dict[str, str]:
    """Latencies and speed-ups, where the file was measured."""
    words = {}
    batches = sorted(int(key.removeprefix("speedup_batch")) for key in result if key.startswith("speedup_batch"))
    for batch in batches:
        own, other = (result[f"latency_ms_{name}batch{batch}"] for name in ("", "float_"))
        text = f"{own:.2f} ms, float {other:.2f} ms: {result[f'speedup_batch{batch}']:.2f} times as fast"
        own, other = (result.get(f"latency_ms_{name}batch{batch}") for name in ("bf16_", "float_bf16_"))
        if own is not None and other is not None:
            text += f" (bf16 where float: {own:.2f} ms, float {other:.2f} ms)"
        waited = result.get(f"waited_batch{batch}") or 0.0
        if waited > BUSY:
            text += (
                f"; on a busy machine, {100 * waited:.0f} % of the time was waiting: by processor time "
                f"{result[f'speedup_cpu_batch{batch}']:.2f} times as fast"
            )
        words[f"latency, batch {batch}"] = text
    if batches:
        slow = ", which has no 8-bit multiply-add instructions" if result["vnni"] is False else ""
        threads = f"{result['threads']} thread{'' if result['threads'] == 1 else 's'}"
        words["measured on"] = f"{result['cpu']}, {threads}{slow}; medians, both files in turns"
    return words


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"
