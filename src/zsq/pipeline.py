"""From a teacher to a finished run directory: what `zsq quantize` does, as functions."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsq import recipes
from zsq.checkpoint import load_tree, read_json, save_tree, write_json_atomic
from zsq.data import check_disjoint, load_data, load_images
from zsq.errors import BadInput
from zsq.evaluation import keep_examples, label_free, score
from zsq.insert import QuantSpec, quantize
from zsq.machine import describe_device
from zsq.presets import Outcome
from zsq.run import Run
from zsq.sources.pool import PoolSource, read_pool
from zsq.tasks.base import Score
from zsq.teachers import Teacher

if TYPE_CHECKING:
    from zsq.data import LabelledData
    from zsq.sources.base import Batch, Source

NOISE, NOISE_COUNT = "noise", 1152  # `--images noise`: standard normal pixels, the control below all images



def default_path(teacher: Teacher, recipe: str, spec: QuantSpec, seed: int) -> Path:
    """`runs/TEACHER-RECIPE-WxAy-sSEED`, safe as a file name."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in teacher.name)
    return Path("runs") / f"{name}-{recipe}-W{spec.weight_bits}A{spec.act_bits}-s{seed}"


def produce(
    teacher: Teacher,
    run: Run,
    *,
    recipe: str = "zsq",
    spec: QuantSpec | None = None,
    images: Source | None = None,
    options: dict[str, Any] | None = None,
    data: LabelledData | None = None,
    synthetic: tuple[int, int] | None = None,
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
        synthetic: height and width of the images the recipe works on; the network's own if not given.

    Returns:
        The contents of summary.json.

    Raises:
        BadInput: if an option does not exist or does not fit the teacher.
        RunFailed: if a loss became non-finite.
        Interrupted: if a signal stopped the run; it can be resumed.
    """
    spec, options = spec or QuantSpec(), dict(options or {})
    teacher.outputs.compared()  # what measuring needs is asked for before the work, not after it
    started = time.monotonic()
    outcome = run_recipe(teacher.sized(synthetic), run, recipe=recipe, spec=spec, images=images, options=options)
    sample = outcome.source.sample(teacher.outputs.held_out, run.rng("held-out", 0))
    held_out = sample.images
    inputs = f"{len(held_out)} held-out images of source {outcome.source.name}"
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
        **({} if synthetic is None else {"synthetic": list(synthetic)}),
        "seconds": round(run.seconds + time.monotonic() - started - run.session_seconds, 1),
        "device": describe_device(run.device),
        **label_free(outcome.student, teacher, held_out, inputs),
        "float_sites": len(outcome.report.floats),
        "quantized_weights": len(outcome.report.weights),
        "activation_sites": len(outcome.report.sites),
        "checkpoint": "last",
        "plan": outcome.plan,
    }
    if run.path is not None:
        write_student(run.path, outcome.student, spec, outcome.report.to_json())
        save_tree(run.path / "images.safetensors", saved_images(sample))
    if data is not None:
        summary |= scores(teacher, outcome.student, data)
        if run.path is not None:
            keep_examples(run.path, data)
    if run.path is not None:  # last: a directory with a summary is a finished one
        write_json_atomic(run.path / "summary.json", summary)
    return summary


def run_recipe(
    teacher: Teacher,
    run: Run,
    *,
    recipe: str,
    spec: QuantSpec,
    images: Source | None = None,
    options: dict[str, Any] | None = None,
) -> Outcome:
    """Call a recipe by name, with the options it has.

    Raises:
        BadInput: if there is no such recipe or option, or one does not fit the teacher.
    """
    function, given = recipes.load(recipe), dict(options or {})
    known = parameters(recipe)
    if unknown := sorted(set(given) - set(known)):
        names = [name for name in known if name not in ("teacher", "run", "spec", "images")]
        raise BadInput(f"recipe {recipe}", expected=f"the options {', '.join(names)}", got=", ".join(unknown),
                       fix=f"Leave it out, or see `zsq quantize --recipe {recipe} --help`.")  # fmt: skip
    if images is not None:
        given["images"] = images
    outcome: Outcome = function(teacher, run, spec=spec, **given)
    return outcome


def parameters(recipe: str) -> list[str]:
    """Names of what a recipe can be given."""
    return list(inspect.signature(recipes.load(recipe)).parameters)


class _Rehearsal(Run):
    """Takes the last step of every stage only, and leaves nothing behind."""

    def steps(self, stage: str, total: int, **options: Any) -> Iterator[int]:
        """Yield the number of the last step."""
        for _ in super().steps(stage, min(total, 1), **options):
            yield total - 1


def rehearse(
    teacher: Teacher,
    *,
    recipe: str,
    spec: QuantSpec,
    images: Source | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    synthetic: tuple[int, int] | None = None,
) -> Outcome:
    """Take one step of every stage of a recipe in memory: what does not fit is refused before anything is on disk.

    Otherwise a loss that needs labels the images do not have, say, would be found out after minutes of warm-up.

    Args:
        teacher: the float network.
        recipe: name of the recipe.
        spec: bits, placement and patterns.
        images: a pool in place of the recipe's own source.
        options: the recipe's other keyword arguments.
        seed: seed of the run to come.
        synthetic: height and width of the images the recipe works on; the network's own if not given.

    Returns:
        What the recipe returned: its plan and report are those of the run to come, its student is of no use.

    Raises:
        BadInput: if an option does not exist or does not fit, or if the teacher cannot be quantized this way.
        RunFailed: if the first step is not finite.
    """
    with _Rehearsal(None, seed=seed, device=teacher.device, progress=False) as run:
        return run_recipe(teacher.sized(synthetic), run, recipe=recipe, spec=spec, images=images, options=options)


def saved_images(sample: Batch) -> dict[str, Tensor]:
    """What images.safetensors holds: images, and the labels they were made for, where there are any."""
    if sample.labels is None:
        return {"images": sample.images}
    return {"images": sample.images, "labels" if sample.labels.dtype == torch.int64 else "soft_labels": sample.labels}


def scores(teacher: Teacher, student: nn.Module, data: LabelledData) -> dict[str, Any]:
    """Score teacher and student on a labelled set; the keys a summary has after an evaluation."""
    float_score, low_bit = score(teacher.net, data), score(student, data)
    return {"metric": low_bit.metric, **score_facts("teacher", float_score, interval=False),
            **score_facts("student", low_bit), **data_facts(data)}  # fmt: skip


def score_facts(who: str, found: Score, *, interval: bool = True) -> dict[str, Any]:
    """A score as a summary holds it: ``student_score``, its interval where it has one, and what else was measured."""
    bounds = {f"{who}_interval": list(found.interval)} if interval and found.interval is not None else {}
    return {f"{who}_score": found.value, **bounds, **{f"{who}_{key}": value for key, value in found.extra.items()}}


def data_facts(data: LabelledData) -> dict[str, Any]:
    """What a summary says about the labelled set."""
    return {"eval_data": {"name": data.name, "sha256": data.sha256}, "eval_count": data.count}


def write_student(path: Path, student: nn.Module, spec: QuantSpec, report: dict[str, Any]) -> None:
    """Write student.safetensors (all tensors by name) and student.json (spec and report)."""
    tensors = {name: value.detach().cpu() for name, value in sorted(student.state_dict().items())}
    save_tree(path / "student.safetensors", tensors)
    write_json_atomic(path / "student.json", {"spec": spec.to_json(), **report})


def read_student(path: Path, teacher: Teacher) -> nn.Module:
    """Rebuild the student of a finished run: quantize its teacher as student.json says, then load the weights.

    Raises:
        BadInput: if the run is not finished, does not belong to this teacher, or its files are damaged.
    """
    if not (path / "student.safetensors").exists():
        raise BadInput(str(path), expected="a finished run directory (with student.safetensors)", got="none there",
                       fix="Finish it with `zsq quantize ... --run DIR --resume`.")  # fmt: skip
    facts = read_json(path / "student.json")
    state: dict[str, Tensor] = load_tree(path / "student.safetensors")
    try:
        student, _ = quantize(teacher.net, QuantSpec.from_json(facts["spec"]))
        student.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(str(path), expected="the student of a zsq run", got=" ".join(str(error).split())[:300],
                       fix="The files were changed or mixed up: quantize again.") from error  # fmt: skip
    return student.eval()


def open_data(text: str, teacher: Teacher) -> LabelledData:
    """Open a labelled set and read its first images, so that what is wrong is said before a run and not after it.

    Raises:
        BadInput: if it cannot be read, or does not fit the teacher.
    """
    data = load_data(text, teacher)
    next(iter(data.batches(2)))
    return data


def load_pool(text: str | None, teacher: Teacher, *, apart_from: str | None = None) -> PoolSource | None:
    """Open the pool that `--images` names.

    Args:
        text: FILE.safetensors (a saved synthetic set: ``images`` and maybe ``labels``), a DATA string such as
            npz:FILE[a:b] (real pixels, no labels), ``noise`` (1,152 images of pure noise, a control), or None.
        teacher: whose normalisation and image size apply.
        apart_from: the evaluation set of the same run.

    Returns:
        The source, or None for None.

    Raises:
        BadInput: if the file cannot be used, or if its images overlap the evaluation set.
    """
    if text is None:
        return None
    if text == NOISE:
        noise = torch.randn(NOISE_COUNT, *teacher.image, generator=torch.Generator().manual_seed(0))
        return PoolSource(noise.to(teacher.device), None, name="pure noise")
    if is_real(text):
        if apart_from is not None:
            check_disjoint(text, apart_from)
        images, labels, name = load_images(text, teacher), None, f"real images ({Path(text).name})"
    else:
        images, labels = read_pool(Path(text), image=teacher.image, classes=teacher.classes)
        name = f"saved images ({Path(text).name})"
    labels = None if labels is None else labels.to(teacher.device)
    return PoolSource(images.to(teacher.device), labels, name=name)


def is_real(text: str) -> bool:
    """Whether `--images` names real images instead of a saved synthetic set."""
    return text != NOISE and not text.endswith(".safetensors")


def resolve_device(name: str) -> torch.device:
    """Turn auto, cpu or cuda into a device.

    Raises:
        BadInput: for cuda on a machine without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", expected="cuda with a GPU that torch can use", got="none found",
                       fix="Use --device cpu, or install a CUDA build of torch.")  # fmt: skip
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
