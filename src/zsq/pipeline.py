"""From a teacher to a finished run directory: what `zsq quantize` does, as functions."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsq import recipes
from zsq.checkpoint import load_tree, read_json, save_tree, write_json_atomic
from zsq.data import check_disjoint, load_images
from zsq.errors import BadInput
from zsq.evaluation import Agreement, agreement, score
from zsq.insert import QuantSpec, quantize
from zsq.machine import describe_device
from zsq.presets import Outcome
from zsq.probe import probe_pool
from zsq.run import Run
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher

if TYPE_CHECKING:
    from zsq.data import LabelledData
    from zsq.sources.base import Source

HELD_OUT = 1024  # images of the run's source that the agreement is measured on


def default_path(teacher: Teacher, recipe: str, spec: QuantSpec, seed: int) -> Path:
    """`runs/TEACHER-RECIPE-WxAy-sSEED`, safe as a file name."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in teacher.name)
    return Path("runs") / f"{name}-{recipe}-W{spec.weight_bits}A{spec.act_bits}-s{seed}"


def produce(
    teacher: Teacher,
    run: Run,
    *,
    recipe: str = "ait",
    spec: QuantSpec | None = None,
    images: Source | None = None,
    options: dict[str, Any] | None = None,
    data: LabelledData | None = None,
) -> dict[str, Any]:
    """Run a whole recipe and write its results.

    Args:
        teacher: the float network.
        run: an open run; a directory-less one returns the summary only.
        recipe: name of the recipe.
        spec: bits, placement and patterns.
        images: a pool in place of the recipe's own source.
        options: the recipe's other keyword arguments.
        data: labelled set to score teacher and student on.

    Returns:
        The contents of summary.json.

    Raises:
        BadInput: if an option does not exist or does not fit the teacher.
        RunFailed: if a loss became non-finite.
        Interrupted: if a signal stopped the run; it can be resumed.
    """
    spec, options = spec or QuantSpec(), dict(options or {})
    function = recipes.load(recipe)
    known = inspect.signature(function).parameters
    if unknown := sorted(set(options) - set(known)):
        raise BadInput(f"recipe {recipe}", expected=f"options {', '.join(known)}", got=", ".join(unknown),
                       fix="Leave these out, or see `zsq quantize --recipe NAME --help`.")  # fmt: skip
    if images is not None:
        options["images"] = images
    started = time.monotonic()
    outcome: Outcome = function(teacher, run, spec=spec, **options)
    held_out = outcome.source.sample(HELD_OUT, run.rng("held-out", 0)).images
    agreed = agreement(outcome.student, teacher.net, held_out)
    probed = agreement(outcome.student, teacher.net, probe_pool(teacher))
    summary = {
        "teacher": teacher.name,
        "recipe": recipe,
        "base": outcome.source.name,
        "weight_bits": spec.weight_bits,
        "act_bits": spec.act_bits,
        "placement": spec.placement,
        "fidelity": options.get("fidelity", "best"),
        "seed": run.seed,
        "steps": outcome.plan["steps"],
        "seconds": round(run.seconds + time.monotonic() - started - run.session_seconds, 1),
        "device": describe_device(run.device),
        **agreement_facts(agreed, probed, f"{len(held_out)} held-out images of source {outcome.source.name}"),
        "float_sites": len(outcome.report.floats),
        "quantized_weights": len(outcome.report.weights),
        "activation_sites": len(outcome.report.sites),
        "checkpoint": "last",
        "plan": outcome.plan,
    }
    if data is not None:
        summary |= scores(teacher, outcome.student, data)
    if run.path is not None:
        write_student(run.path, outcome.student, spec, outcome.report.to_json())
        save_tree(run.path / "images.safetensors", {"images": held_out})
        write_json_atomic(run.path / "summary.json", summary)
    return summary


def agreement_facts(agreed: Agreement, probed: Agreement, inputs: str) -> dict[str, Any]:
    """The label-free part of a summary."""
    return {"agreement": agreed.share, "agreement_inputs": inputs, "probe_agreement": probed.share}


def scores(teacher: Teacher, student: nn.Module, data: LabelledData) -> dict[str, Any]:
    """Score teacher and student on a labelled set; the keys a summary has after an evaluation."""
    float_score, low_bit = score(teacher.net, data), score(student, data)
    return {
        "metric": "top1",
        "teacher_score": float_score.top1,
        "student_score": low_bit.top1,
        "student_interval": list(low_bit.interval),
        "teacher_top5": float_score.top5,
        "student_top5": low_bit.top5,
        "eval_data": {"name": data.name, "sha256": data.sha256},
        "eval_count": low_bit.count,
    }


def write_student(path: Path, student: nn.Module, spec: QuantSpec, report: dict[str, Any]) -> None:
    """Write student.safetensors (all tensors by name) and student.json (spec and report)."""
    tensors = {name: value.detach().cpu() for name, value in sorted(student.state_dict().items())}
    save_tree(path / "student.safetensors", tensors)
    write_json_atomic(path / "student.json", {"spec": spec.to_json(), **report})


def read_student(path: Path, teacher: Teacher) -> nn.Module:
    """Rebuild the student of a finished run: quantize its teacher as student.json says, then load the weights.

    Raises:
        BadInput: if the run is not finished or does not belong to this teacher.
    """
    if not (path / "student.safetensors").exists():
        raise BadInput(str(path), expected="a finished run directory (with student.safetensors)", got="none there",
                       fix="Finish it with `zsq quantize ... --run DIR --resume`.")  # fmt: skip
    spec = QuantSpec.from_json(read_json(path / "student.json")["spec"])
    student, _ = quantize(teacher.net, spec)
    state: dict[str, Tensor] = load_tree(path / "student.safetensors")
    student.load_state_dict(state)
    return student.eval()


def load_pool(
    text: str | None, teacher: Teacher, *, batch: int | None = None, apart_from: str | None = None
) -> PoolSource | None:
    """Open the pool that `--images` names.

    Args:
        text: FILE.safetensors (a saved synthetic set), a DATA string such as npz:FILE[a:b] (real pixels, no labels),
            or None.
        teacher: whose normalisation and image size apply.
        batch: images per draw; 64 if not given.
        apart_from: the evaluation set of the same run.

    Returns:
        The source, or None for None.

    Raises:
        BadInput: if the file cannot be used, or if its images overlap the evaluation set.
    """
    if text is None:
        return None
    if text.endswith(".safetensors"):
        tree = load_tree(Path(text))
        images, labels = tree["images"], tree.get("labels")
        if tuple(images.shape[1:]) != tuple(teacher.image):
            raise BadInput("--images", expected=f"images of shape {list(teacher.image)}",
                           got=str(list(images.shape[1:])),
                           fix="Give a pool made for this teacher.")  # fmt: skip
        name = f"saved images ({Path(text).name})"
    else:
        if apart_from is not None:
            check_disjoint(text, apart_from)
        images, labels, name = load_images(text, teacher), None, f"real images ({Path(text).name})"
    device = next(teacher.net.parameters()).device
    labels = None if labels is None else labels.to(device)
    return PoolSource(images.to(device), labels, name=name, batch=batch or 64)


def resolve_device(name: str) -> torch.device:
    """Turn auto, cpu or cuda into a device.

    Raises:
        BadInput: for cuda on a machine without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", expected="cuda with a GPU that torch can use", got="none found",
                       fix="Use --device cpu, or install a CUDA build of torch.")  # fmt: skip
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
