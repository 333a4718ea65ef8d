"""What every recipe promises. A new file in src/zsq/recipes joins by being there."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_teacher
from zsq import pipeline, recipes
from zsq.checkpoint import load_tree
from zsq.errors import BadInput
from zsq.insert import QuantSpec, activation_quantizers, codes_and_latents
from zsq.options import COMMON, argument_texts
from zsq.presets import RANGES, Outcome
from zsq.run import Run
from zsq.sources.base import Source
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "recipes.json").read_text())
NAMES = recipes.names()
POOL = {"count", "iterations"}
SHORT: dict[str, Any] = {"steps": 3, "warmup": 3, "batch": 8, "count": 32, "iterations": 3, "shown": 8, "lead": 2}
MADE = {name: ["synthesise"] * 3 for name in ("hast", "intraq", "zeroq")} | {"zsq": ["record"] * 7}
POOLED = set(MADE)  # images are made first, as a stage of their own; some are held out
OURS = {"zsq"}  # no paper and no released program to follow
WITHOUT_STATISTICS = {"zaq"}  # any network will do

pytestmark = pytest.mark.parametrize("name", NAMES)


def fitting(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of these options those that the recipe has; one that trains nothing has neither steps nor a learning rate."""
    has = inspect.signature(recipes.load(name)).parameters
    # A recipe with a base takes the length of a pool only with a base that makes one.
    others = POOL if "base" in has else set()
    return {key: value for key, value in options.items() if key in has and key not in others}


def skip_unless_offered(name: str, fidelity: str) -> None:
    if fidelity not in recipes.module(name).FIDELITY:
        pytest.skip(f"{name} has no fidelity {fidelity}")


def trains(name: str) -> bool:
    return "steps" in inspect.signature(recipes.load(name)).parameters


def short_run(name: str, teacher: Teacher, path: Path | None = None, *, seed: int = 0, **options: Any) -> Outcome:
    with Run(path, seed=seed, log_every=1, progress=False) as run:
        options = fitting(name, {**SHORT, **options})
        return pipeline.run_recipe(teacher, run, recipe=name, spec=QuantSpec(), options=options)


def flat(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def ranges(student: nn.Module) -> dict[str, Tensor]:
    """The state of every activation quantizer."""
    sites = activation_quantizers(student)
    return {f"{site}.{key}": value for site, q in sites.items() for key, value in flat(q).items()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path) -> dict[str, list[float]]:
    """Every loss term of every stage, step by step."""
    found: dict[str, list[float]] = {}
    for line in lines(path):
        for term in line.keys() - {"stage", "step", "seconds"}:
            found.setdefault(f"{line['stage']}.{term}", []).append(line[term])
    return found


# ---- what it says about itself


def test_it_describes_itself(name: str) -> None:
    module, function = recipes.module(name), recipes.load(name)
    assert re.search(r"\d{4}", module.PAPER) and "arXiv" in module.PAPER
    assert "|" in module.PARTS
    assert function.__name__ == name and inspect.getdoc(module).partition("\n")[0]
    head = "| what | paper | official code | here | why | test |"
    table = inspect.getdoc(function).partition(head)[2].strip().splitlines()
    assert len(table) > 2 and all(row.count("|") == 7 for row in table)
    assert set(module.FIDELITY) == ({"best"} if name in OURS else {"best", "paper", "official"})


def test_every_option_is_explained(name: str) -> None:
    parameters = inspect.signature(recipes.load(name)).parameters
    assert set(argument_texts(recipes.load(name))) == set(parameters)
    assert list(parameters)[:2] == ["teacher", "run"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(parameters.values())[2:])
    assert {"spec", "images", "budget", "fidelity", "batch"} <= set(parameters) & COMMON
    assert trains(name) == ("lr" in parameters) == ("micro_batch" in parameters)


def test_it_is_an_attribute_of_the_package(name: str) -> None:
    assert getattr(recipes, name) is recipes.load(name)


# ---- a whole run


def test_a_run_to_its_last_line(name: str, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    with Run(tmp_path / "run", log_every=1, history=3, progress=False) as run:
        summary = pipeline.produce(teacher, run, recipe=name, options=fitting(name, SHORT))
    path = tmp_path / "run"
    assert json.loads((path / "summary.json").read_text()) == summary
    assert summary["recipe"] == name and summary["checkpoint"] == "last"
    steps = 3 if trains(name) else 0
    assert summary["steps"] == steps == summary["plan"]["steps"] and summary["plan"]["batch"] == 8
    assert (summary["quantized_weights"], summary["activation_sites"]) == (3, 2)
    assert summary["float_sites"] == len(json.loads((path / "student.json").read_text())["floats"]) > 0
    assert all(0 <= summary[key] <= 1 for key in ("agreement", "crop_agreement", "probe_agreement"))
    made = MADE.get(name, []) + ["correct"] * (name == "zaq")
    stages = [line["stage"] for line in lines(path) if line["stage"] != "calibrate"]
    assert stages == made + ["fit"] * steps
    saved = load_tree(path / "student.safetensors")
    if trains(name):
        assert [line["stage"] for line in lines(path)].count("calibrate") == 3
        assert sorted(file.stem for file in (path / "history").iterdir()) == [f"{step:06d}" for step in (0, 1, 2, 3)]
        # The student is the one of the last step, not the best of some steps.
        last = load_tree(path / "history" / "000003.safetensors")
        assert torch.equal(last["0.weight.latent" if "0.weight.latent" in last else "0.latent"], saved["0.weight"])
    held_out = 4 if name in POOLED else 1024
    assert load_tree(path / "images.safetensors")["images"].shape == (held_out, 1, 8, 8)
    student = pipeline.read_student(path, teacher)
    assert all(torch.equal(value, saved[key]) for key, value in student.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    def student(folder: str, seed: int) -> bytes:
        outcome = short_run(name, tiny_teacher(), seed=seed)
        (tmp_path / folder).mkdir()
        pipeline.write_student(tmp_path / folder, outcome.student, QuantSpec(), outcome.report.to_json())
        return (tmp_path / folder / "student.safetensors").read_bytes()

    assert student("a", 1) == student("b", 1) != student("c", 2)


def test_it_trains_weights_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    before = flat(teacher.net)
    before_fit: list[dict[str, Tensor]] = []
    real = Run.steps

    def steps(run: Run, stage: str, total: int, **stateful: Any) -> Any:
        if stage == "fit":
            before_fit.append(ranges(stateful["student"]))
        return real(run, stage, total, **stateful)

    monkeypatch.setattr(Run, "steps", steps)
    outcome = short_run(name, teacher)
    after, student = flat(teacher.net), flat(outcome.student)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in teacher.net.parameters()) and not teacher.net.training
    assert not outcome.student.training
    statistics = [key for key in before if "running_" in key or "num_batches" in key]
    assert len(statistics) == 6 and all(torch.equal(before[key], student[key]) for key in statistics)
    weights = [key for key in before if key not in statistics]
    same = {key for key in weights if torch.equal(before[key], student[key])}
    if not trains(name):
        assert same == set(weights)
        return
    assert not same
    now, then = ranges(outcome.student), before_fit[0]
    assert now.keys() == then.keys() and now
    learned = {key for key in now if name in OURS and key.endswith((".step", ".offset"))}
    assert all(torch.equal(now[key], then[key]) != (key in learned) for key in now)


def test_other_image_sizes(name: str) -> None:
    outcome = short_run(name, tiny_teacher(16))
    assert outcome.source.sample(4, torch.Generator().manual_seed(0)).images.shape == (4, 1, 16, 16)


def golden_options(name: str) -> dict[str, Any]:
    return {**GOLDEN["options"], **GOLDEN.get("options_of", {}).get(name, {})}


@pytest.mark.parametrize("fidelity", ["paper", "official"])  # the published numbers; ours may improve
def test_golden_trajectory(name: str, fidelity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_offered(name, fidelity)
    # In float64, and so without integer products. In less a processor's rounding, or that of an exact rewrite, decides
    # once in a while what a weight is rounded to, and the losses differ by per cents.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    try:
        torch.set_default_dtype(torch.float64)
        short_run(name, tiny_teacher(), tmp_path / "run", fidelity=fidelity, **golden_options(name))
    finally:
        torch.set_default_dtype(torch.float32)
    found, golden = losses(tmp_path / "run"), GOLDEN["losses"][f"{name}-{fidelity}"]
    assert found.keys() == golden.keys()
    for term, values in golden.items():
        assert found[term] == pytest.approx(values, rel=GOLDEN["tolerance"]), term


# ---- presets


@pytest.mark.parametrize("budget", ["quick", "standard", "paper"])
@pytest.mark.parametrize("fidelity", ["best", "paper", "official"])
def test_presets_resolve(name: str, budget: str, fidelity: str) -> None:
    skip_unless_offered(name, fidelity)
    options = {"budget": budget, "fidelity": fidelity, "batch": 4}
    with pipeline._Rehearsal(None, progress=False) as run:
        plan = pipeline.run_recipe(tiny_teacher(), run, recipe=name, spec=QuantSpec(), options=options).plan
    json.dumps(plan)
    assert plan["batch"] == 4 and plan["warmup"] > 0 and (plan["steps"] > 0) == trains(name)
    assert (plan["steps"] in (29_400, 79_200, 90_000)) == (budget == "paper" and trains(name))


@pytest.mark.parametrize("option", ["budget", "fidelity"])
def test_unknown_presets_are_refused(name: str, option: str) -> None:
    with pytest.raises(BadInput, match=f"--{option}: expected one of .*, got 'none'"):
        short_run(name, tiny_teacher(), **{option: "none"})


@pytest.mark.parametrize("fidelity", ["best", "paper", "official"])
def test_the_range_rule_is_that_of_the_fidelity(name: str, fidelity: str) -> None:
    skip_unless_offered(name, fidelity)
    row = recipes.module(name).FIDELITY[fidelity]
    if "ranges" not in row:
        pytest.skip(f"{name} has one range rule")
    outcome = short_run(name, tiny_teacher(), fidelity=fidelity)
    rules = list(activation_quantizers(outcome.student).values())
    kind = RANGES[row["ranges"] or outcome.plan["ranges"]]  # None: the number of bits decides
    assert all(isinstance(rule, getattr(kind, "func", kind)) for rule in rules)
    if fidelity != "best":
        own = {"official": "official", "ema": "once", "widening": None}[row["ranges"]]
        assert {getattr(rule, "correction", None) for rule in rules} == {own}
    assert short_run(name, tiny_teacher(), fidelity=fidelity, ranges="mse").plan["ranges"] == "mse"


def test_fidelity_sets_the_learning_rate_and_the_option_wins(name: str) -> None:
    if not trains(name):
        pytest.skip(f"{name} trains nothing")
    table = recipes.module(name).FIDELITY
    plans = {row: short_run(name, tiny_teacher(), fidelity=row, steps=0).plan for row in table}
    assert all(plan["lr"] == table[row]["lr"] for row, plan in plans.items())
    published = {"hast": 1e-5, "zaq": 0.1}.get(name, 1e-4)  # up to 64 pixels
    if name not in OURS:
        assert plans["paper"]["lr"] == plans["official"]["lr"] == published
    assert short_run(name, tiny_teacher(), lr=0.5, steps=0).plan["lr"] == 0.5


# ---- what it refuses


def test_a_teacher_without_batchnorm(name: str, bn_free_net: nn.Module) -> None:
    teacher = Teacher(bn_free_net, "flat", "classify", 10, (3, 8, 8))
    if name in WITHOUT_STATISTICS:
        assert short_run(name, teacher).plan["steps"] == 3
        return
    with pytest.raises(BadInput, match="BatchNorm"):
        short_run(name, teacher)


@pytest.mark.parametrize(
    "option", [{"steps": -1}, {"lr": float("nan")}, {"lr": -1.0}, {"micro_batch": 0}, {"batch": 0}]
)
def test_numbers_that_cannot_be_meant(name: str, option: dict[str, Any]) -> None:
    if not fitting(name, option):
        pytest.skip(f"{name} has no such option")
    with pytest.raises(BadInput, match=f"--{next(iter(option)).replace('_', '-')}"):
        short_run(name, tiny_teacher(), **option)


# ---- other images


def pool(labels: bool) -> Source:
    rng = torch.Generator().manual_seed(2)
    targets = torch.randint(10, (64,), generator=rng) if labels else None
    return PoolSource(torch.randn(64, 1, 8, 8, generator=rng), targets, name="pool")


def test_it_takes_the_images_it_is_given(name: str) -> None:
    outcome = short_run(name, tiny_teacher(), images=pool(labels=True))
    assert outcome.source.name == "pool" and outcome.source.batch == outcome.plan["batch"] == 8


def test_micro_batches_are_the_same_step(name: str, tmp_path: Path) -> None:
    if not trains(name):
        pytest.skip(f"{name} trains nothing")
    make = partial(short_run, name, steps=2)
    whole, parts = (make(tiny_teacher(), tmp_path / str(n), micro_batch=n).student for n in (None, 3))
    a, b = losses(tmp_path / "None"), losses(tmp_path / "3")
    assert all(a[term] == pytest.approx(b[term], rel=1e-4, abs=1e-6) for term in a)
    assert whole is not parts


def test_history_holds_codes_of_the_asked_bits(name: str) -> None:
    with Run(None, progress=False) as run:
        outcome = pipeline.run_recipe(tiny_teacher(), run, recipe=name, spec=QuantSpec(weight_bits=3),
                                      options=fitting(name, SHORT))  # fmt: skip
    codes = [value for key, value in codes_and_latents(outcome.student).items() if key.endswith(".codes")]
    assert len(codes) == 3 and all(value.min() >= -4 and value.max() <= 3 for value in codes)
