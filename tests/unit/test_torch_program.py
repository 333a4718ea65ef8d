"""A student as a .pt2 file: the same decisions, standard operators only, integer weights, loadable elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
from zsq.errors import BadInput, RunFailed
from zsq.export import torch_check, torch_modules, torch_program
from zsq.grid import affine_grid, fake_quantize, symmetric_grid
from zsq.insert import QuantSpec, activation_quantizers, freeze_ranges, quantize, quantized_weights
from zsq.quantizer import LearnedStep, LiveMinMax
from zsq.teachers import Teacher, make_teacher
from zsq.teachers.facts import Facts

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def prepared(net: nn.Module, spec: QuantSpec) -> tuple[nn.Module, Teacher]:
    """A calibrated student and its teacher."""
    teacher = make_teacher(net, Facts(image=(3, 8, 8), mean=(0.5,), std=(0.25,)), name="net")
    student, _ = quantize(teacher.net, spec)
    with torch.no_grad():
        student(IMAGES)
    freeze_ranges(student)
    return student, teacher


def read(path: Path) -> torch.export.ExportedProgram:
    torch_program.register_operators()
    return torch.export.load(path)


@pytest.mark.parametrize("placement", ["deploy", "paper"])
def test_program_agrees_with_student(functional_net: nn.Module, placement: str, tmp_path: Path) -> None:
    student, teacher = prepared(functional_net, QuantSpec(placement=placement))
    result = torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    assert result["agreement"] == 1 and result["site_max_lsb"] <= 1
    assert result["integer_weights"] == len(quantized_weights(student)) == 3 and result["float_weights"] == 0
    assert (result["max_lsb"] is None) == (placement == "paper")
    assert result["lowerable_conv_share"] == (1 if placement == "deploy" else 0)
    assert result["integer_conv_share"] == 0  # torch computes in float32, and the result says so
    net = torch_program.load(tmp_path / "net.pt2").eval()
    for count in (1, 2, 7):
        with torch.no_grad():
            difference = (net(IMAGES[:count]) - student(IMAGES[:count])).abs().max()
        assert difference <= result["max_difference"] + 1e-6


@pytest.mark.parametrize("name", ["InvertedResidual", "OwnForward", "Split"])
def test_depthwise_gates_transposed_and_derived_weights(name: str, tmp_path: Path) -> None:
    student, teacher = prepared(getattr(zoo, name)(), QuantSpec(placement="deploy", weight_bits=3, act_bits=5))
    result = torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    assert result["float_weights"] == 0 and result["site_max_lsb"] <= 1


def test_file_holds_codes_and_true_limits_and_no_latent_weights(bn_net: nn.Module, tmp_path: Path) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy", weight_bits=3, act_bits=4))
    torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    program = read(tmp_path / "net.pt2")
    stored = {name: value for name, value in program.state_dict.items() if name.endswith("codes")}
    assert len(stored) == 3 and all(value.dtype == torch.int8 for value in stored.values())
    wide = [value for value in program.state_dict.values() if value.dim() > 1 and value.is_floating_point()]
    assert not wide  # no float weight; BatchNorm is folded
    assert not [name for name in program.state_dict if "running" in name]
    middle = stored["3.weight_path.codes"]
    assert middle.min() >= -3 and middle.max() <= 3
    targets = {str(node.target) for node in program.graph.nodes if "quantize" in str(node.target)}
    assert targets == {
        "quantized_decomposed.quantize_per_tensor.default", "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
    }  # fmt: skip
    limits = {
        tuple(node.args[3:6])
        for node in program.graph.nodes
        if str(node.target) == "quantized_decomposed.quantize_per_tensor.default"
    }
    assert limits == {(0, 15, torch.uint8), (0, 255, torch.uint8)}


def test_file_shrinks_and_names_no_path_of_this_machine(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 128, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten())  # fmt: skip
    student, teacher = prepared(net, QuantSpec(placement="deploy"))
    result = torch_program.write(student, teacher, IMAGES[:2], tmp_path / "net.pt2")
    data = (tmp_path / "net.pt2").read_bytes()
    assert result["bytes"] == len(data) and result["size_ratio"] > 3
    assert str(Path(__file__).parent).encode() not in data and str(Path(torch.__file__).parent).encode() not in data
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        (facts,) = [name for name in archive.namelist() if name.endswith(torch_program.FACTS)]
        assert json.loads(archive.read(facts))["mean"] == [0.5, 0.5, 0.5]


FRESH = """
import sys
import torch
import torch.ao.quantization.fx._decomposed
net = torch.export.load(sys.argv[1]).module()
images, logits = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(net(images), logits), (net(images) - logits).abs().max()
assert not [name for name in sys.modules if name == "zsq" or name.startswith("zsq.")]
"""


@pytest.mark.slow
def test_round_trip_in_a_fresh_process_without_zsq(bn_net: nn.Module, tmp_path: Path) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy"))
    torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    with torch.no_grad():
        torch.save((IMAGES, torch_program.load(tmp_path / "net.pt2")(IMAGES)), tmp_path / "pair.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "net.pt2"), str(tmp_path / "pair.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_student_is_left_as_it_was(bn_net: nn.Module, tmp_path: Path) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy", act=LearnedStep))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", range(2, 9))
def test_modules_give_the_students_values(bits: int) -> None:
    torch_program.register_operators()
    x, weight = torch.randn(400) * 3, torch.randn(4, 3, 3, 3)
    for grid in (affine_grid(torch.tensor(-1.0), torch.tensor(2.0), bits), symmetric_grid(torch.tensor(2.0), bits)):
        torch.testing.assert_close(torch_modules.Rounding(grid, bits)(x), fake_quantize(x, grid), rtol=1e-6, atol=1e-6)
    quantizer = LiveMinMax(bits, axis=0)
    stored = torch_modules.StoredWeight(weight, quantizer.grid(weight), 0, {0: None})
    assert torch.equal(stored.codes, quantizer.codes(weight))
    torch.testing.assert_close(stored(x, weight, None, 0)[0], quantizer(weight), rtol=1e-6, atol=1e-6)


class Reading(nn.Module):
    """Its path depends on a number read from its input, inside a module kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 4, 3), Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.conv(x))).mean((2, 3))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


def test_unexportable_operation_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    student, teacher = prepared(Reading(), QuantSpec(placement="deploy", leaf=("inner",)))
    with pytest.raises(BadInput, match=r"torch\.export can follow.*got \w+") as caught:
        torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_ranges_that_depend_on_each_input_are_refused(bn_net: nn.Module, tmp_path: Path) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy", act=LiveMinMax))
    with pytest.raises(BadInput, match="activation input: expected one fixed range"):
        torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_unwritable_paths_are_refused_before_the_work(bn_net: nn.Module, tmp_path: Path) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy"))
    for path in (tmp_path, tmp_path / "absent" / "net.pt2"):
        with pytest.raises(BadInput, match="--output"):
            torch_program.write(student, teacher, IMAGES, path)


def shifted(grid: object, bits: int) -> torch_modules.Rounding:
    module = ROUNDING(grid, bits)  # type: ignore[arg-type]
    module.zero_point += 2
    return module


ROUNDING = torch_modules.Rounding


def test_a_wrong_site_fails_the_export_and_keeps_the_old_file(
    bn_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy"))
    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch_modules, "Rounding", shifted)
    with pytest.raises(RunFailed, match=r"got 2 steps at '\w.*No file was written"):
        torch_program.write(student, teacher, IMAGES, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_program_fails_the_export(bn_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = prepared(bn_net, QuantSpec(placement="deploy"))
    prune = torch_program._prune

    def damage(program: torch.export.ExportedProgram) -> None:
        prune(program)
        program.state_dict["0.weight_path.codes"] = program.state_dict["0.weight_path.codes"] + 1

    monkeypatch.setattr(torch_program, "_prune", damage)
    with pytest.raises(RunFailed, match="what was exported"):
        torch_program.write(student, teacher, IMAGES, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_sites_are_compared_alone(bn_net: nn.Module) -> None:
    """One wrong site does not blame those behind it."""
    student, _ = prepared(bn_net, QuantSpec(placement="deploy", act_bits=8))
    other, _ = quantize(bn_net, QuantSpec(placement="deploy", act_bits=8))
    other.load_state_dict(student.state_dict())
    assert torch_check.compare_sites(student, other, IMAGES).max_lsb == 0
    name = list(activation_quantizers(other))[1]
    key = other.zsq_sites.names[name]  # type: ignore[union-attr, index]
    setattr(other.zsq_sites, key, nn.Sequential(activation_quantizers(other)[name], nn.Threshold(0.5, 0)))
    found = torch_check.compare_sites(student, other, IMAGES)
    assert found.worst == name and found.max_lsb > 1 and found.relative == 0
    with pytest.raises(RunFailed, match=name):
        found.require()


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        torch_program.load(tmp_path / "absent.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(BadInput, match=r"expected a torch\.export program"):
        torch_program.load(tmp_path / "text.pt2")
