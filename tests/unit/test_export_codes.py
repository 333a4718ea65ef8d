"""What the exported file holds: packed integer codes equal to the student's, biases on the accumulator's grid."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import zoo_export
from zsq.export import onnx_program
from zsq.export.builder import INT2, INT4, INT8, pack
from zsq.export.frozen import freeze
from zsq.export.onnx_file import build
from zsq.grid import encode
from zsq.insert import QuantSpec, quantized_weights
from zsq.quantizer import LiveMinMax
from zsq.teachers import Teacher


def small() -> tuple[Teacher, Tensor]:
    """A dense, a depthwise and a linear layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    images = torch.randn(32, 3, 8, 8)
    net.train()(images)
    return Teacher(net.eval().requires_grad_(False), "small", "classify", 5, (3, 8, 8)), images


def model_of(spec: QuantSpec, *, int2: bool = False) -> tuple[Any, nn.Module]:
    teacher, images = small()
    student = zoo_export.student_of(teacher, images, spec)
    frozen = freeze(student, images)
    return build(frozen.program, frozen, teacher, int2=int2).proto, student


def initializers(proto: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


@given(st.lists(st.integers(-8, 7), max_size=9), st.sampled_from([2, 4, 8]))
def test_codes_survive_packing(numbers: list[int], bits: int) -> None:
    half = 2 ** (bits - 1)
    codes = np.clip(np.array(numbers, dtype=np.int8), -half, half - 1)
    data = pack(codes, bits)
    assert len(data) == -(-len(codes) * bits // 8)
    kind = {2: INT2, 4: INT4, 8: INT8}[bits]
    tensor = TensorProto(dims=codes.shape, data_type=kind, raw_data=data)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)  # onnx's own reader


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("placement", ["deploy", "paper"])
def test_weights_in_the_file_are_the_students_codes(bits: int, placement: str) -> None:
    spec = QuantSpec(bits, 4, placement, edge_bits=bits, layer_bits={"3": bits})
    proto, student = model_of(spec, int2=True)
    stored = initializers(proto)
    for weight in quantized_weights(student):
        tensor = stored[f"{weight.name}.weight"]
        codes = encode(weight.parameter, weight.grid()).detach()
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes.numpy())
        assert tensor.data_type == (INT8 if bits > 4 else INT4 if bits > 2 else INT2)
        size = 8 if bits > 4 else 4 if bits > 2 else 2
        assert len(tensor.raw_data) == -(-codes.numel() * size // 8)
    assert proto.opset_import[0].version == (25 if bits == 2 else 21)


def test_two_bits_go_into_four_where_the_runtime_reads_nothing_smaller() -> None:
    proto, _ = model_of(QuantSpec(2, 4, "deploy", edge_bits=2))
    assert {tensor.data_type for name, tensor in initializers(proto).items() if "weight" in name} == {INT4}
    assert proto.opset_import[0].version == 21 and proto.ir_version == 10


def test_sub_byte_weights_are_cast_before_they_are_dequantized() -> None:
    """A DequantizeLinear of INT4 itself runs in float, slower than the float network."""
    proto, _ = model_of(QuantSpec(4, 4, "deploy", edge_bits=4))
    readers = {name: node.op_type for node in proto.graph.node for name in node.input}
    assert [readers[name] for name in initializers(proto) if name.endswith(".weight")] == ["Cast"] * 3


def test_biases_are_int32_on_the_grid_of_the_accumulator() -> None:
    proto, student = model_of(QuantSpec(4, 4, "deploy"))
    stored = initializers(proto)
    makers = {node.output[0]: node for node in proto.graph.node}
    names = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    for name in names:
        layer = next(node for node in proto.graph.node if node.op_type in ("Conv", "Gemm") and node.name == name)
        bias = makers[layer.input[2]]
        codes, scale = (numpy_helper.to_array(stored[key]) for key in bias.input[:2])
        assert codes.dtype == np.int32 and bias.op_type == "DequantizeLinear"
        x, w = (numpy_helper.to_array(stored[makers[layer.input[i]].input[1]]) for i in (0, 1))
        assert np.allclose(scale, x * w, rtol=1e-6)
        module: Any = dict(student.named_modules())[name]
        used = module.weight_path(torch.zeros(1), module.weight, module.bias, 0)[1]
        assert codes.any() and np.allclose(codes * scale, used.detach(), rtol=1e-6)


def test_activations_are_uint8_and_clipped_as_integers() -> None:
    """Any other order is not fused: see the specification's table of encodings."""
    proto, _ = model_of(QuantSpec(4, 3, "deploy"))
    stored, makers = initializers(proto), {node.output[0]: node for node in proto.graph.node}
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert {stored[node.input[2]].data_type for node in quantizers} == {TensorProto.UINT8}
    clips = [node for node in proto.graph.node if node.op_type == "Clip"]
    assert clips and all(makers[node.input[0]].op_type == "QuantizeLinear" for node in clips)
    assert {int(numpy_helper.to_array(stored[node.input[2]])) for node in clips} == {7}
    assert not [node for node in proto.graph.node if node.op_type in ("Relu", "BatchNormalization")]


def test_metadata_says_how_to_use_the_file(tmp_path: Path) -> None:
    teacher, images = zoo_export.teacher_of("resnet18")
    student = zoo_export.student_of(teacher, images, QuantSpec(4, 8, "deploy"))
    extra = {"recipe": "none"}
    result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", facts=extra, least_agreement=0)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    facts = {prop.key: prop.value for prop in proto.metadata_props}
    assert facts["mean"] == "[0.5, 0.5, 0.5]" and facts["channels"] == "rgb" and facts["classes"] == "10"
    assert facts["recipe"] == "none" and facts["target"] == "ort"
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert proto.graph.input[0].name == "image" and shape[0].dim_param and shape[1].dim_value == 3
    assert [output.name for output in proto.graph.output] == ["logits"]
    assert result["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert result["size_ratio"] == result["float_bytes"] / result["bytes"] > 5.5


def test_labels_of_the_embedded_teachers() -> None:
    from zsq.export.labels import labels_of

    names = labels_of("resnet20-cifar100", 100)
    assert names is not None and len(set(names)) == 100 and names == sorted(names)
    assert labels_of("digits", 10) == list("0123456789")
    assert labels_of("resnet20-cifar10", 11) is None and labels_of("mine", 10) is None


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_scale_for_a_whole_weight(symmetric: bool, tmp_path: Path) -> None:
    class WholeTensor(LiveMinMax):
        """Ignores the axis that the specification asks for."""

        def __init__(self, bits: int, *, axis: int | None = None, symmetric: bool = False) -> None:
            super().__init__(bits, axis=None, symmetric=symmetric)

    teacher, images = small()
    spec = QuantSpec(4, 8, "deploy" if symmetric else "paper", weight=partial(WholeTensor))
    student = zoo_export.student_of(teacher, images, spec)
    result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", least_agreement=0)
    assert result["max_lsb"] <= 1 and result["integer_conv_share"] == (1 if symmetric else 0)


@pytest.mark.parametrize("bits", [pytest.param(b, marks=[] if b in (2, 5) else pytest.mark.slow) for b in range(2, 9)])
@pytest.mark.parametrize("target", ["ort", "openvino", "torch"])
def test_every_width_in_every_target(target: str, bits: int, tmp_path: Path) -> None:
    """Odd widths too, which no integer type has: they live in the next container."""
    from zsq.export import torch_program

    teacher, images = small()
    student = zoo_export.student_of(teacher, images, QuantSpec(bits, bits, "deploy", edge_bits=bits))
    if target == "torch":
        result = torch_program.write(student, teacher, images, tmp_path / "m.pt2")
        assert result["site_max_lsb"] <= 1 and result["float_weights"] == 0 and result["lowerable_conv_share"] == 1
    else:
        result = onnx_program.write(student, teacher, images, tmp_path / "m.onnx", target=target, least_agreement=0)
        assert result["max_lsb"] <= 1 and result["integer_conv_share"] == 1
        assert result["opset"] == (25 if bits == 2 and target == "ort" else 21)
