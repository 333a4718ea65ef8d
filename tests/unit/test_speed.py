"""The benchmark of speed: its plain implementation computes what the shipped path does; its numbers mean something."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zsq import losses
from zsq.insert import QuantSpec, freeze_ranges, quantize, quantized_weights
from zsq.inundation import GradientInundation
from zsq.quantizer import LiveMinMax, RunningMinMax
from zsq.recipes.gdfq import source
from zsq.teachers import Teacher
from zsq.teachers.nets import ResidualNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))
import reference_gdfq_ait as plain
import speed
import speed_tables

BATCH = 12


def settled_teacher() -> Teacher:
    net = ResidualNet((4, 6), units=1, classes=5)
    with torch.no_grad():
        net.train()(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
        net.output.weight.mul_(5)
    return Teacher(net.eval().requires_grad_(False), "tiny", "classify", 5, (3, 16, 16))


@pytest.fixture
def teacher() -> Teacher:
    return settled_teacher()


class Pair:
    """The shipped generator step and student, and the plain ones: same weights, same latents, float64."""

    def __init__(self, teacher: Teacher, rate: float = 1e-2) -> None:
        self.source = source(teacher, batch=BATCH, milestones=())  # it forecasts its memory in float32
        teacher.net.double()
        self.reference = plain.Reference(teacher.net, 5, teacher.image, batch=BATCH, lr=1e-3, rate=rate)
        self.reference.generator.double()
        self.source._precision = "float32"  # no autocast
        self.source.generator.double()
        self.source.generator.load_state_dict(dict(self.reference.generator.named_parameters()))
        spec = QuantSpec(4, 4, weight=LiveMinMax, act=RunningMinMax)
        self.student, _ = quantize(teacher.net, spec)
        self.sgd = torch.optim.SGD(self.student.parameters(), 1e-3, momentum=0.9, nesterov=True)
        weights = quantized_weights(self.student)
        self.flood = GradientInundation(self.sgd, weights, flip_rate=rate, mode="search")
        rng = torch.Generator().manual_seed(5)
        self.z = torch.randn(BATCH, 100, generator=rng).double()
        self.labels = torch.randint(5, (BATCH,), generator=rng)
        self.rng = torch.Generator().manual_seed(5)


def close(found: Tensor, expected: Tensor, rel: float) -> None:
    assert float((found - expected).norm()) <= rel * float(expected.norm()) + 1e-12


def test_images_losses_and_gradients_agree(teacher: Teacher) -> None:
    pair = Pair(teacher)
    images, logits, loss = pair.reference.images(pair.z, pair.labels)
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in pair.source.generator.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: grad.clone()}))
    batch = pair.source.draw(pair.rng)
    close(batch.images, images.detach(), 1e-9)
    assert float(sum(pair.source.metrics.values())) == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, parameter in pair.reference.generator.named_parameters():
        if not name.startswith("conv") or name.endswith("weight"):  # a bias before a BatchNorm has gradient zero
            close(gradients[name], parameter.grad, 1e-8)

    pair.reference.observe(images.detach())
    pair.reference.freeze()
    with torch.no_grad():
        pair.student(images.detach())
    freeze_ranges(pair.student)
    kl = pair.reference.distil(images.detach(), logits.detach())
    kl.backward()
    ours = losses.kl(pair.student(images.detach()), logits.detach())
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(kl.detach()), rel=1e-9)
    theirs = dict(pair.reference.student.named_parameters())
    for name, parameter in pair.student.named_parameters():
        close(parameter.grad, theirs[name].grad, 1e-8)

    pair.reference.plain.step()
    pair.reference.searched.step()
    pair.sgd.step()
    assert pair.flood.factors.tolist() == pytest.approx(pair.reference.searched.factors, rel=1e-6)
    assert max(pair.reference.searched.factors) > 1


def test_the_measured_step(teacher: Teacher) -> None:
    measured = speed.run(teacher, "ait", batch=BATCH, bits=4, cycles=2, against=True)
    found: dict[str, Any] = speed.summary(measured, recipe="ait", teacher=teacher, batch=BATCH, bits=4)
    for key in ("step_over_float_step", "student_over_float_student", "gi_overhead", "host_syncs_per_step",
                "speedup_over_reference", "steps_per_second", "peak_memory_bytes"):  # fmt: skip
        assert isinstance(found[key], int | float), key
    assert found["turns"] == 2 and len(measured.times["reference"]) == 2
    assert found["host_syncs_per_step"] == 0
    assert found["floor_seconds"] < found["seconds_per_step"]
    assert 0.5 * found["seconds_per_step"] < sum(found["parts"].values()) < 1.5 * found["seconds_per_step"]


def test_turns_end_with_their_time_but_never_before_one_of_each(teacher: Teacher) -> None:
    measured = speed.run(teacher, "gdfq", batch=BATCH, bits=4, cycles=3, against=False, seconds=0)
    assert [len(measured.times[arm]) for arm in speed.ARMS] == [1, 1, 1]


def test_a_recipe_that_takes_too_long_is_a_row_and_the_file_is_written(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    given = {"teacher": "digits", "batch": 4, "bits": 4, "cycles": 1, "threads": 1, "device": "cpu"}
    found = speed.every_recipe(Namespace(**given, seconds=0, precision="float32", limit=0.01, json=file))
    assert {row["failed"] for row in found["recipes"]} == {"not finished in 0 s"}
    assert json.loads(file.read_text())["recipes"] == found["recipes"]
    assert "not finished" in "".join(speed_tables.by_recipe(found))


def test_the_float_arm_has_no_quantizers(teacher: Teacher) -> None:
    student, _ = quantize(teacher.net, QuantSpec(2, 2))
    images = torch.randn(4, 3, 16, 16)
    student(images)
    freeze_ranges(student)
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    flood = GradientInundation(sgd, quantized_weights(student))
    quantized = student(images)
    with speed.arrangement(student, sgd, "F"):
        torch.testing.assert_close(student(images), teacher.net(images))
        assert not sgd._optimizer_step_pre_hooks
    assert torch.equal(student(images), quantized)
    assert len(sgd._optimizer_step_pre_hooks) == len(sgd._optimizer_step_post_hooks) == 1
    flood.remove()


def test_recipes_without_training_are_measured_too(teacher: Teacher) -> None:
    measured = speed.run(teacher, "zeroq", batch=BATCH, bits=4, cycles=1, against=False)
    found = speed.summary(measured, recipe="zeroq", teacher=teacher, batch=BATCH, bits=4)
    assert set(found["seconds_per_step"]) == {"synthesise", "calibrate"}


def test_a_conversion_leaves_no_float_layer(teacher: Teacher) -> None:
    kinds = {type(module) for module in plain.convert(teacher.net, 4).modules()}
    assert not kinds & {nn.Conv2d, nn.Linear, nn.ReLU}
