"""What is HAST's own: the cheaper step has the released program's gradients, units, presets, ablations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import settled, tiny_teacher
from zsq import losses, pipeline
from zsq.errors import BadInput
from zsq.fit import calibrate
from zsq.insert import QuantSpec, activation_quantizers, quantize
from zsq.presets import Outcome
from zsq.promotion import promoted
from zsq.recipes import hast
from zsq.recipes.hast import FIDELITY
from zsq.run import Run
from zsq.sources.base import Batch
from zsq.sources.pool import PoolSource
from zsq.teachers import Teacher
from zsq.teachers.nets import digits_net
from zsq.units import Unit, classifier_input, find_units
from zsq.view import look

SHORT: dict[str, Any] = {"count": 16, "iterations": 3, "steps": 2, "warmup": 3, "batch": 8}


def short_run(teacher: Teacher | None = None, **options: Any) -> Outcome:
    with Run(None, progress=False) as run:
        return hast(teacher or tiny_teacher(), run, **{**SHORT, **options})


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def pair(net: nn.Module | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A teacher and its calibrated student."""
    teacher = tiny_teacher().net if net is None else settled(net)
    student, _ = quantize(teacher, QuantSpec(**options))
    with Run(None, progress=False) as run:
        calibrate(student, PoolSource(images(16), None, name="x", batch=8, held_out=2), steps=3, run=run)
    return teacher, student


def gradients(student: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


# ---- the step

NUMBERS: dict[str, Any] = {"kl_weight": 20.0, "temperature": 20.0, "alignment": 1000.0, "epsilon": 0.01}


def taught(net: nn.Module) -> Teacher:
    return Teacher(net, "tiny", "classify", 10, (1, 8, 8))


def plain_step(teacher: nn.Module, student: nn.Module, x: Tensor) -> None:
    """As released: gradient of the images, then both losses in one graph, then backward."""
    units = find_units(teacher)
    names = [unit.output for unit in units], [unit.within(student) for unit in units]

    def loss(t: Any, s: Any) -> Tensor:
        kl = losses.kl(s.logits, t.logits, reduction="batchmean", through_teacher=True)
        gaps = [
            (torch.nn.functional.normalize(s.features[b].square().mean((2, 3)), dim=1)
             - torch.nn.functional.normalize(t.features[a].square().mean((2, 3)), dim=1)).square().mean()
            for a, b in zip(*names, strict=True)
        ]  # fmt: skip
        return 20 * kl + 1000 * torch.stack(gaps).sum()

    x = x.clone().requires_grad_()
    clean = loss(look(teacher, x, features=names[0]), look(student, x, features=names[1]))
    (g,) = torch.autograd.grad(clean, x, retain_graph=True)
    moved = (x + 0.01 * g.sign()).detach()
    with torch.no_grad():
        t = look(teacher, moved, features=names[0])
    (clean + loss(t, look(student, moved, features=names[1]))).backward()


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_cheaper_step_has_the_same_gradients(placement: str, residual: bool) -> None:
    torch.manual_seed(0)
    teacher, student = pair(digits_net() if residual else None, placement=placement)
    plain_step(teacher, student, images())
    expected = gradients(student)
    student.zero_grad()
    step = promoted(student, taught(teacher), QuantSpec(), promotion="loss", **NUMBERS)
    terms = step(Batch(images()), 1.0)
    found = gradients(student)
    assert set(terms) == {"kl", "attention", "hard_kl", "hard_attention"}
    assert found.keys() == expected.keys() and len(found) > 3
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name
    assert all(p.grad is None for p in teacher.parameters())


def test_the_moved_images_are_those_of_epsilon() -> None:
    teacher, student = pair()
    numbers = {**NUMBERS, "alignment": 0.0, "epsilon": 0.0}
    terms = promoted(student, taught(teacher), QuantSpec(), promotion="loss", **numbers)(Batch(images()), 1.0)
    assert terms.keys() == {"kl", "hard_kl"} and torch.allclose(terms["hard_kl"], terms["kl"])


def test_difficulty_moves_away_from_the_label_and_trains_on_the_moved_alone() -> None:
    teacher, student = pair()
    labels = teacher(images()).argmax(1)
    step = promoted(student, taught(teacher), QuantSpec(), promotion="difficulty", **NUMBERS)
    assert set(step(Batch(images(), labels), 1.0)) == {"hard_kl", "hard_attention"}
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(losses.difficulty(student(x), labels), x)
    assert losses.difficulty(student(x + 0.01 * g.sign()), labels) > losses.difficulty(student(x), labels)
    with pytest.raises(BadInput, match="label"):
        step(Batch(images()), 1.0)


@pytest.mark.parametrize("promotion", ["loss", "difficulty"])
def test_promotion_makes_the_images_harder(promotion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair()
    labels = teacher(images(32)).argmax(1)
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    numbers = {**NUMBERS, "epsilon": 0.05}
    terms = promoted(student, taught(teacher), QuantSpec(), promotion=promotion, **numbers)(
        Batch(images(32), labels), 1.0
    )
    assert len(seen) == 2 and torch.equal(seen[0], images(32))
    moved = (seen[1] - seen[0]).abs()
    assert moved.max().item() == pytest.approx(0.05, rel=1e-3) and moved.mean() > 0.02  # the rest has no gradient
    if promotion == "loss":
        assert terms["hard_kl"] + terms["hard_attention"] > terms["kl"] + terms["attention"]
    else:
        hard, easy = (losses.difficulty(student(x), labels) for x in (seen[1], seen[0]))
        assert hard > easy


def test_parts_add_up() -> None:
    teacher, student = pair()
    step = promoted(student, taught(teacher), QuantSpec(), promotion="loss", **NUMBERS)
    step(Batch(images()), 1.0)
    whole = gradients(student)
    student.zero_grad()
    for part in images().split(2):
        step(Batch(part), 1 / 3)
    for name, value in gradients(student).items():
        assert torch.allclose(value, whole[name], rtol=1e-3, atol=1e-4 * float(whole[name].abs().max())), name


# ---- units


def conv(c_in: int, c_out: int, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    return [nn.Conv2d(c_in, c_out, kernel, padding=padding, groups=groups, bias=False), nn.BatchNorm2d(c_out)]


class Inverted(nn.Module):
    """MobileNetV2's bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(8, 16, 1), nn.ReLU6(), *conv(16, 16, 3, 16), nn.ReLU6(), *conv(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def test_units_of_a_residual_network_are_the_branches() -> None:
    units = find_units(digits_net())
    stages = [f"features.stage{i}.unit1.body.conv2" for i in (1, 2, 3)]
    assert units == [Unit(f"{stage}.bn", f"{stage}.conv") for stage in stages]
    assert classifier_input(digits_net()) == "output:input"


def test_units_of_separable_networks_are_the_pointwise_ones() -> None:
    first = nn.Sequential(*conv(3, 8), nn.ReLU(), *conv(8, 8, 3, 8), nn.ReLU(), *conv(8, 8, 1), nn.ReLU())
    assert [unit.output for unit in find_units(first)] == ["7"]
    second = nn.Sequential(*conv(3, 8), Inverted(), Inverted())
    assert [unit.output for unit in find_units(second)] == ["2.body.7", "3.body.7"]


def test_units_of_a_plain_network_are_all_its_convolutions() -> None:
    assert [unit.output for unit in find_units(tiny_teacher().net)] == ["1", "4"]
    with pytest.raises(BadInput, match="--alignment 0"):
        find_units(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_inputs_of_modules_can_be_looked_at() -> None:
    net, x = tiny_teacher().net, images()
    seen = look(net, x, features=["3:input", "2"]).features
    assert torch.equal(seen["3:input"], seen["2"])
    with pytest.raises(BadInput, match="feature"):
        look(net, x, features=["none:input"])


# ---- presets


def test_fidelities() -> None:
    best, paper, official = (short_run(fidelity=name, steps=0).plan for name in FIDELITY)
    assert [plan["promotion"] for plan in (best, paper, official)] == ["loss", "difficulty", "loss"]
    assert [plan["image_lr"] for plan in (best, paper, official)] == [0.2, 0.5, 0.5]
    assert [plan["alignment"] for plan in (best, paper, official)] == [1000.0] * 3
    assert paper["decay_at"] == official["decay_at"] == [16 / 147, 36 / 147, 56 / 147] != best["decay_at"]
    many = Teacher(nn.Sequential(*list(tiny_teacher().net)[:-1], nn.Linear(8, 100)), "many", "classify", 100, (1, 8, 8))
    many.net.eval().requires_grad_(False)
    assert short_run(many, fidelity="paper", steps=0).plan["epsilon"] == 0.02
    assert short_run(many, fidelity="official", steps=0).plan["alignment"] == 1000.0
    large = short_run(tiny_teacher(68), fidelity="paper", steps=0, batch=2).plan
    assert (large["alignment"], large["decay_at"]) == (4000.0, [96 / 147]) and large["lr"] == pytest.approx(1e-6)


def test_batch_of_the_published_schedule() -> None:
    def batch(fidelity: str) -> int:
        options = {"budget": "paper", "fidelity": fidelity}
        with pipeline._Rehearsal(None, progress=False) as run:
            return pipeline.run_recipe(tiny_teacher(), run, recipe="hast", spec=QuantSpec(), options=options).plan[
                "batch"
            ]

    assert (batch("paper"), batch("official")) == (256, 64)


def test_ranges_come_from_the_pool_or_from_a_generator() -> None:
    stages: dict[str, list[str]] = {}
    for fidelity in ("best", "official"):
        with Run(None, progress=False) as run:
            hast(tiny_teacher(), run, fidelity=fidelity, **SHORT)
            stages[fidelity] = [stage.name for stage in run._begun]
    assert stages == {"best": ["synthesise", "calibrate", "fit"], "official": ["calibrate", "synthesise", "fit"]}


def test_every_part_can_be_left_out() -> None:
    for options in ({"promotion": "off"}, {"alignment": 0.0}, {"gamma": 0.0}, {"promotion": "off", "alignment": 0.0}):
        outcome = short_run(**options)
        assert all(torch.isfinite(p).all() for p in outcome.student.parameters())
        assert activation_quantizers(outcome.student)
    with pytest.raises(BadInput, match="--promotion"):
        short_run(promotion="none")


def test_ait_takes_these_images() -> None:
    for base in ("hast", "intraq", "zeroq"):
        with pipeline._Rehearsal(None, progress=False) as run:
            options = {"base": base, "steps": 2, "warmup": 2, "batch": 8}
            outcome = pipeline.run_recipe(tiny_teacher(), run, recipe="ait", spec=QuantSpec(), options=options)
        assert outcome.source.name == base
