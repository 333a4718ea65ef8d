"""What can be done with a finished run: read it back, score it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsq import pipeline
from zsq.checkpoint import load_tree, read_json, write_json_atomic
from zsq.data import check_disjoint, load_data
from zsq.errors import BadInput
from zsq.evaluation import keep_examples, label_free, score
from zsq.onnx_model import load_onnx
from zsq.onnx_session import runtime_version
from zsq.teachers import Teacher, load_teacher


def open_run(path: Path, device: torch.device | str = "cpu") -> tuple[Teacher, nn.Module, dict[str, Any]]:
    """Read a finished run: its teacher, its student and its summary.

    Args:
        path: the run directory.
        device: where to put both networks.

    Raises:
        BadInput: if the run is not finished, or its teacher's weights are not the ones it was made from.
    """
    if not (path / "summary.json").exists():
        raise BadInput(str(path), expected="a finished run directory (with summary.json)", got="none there",
                       fix="Give a run directory, or finish this one with `zsq quantize ... --resume`.")  # fmt: skip
    config = read_config(path)
    facts = dict(config["teacher"])
    name, fingerprint = facts.pop("name"), facts.pop("fingerprint")
    teacher = load_teacher(name, **facts, device=device)
    if teacher.fingerprint != fingerprint:
        raise BadInput(str(path), expected=f"the teacher it was made from ({fingerprint[:16]})",
                       got=f"another one ({teacher.fingerprint[:16]})",
                       fix="Give the same weights, or quantize again.")  # fmt: skip
    return teacher, pipeline.read_student(path, teacher), read_json(path / "summary.json")


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a run directory.

    Raises:
        BadInput: if it is not one that `zsq quantize` made.
    """
    record = read_json(path / "config.json")
    config = record.get("config") if isinstance(record, dict) else None
    teacher = config.get("teacher") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(teacher, dict) or not {"name", "fingerprint"} <= set(teacher):
        raise BadInput(str(path / "config.json"), expected="the configuration of a run of `zsq quantize`",
                       got="other data", fix="Give a run directory that `zsq quantize` made.")  # fmt: skip
    return config


def evaluate(path: Path | str, *, data: str | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Score a finished run and write the result into its summary.

    Args:
        path: the run directory.
        data: a DATA string; without it only the label-free agreement is measured, on the images saved with the run.
        device: where to compute.

    Returns:
        The keys that were measured.

    Raises:
        BadInput: for an unfinished run, or data that does not fit the teacher or contains images it was made from.
    """
    path = Path(path)
    pool = read_config(path).get("images") if (path / "config.json").exists() else None
    if data is not None and pool is not None and pipeline.is_real(pool):
        check_disjoint(pool, data)
    teacher, student, summary = open_run(path, device)
    if data is None:
        images = load_tree(path / "images.safetensors")["images"].to(device)
        result = label_free(student, teacher, images, summary["agreement_inputs"])
    else:
        labelled = load_data(data, teacher)
        result = pipeline.scores(teacher, student, labelled)
        keep_examples(path, labelled)
    write_json_atomic(path / "summary.json", summary | result)
    return result


def evaluate_teacher(
    name: str, facts: dict[str, Any], *, data: str, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Score a float network on a labelled set.

    Args:
        name: TEACHER as on the command line.
        facts: the other arguments of `load_teacher`.
        data: a DATA string.
        device: where to compute.

    Returns:
        Metric, score, interval, the set and its size.
    """
    teacher = load_teacher(name, **facts, device=device)
    labelled = load_data(data, teacher)
    result = score(teacher.net, labelled)
    return {
        "metric": result.metric,
        "teacher": teacher.name,
        **pipeline.score_facts("teacher", result),
        **pipeline.data_facts(labelled),
    }


def evaluate_onnx(
    path: Path | str,
    facts: dict[str, Any],
    *,
    data: str,
    runtime: str = "ort",
) -> dict[str, Any]:
    """Score an ONNX file itself, in its runtime on the CPU.

    Args:
        path: the file.
        facts: the other arguments of `load_teacher`; they win over the file's metadata.
        data: a DATA string.
        runtime: what runs it.

    Returns:
        Metric, score, interval, the set and its size, the file and the runtime.

    Raises:
        BadInput: if the runtime is not installed, the file cannot be used, or the data does not fit it.
    """
    model = load_onnx(path, facts, runtime=runtime, threads=torch.get_num_threads())
    labelled = load_data(data, model)
    result = score(model.net, labelled)
    return {
        "metric": result.metric,
        "file": Path(path).name,
        "file_sha256": model.fingerprint,
        "runtime": runtime_version(runtime),
        **pipeline.score_facts("student", result),
        **pipeline.data_facts(labelled),
    }
