"""Exported files: written, run, compared with the student, measured.

from zsq.export import export
export("runs/NAME", target="ort")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zsq.errors import BadInput

TARGETS = {"ort": ".onnx", "openvino": ".onnx", "torch": ".pt2"}

__all__ = ["TARGETS", "export"]


def export(
    run_path: Path | str,
    *,
    target: str = "ort",
    output: Path | str | None = None,
    benchmark: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Export the student of a finished run, check the file against it, and write export-TARGET.json into the run.

    Args:
        run_path: the run directory.
        target: ort (ONNX Runtime), openvino, or torch (a torch.export program).
        output: the file; model-TARGET.onnx or .pt2 in the run directory if not given.
        benchmark: also measure speed against the float network in the same runtime.
        device: where teacher and student are loaded; files are checked on the CPU.

    Returns:
        The contents of export-TARGET.json: agreement, max_lsb, integer_conv_share, size_ratio, and with `benchmark`
        speedup_batch1 and speedup_batch32; float_convolutions names what runs in float all the same.

    Raises:
        BadInput: for an unfinished run, a missing package, a path that cannot be written, an operator that cannot be
            exported, a runtime too old for the file.
        RunFailed: if the file does not compute what the student computes; no file is left.
    """
    if target not in TARGETS:
        raise BadInput("--target", expected=", ".join(TARGETS), got=repr(target), fix="Choose one of these.")
    if benchmark and target == "torch":
        raise BadInput("--benchmark", expected="--target ort or openvino", got="--target torch",
                       fix="torch computes such a program in float: there is no speed-up to measure.")  # fmt: skip
    run_path = Path(run_path)
    path = Path(output) if output is not None else run_path / f"model-{target}{TARGETS[target]}"
    if target != "torch":
        from zsq.export.onnx_file import require

        require(target)
    from zsq.checkpoint import load_tree, write_json_atomic
    from zsq.finished import open_run

    teacher, student, summary = open_run(run_path, device)
    images = load_tree(run_path / "images.safetensors")["images"]
    if target == "torch":
        from zsq.export import torch_program

        result = torch_program.write(student, teacher, images, path)
    else:
        result = _write_onnx(student, teacher, images, path, target, summary)
        if benchmark:
            result |= _measure(teacher, path, target)
    result["warning"] = _warning(result, summary["placement"])
    write_json_atomic(run_path / f"export-{target}.json", result)
    return result


def _warning(result: dict[str, Any], placement: str) -> str | None:
    """One sentence about what the runtime computes in float although its weights are low-bit."""
    names = result.get("float_convolutions")
    if not names:
        return None
    fix = "" if placement == "deploy" else " Quantize with --placement deploy for integers throughout."
    count = f"{len(names)} of {result['convolutions']} convolutions"
    return f"{result['runtime']} runs {count} in float: {', '.join(names)}.{fix}"


def _write_onnx(
    student: Any, teacher: Any, images: Any, path: Path, target: str, summary: dict[str, Any]
) -> dict[str, Any]:
    from zsq.export import onnx_program

    facts = {key: summary[key] for key in ("recipe", "weight_bits", "act_bits", "placement", "seed")}
    return onnx_program.write(student, teacher, images, path, target=target, facts=facts)


def _measure(teacher: Any, path: Path, target: str) -> dict[str, Any]:
    import tempfile

    from zsq.export import benchmark
    from zsq.export.float_model import float_onnx

    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "float.onnx"
        float_onnx(teacher, reference)
        found: dict[str, Any] = benchmark.measure(path, reference, target)
    return found
