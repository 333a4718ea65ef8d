"""Exported ONNX files compute what the student computes, on integers, in both runtimes; others leave no file."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
import zoo_export
from tiny import Command, Folder
from zsq.errors import BadInput, RunFailed
from zsq.export import export, onnx_program, runtimes, torch_program, verify
from zsq.export.float_model import float_onnx
from zsq.export.frozen import freeze
from zsq.export.onnx_file import build
from zsq.grid import encode
from zsq.insert import QuantSpec, quantize, quantized_weights
from zsq.teachers import Teacher

BITS = [(8, 8), (4, 8), (4, 4), (3, 3)]
FAST = {("mobilenet", 4, 8), ("segmenter", 8, 8), ("moves", 4, 4)}
ZOO = [name for name, case in zoo.CASES.items() if len(case.inputs) == 1 and name != "fused"]  # fused: an LSTM
CASES = [
    pytest.param(name, w, a, marks=[] if (name, w, a) in FAST else pytest.mark.slow)
    for name in zoo_export.NETS
    for w, a in BITS
]


def prepared(name: str, spec: QuantSpec) -> tuple[nn.Module, Teacher, Tensor]:
    teacher, images = zoo_export.teacher_of(name)
    return zoo_export.student_of(teacher, images, spec), teacher, images


def from_net(net: nn.Module, image: tuple[int, int, int] = (3, 8, 8), **spec: Any) -> tuple[nn.Module, Teacher, Tensor]:
    images = torch.randn(32, *image, generator=torch.Generator().manual_seed(5))
    classes = net.eval()(images[:2]).shape[1]
    teacher = Teacher(net.requires_grad_(False), "net", "classify", classes, image)
    return zoo_export.student_of(teacher, images, QuantSpec(**{"placement": "deploy", **spec})), teacher, images


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("name", "w", "a"), CASES)
def test_every_shape_runs_on_integers_in_both_runtimes(name: str, w: int, a: int, tmp_path: Path) -> None:
    student, teacher, images = prepared(name, QuantSpec(w, a, "deploy"))
    for target in ("ort", "openvino"):
        result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", target=target)
        assert result["max_lsb"] <= 1 and result["lsb_share"] < 1e-3
        assert result["agreement"] >= 0.995
        assert result["integer_conv_share"] == 1 and result["float_convolutions"] == []
    assert left_in(tmp_path) == ["m.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["deploy", "paper"])
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_exports(name: str, placement: str, tmp_path: Path) -> None:
    net, (images,) = zoo.build(name)
    student, teacher, _ = from_net(net, tuple(images.shape[1:]), placement=placement)
    for target in ("ort", "openvino"):
        result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", target=target, least_agreement=0)
        assert result["max_lsb"] <= 1
        assert placement == "paper" or result["integer_conv_share"] == 1


def test_the_file_takes_any_batch_size(tmp_path: Path) -> None:
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    onnx_program.write(student, teacher, images, tmp_path / "m.onnx")
    session = runtimes.ort_session((tmp_path / "m.onnx").read_bytes(), optimise=True)
    for count in (1, 2, 7):
        got = runtimes.ort_run(session, images[:count])[0]
        assert np.allclose(got, student(images[:count]), atol=1e-5)


@pytest.mark.parametrize("target", ["ort", "torch"])
def test_a_run_with_images_of_another_size_gives_a_file_for_the_networks_own(target: str, tmp_path: Path) -> None:
    """Otherwise it could not be run on what the network is for."""
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    smaller = F.avg_pool2d(images, 2)
    if target == "torch":
        torch_program.write(student, teacher, smaller, tmp_path / "m.pt2")
        got = torch_program.load(tmp_path / "m.pt2")(images[:2]).detach()
    else:
        onnx_program.write(student, teacher, smaller, tmp_path / "m.onnx")
        session = runtimes.ort_session((tmp_path / "m.onnx").read_bytes(), optimise=True)
        got = torch.as_tensor(runtimes.ort_run(session, images[:2])[0])
    assert torch.allclose(got, student(images[:2]), atol=1e-5)


def power_of_two(student: nn.Module) -> None:
    """Move every activation range to power-of-two steps with an even zero point."""
    from zsq.insert.access import activation_quantizers

    for quantizer in activation_quantizers(student).values():
        levels = 2**quantizer.bits - 1
        step = 2.0 ** torch.ceil(torch.log2((quantizer.hi - quantizer.lo) / (levels - 1)))
        zero = 2 * torch.round(-quantizer.lo / step / 2)
        quantizer.lo.copy_(-zero * step)
        quantizer.hi.copy_((levels - zero) * step)
        quantizer._refresh()


@pytest.mark.slow
def test_power_of_two_steps_are_exact_everywhere(tmp_path: Path) -> None:
    """Activations on power-of-two grids: torch, the plain and the optimised file give the same logits."""
    student, teacher, images = prepared("resnet20", QuantSpec(4, 4, "deploy"))
    power_of_two(student)
    for target in ("ort", "openvino"):
        result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", target=target)
        assert result["max_lsb"] <= 1 and result["agreement"] == 1


def test_openvino_keeps_the_rounding_of_a_residual_branch(tmp_path: Path) -> None:
    """Without the primitives OpenVINO drops it: this test fails if that is repaired, and the detour can go."""
    student, teacher, images = prepared("resnet20", QuantSpec(3, 3, "deploy"))
    frozen = freeze(student, images)
    found = []
    for keep in (False, True):
        model = build(frozen.program, frozen, teacher, keep_rounding=keep)
        runner = runtimes.OpenVinoRunner(model.proto.SerializeToString())
        found.append(verify.decisions(runner, student, images, teacher.outputs)[1])
    assert found[0] > 100 * max(found[1], 1e-5)


def with_dead_channels() -> tuple[nn.Module, Teacher, Tensor]:
    """A BatchNorm factor of 0 gives weights so fine-grained that the bias would not fit into int32."""
    teacher, images = zoo_export.teacher_of("mobilenet")
    with torch.no_grad():
        for norm in [m for m in teacher.net.modules() if isinstance(m, nn.BatchNorm2d)][:4]:
            norm.weight[:2] = torch.tensor([0.0, 1e-9])
            norm.bias[:2] = torch.tensor([0.7, -0.3])
    return zoo_export.student_of(teacher, images, QuantSpec(4, 8, "deploy")), teacher, images


def test_a_dead_channel_keeps_its_bias() -> None:
    student, _, images = with_dead_channels()
    layer: Any = student.get_submodule("stem.0")
    weight, bias = layer.weight_path(images, layer.weight, layer.bias, 0)
    assert torch.allclose(bias[:2], torch.tensor([0.7, -0.3]), atol=1e-3)
    # The codes that training and history look at are those the layer computes with.
    latent = next(w for w in quantized_weights(student) if w.name == "stem.0")
    codes = encode(latent.parameter, latent.grid())
    assert not codes[:2].any() and torch.equal(codes != 0, weight != 0)


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_dead_channel_exports(target: str, tmp_path: Path) -> None:
    student, teacher, images = with_dead_channels()
    result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", target=target, least_agreement=0)
    assert result["max_lsb"] <= 1 and result["integer_conv_share"] == 1


class FarFromZero(nn.Module):
    """A rectified range that begins above 0, weights without a zero, and a zero padding beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 5)
        with torch.no_grad():
            self.a.bias.add_(8.0)
            self.b.weight[0] = 1.0 + 1e-4 * torch.rand_like(self.b.weight[0])

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu(self.a(x)), (1, 1, 1, 1))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


def test_ranges_without_zero_in_paper_placement(tmp_path: Path) -> None:
    student, teacher, images = from_net(FarFromZero(), placement="paper")
    result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", least_agreement=0)
    assert result["max_lsb"] <= 1 and set(result["float_convolutions"]) == {"a", "b"}


# ---- what the verification catches


def test_a_file_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    file = tmp_path / "m.onnx"
    file.write_bytes(b"the file before")

    def wrong_step(*given: Any, **named: Any) -> Any:
        frozen = freeze(*given, **named)
        site = frozen.sites[4]
        return frozen._replace(sites=(*frozen.sites[:4], site._replace(scale=site.scale * 1.3), *frozen.sites[5:]))

    monkeypatch.setattr(onnx_program, "freeze", wrong_step)
    with pytest.raises(RunFailed, match=r"steps at site '.*'.*No file was written"):
        onnx_program.write(student, teacher, images, file)
    assert left_in(tmp_path) == ["m.onnx"] and file.read_bytes() == b"the file before"


def test_a_runtime_that_decides_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    monkeypatch.setattr(runtimes.OrtRunner, "__call__", lambda self, x: -student(x))
    with pytest.raises(RunFailed, match=r"onnxruntime .* at least 99.5% of the images, got 0\.00%"):
        onnx_program.write(student, teacher, images, tmp_path / "m.onnx")
    assert left_in(tmp_path) == []


def test_one_flipped_value_is_counted_once() -> None:
    """The comparison goes on from the file's codes: a difference does not spread to later sites."""
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    frozen = freeze(student, images)
    model = build(frozen.program, frozen, teacher)
    shift = next(node for node in model.proto.graph.node if node.op_type == "Conv")
    bias = next(node for node in model.proto.graph.node if node.output[0] == shift.input[2])
    codes = next(tensor for tensor in model.proto.graph.initializer if tensor.name == bias.input[0])
    values = onnx.numpy_helper.to_array(codes).copy()
    values[0] += 10**6
    codes.CopyFrom(onnx.numpy_helper.from_array(values, codes.name))
    found = verify.layerwise(model, student, frozen.sites, images[:4])
    first = frozen.sites[1].name
    assert found.worst[0] == first and found.lsb[first] > 1
    assert all(lsb <= 1 for name, lsb in found.lsb.items() if name != first)


def test_noise_reaches_both_ends_of_the_range() -> None:
    student, _, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    sites = freeze(student, images).sites
    noise = verify.range_noise(sites, images)
    grid = sites[0].grid
    low, high = ((q + grid.zero) / grid.inv_step for q in (grid.qmin, grid.qmax))
    assert (noise <= low).any() and (noise >= high).any() and noise.min() < low and noise.max() > high


class Detector(nn.Module):
    """Box terms far above the class logits: an argmax over all channels would never look at a class."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 1 + 4 + 6, 1)
        with torch.no_grad():
            self.head.bias[1:5] += 50.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def detector() -> tuple[nn.Module, Teacher, Tensor]:
    from zsq.tasks import Part
    from zsq.tasks.detect import Detect

    parts = (Part("objectness", 1, "sigmoid"), Part("box", 4), Part("class", 6, "softmax"))
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    net = Detector().eval().requires_grad_(False)
    teacher = Teacher(net, "detector", "detect", 6, (3, 16, 16), outputs=Detect(6, parts))
    return zoo_export.student_of(teacher, images, QuantSpec(8, 8, "deploy")), teacher, images


def test_a_detector_is_compared_on_its_classes_and_says_what_its_channels_are(tmp_path: Path) -> None:
    student, teacher, images = detector()
    result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", least_agreement=0)
    assert result["max_lsb"] <= 1 and result["integer_conv_share"] == 1
    facts = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert facts["task"] == "detect" and json.loads(facts["parts"])[1:] == [["box", 4, "none"], ["class", 6, "softmax"]]

    def other_classes(x: Tensor) -> Tensor:
        with torch.no_grad():
            raw = student(x)
        return torch.cat([raw[:, :5], -raw[:, 5:]], 1)

    assert verify.decisions(student, student, images, teacher.outputs)[0] == 1
    assert verify.decisions(other_classes, student, images, teacher.outputs)[0] < 0.1


def test_large_images_are_run_few_at_a_time() -> None:
    sizes = [runtimes.batch_of(torch.empty(40, 3, side, side, device="meta")) for side in (32, 224, 448, 4000)]
    assert sizes == [32, 32, 8, 1]


# ---- bad input


class Odd(nn.Module):
    """An operation that no integer runtime knows, inside a named module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Odd()), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.conv(x)).mean((2, 3)))


def test_an_operator_without_translation_is_named_with_its_place(tmp_path: Path) -> None:
    student, teacher, images = from_net(Unknown())
    with pytest.raises(BadInput, match=r"operator special_bessel_j0.default at 'body.1.*no translation"):
        onnx_program.write(student, teacher, images, tmp_path / "m.onnx")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("wrong", ["folder", "missing folder", "file as folder"])
def test_a_path_that_cannot_be_written(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = {"folder": tmp_path, "missing folder": tmp_path / "a" / "m.onnx", "file as folder": tmp_path / "file" / "m"}
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    with pytest.raises(BadInput, match="Choose another --output"):
        onnx_program.write(student, teacher, images, path[wrong])
    assert left_in(tmp_path) == ["file"]


def test_a_runtime_too_old_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses a file of an opset after its own: one message with the pip command."""
    student, teacher, images = prepared("mobilenet", QuantSpec(4, 4, "deploy"))
    frozen = freeze(student, images)
    proto = build(frozen.program, frozen, teacher).proto
    proto.opset_import[0].version = 99
    with pytest.raises(BadInput, match=r"onnxruntime .*opset 21.*got .*pip install -U \"zsq\[export\]\""):
        runtimes.ort_session(proto.SerializeToString(), optimise=True)
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 20)
    with pytest.raises(BadInput, match=r"onnx: expected a version that knows opset 21, got .*pip install -U"):
        onnx_program.write(student, teacher, images, tmp_path / "m.onnx")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(("target", "package"), [("ort", "onnxruntime"), ("openvino", "openvino"), ("ort", "onnx")])
def test_a_missing_extra_names_the_pip_command(
    target: str, package: str, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zsq.export import onnx_file

    def missing(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(name)
        return builtins.__import__(name)

    monkeypatch.setattr(onnx_file.importlib, "import_module", missing)
    before = left_in(run_copy)
    with pytest.raises(BadInput, match=rf"the package {package}.*pip install \"zsq\[export"):
        export(run_copy, target=target)
    assert left_in(run_copy) == before


def test_ranges_that_depend_on_the_input_cannot_be_exported(tmp_path: Path) -> None:
    from zsq.quantizer import LiveMinMax

    teacher, images = zoo_export.teacher_of("mobilenet")
    student, _ = quantize(teacher.net, QuantSpec(placement="deploy", act=LiveMinMax))
    with pytest.raises(BadInput, match="site input: expected one fixed range"):
        onnx_program.write(student, teacher, images, tmp_path / "m.onnx")


# ---- a run directory, and the command


def test_export_of_a_run(run_copy: Path, zsq: Command) -> None:
    said = zsq("export", run_copy, "--target", "ort", "--json")
    assert said.code == 0
    result = json.loads(said.out)
    assert result == json.loads((run_copy / "export-ort.json").read_text())
    assert {"agreement", "max_lsb", "integer_conv_share", "size_ratio"} <= set(result)
    assert (run_copy / "model-ort.onnx").stat().st_size == result["bytes"]
    # A run in paper placement: its BatchNorms are float, and the warning names what runs in float for it.
    assert result["integer_conv_share"] < 1 and "--placement deploy" in result["warning"]
    assert "convolutions in float: body.0" in said.err or "convolutions in float: 0" in said.err


def test_export_of_an_unfinished_run(zsq: Command, tmp_path: Path, folder: Folder) -> None:
    (tmp_path / "run").mkdir()
    said = zsq("export", tmp_path / "run", "--target", "ort")
    assert said.code == 2 and "expected a finished run directory" in said.err and "Traceback" not in said.err
    assert left_in(tmp_path / "run") == []


def test_unknown_targets_are_refused(run_copy: Path) -> None:
    with pytest.raises(BadInput, match="ort, openvino, torch"):
        export(run_copy, target="tensorrt")
    with pytest.raises(BadInput, match="--benchmark"):
        export(run_copy, target="torch", benchmark=True)


def test_output_goes_where_it_is_asked_for(run_copy: Path, tmp_path: Path) -> None:
    result = export(run_copy, target="ort", output=tmp_path / "mine.onnx")
    assert result["file"] == "mine.onnx" and (tmp_path / "mine.onnx").exists()
    assert not (run_copy / "model-ort.onnx").exists()


@pytest.mark.parametrize("name", ["resnet18", "segmenter", "moves"])
def test_the_float_network_as_onnx(name: str, tmp_path: Path) -> None:
    teacher, images = zoo_export.teacher_of(name)
    size = float_onnx(teacher, tmp_path / "float.onnx")
    assert size == (tmp_path / "float.onnx").stat().st_size
    session = runtimes.ort_session((tmp_path / "float.onnx").read_bytes(), optimise=True)
    with torch.no_grad():
        want = teacher.net(images[:3])
    assert np.allclose(runtimes.ort_run(session, images[:3])[0], want, atol=1e-4)
