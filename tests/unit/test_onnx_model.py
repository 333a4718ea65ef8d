"""An ONNX file is scored as it is: its metadata, its batches, its runtime, and what can be wrong with it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from unit import onnx_files
from zsq import onnx_session
from zsq.cli import main
from zsq.data import load_data
from zsq.errors import BadInput, RunFailed
from zsq.finished import evaluate_onnx
from zsq.onnx_model import OnnxModel, load_onnx
from zsq.onnx_session import open_file
from zsq.teachers import load_teacher

FACTS = {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.25, 1.0], "image": [3, 4, 4], "classes": 3, "task": "classify",
         "channels": "bgr", "resize": None, "crop": None, "labels": ["a", "b", "c"]}  # fmt: skip
# Class k is the channel k of the input, summed.
SUMS = np.kron(np.eye(3), np.ones((16, 1)))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Nine images, each bright in one channel (RGB); the labels of a network that wants BGR, two of them wrong."""
    images = np.zeros((9, 4, 4, 3), np.uint8)
    for i in range(9):
        images[i, :, :, i % 3] = 255
    labels = np.array([2 - i % 3 for i in range(9)])
    labels[:2] = [0, 0]
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    return f"npz:{tmp_path / 'set.npz'}"


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@pytest.mark.parametrize("batch", ["batch", 4])
def test_score_with_the_metadata_of_the_file(data: str, tmp_path: Path, runtime: str, batch: int | str) -> None:
    facts = FACTS | {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4), batch=batch, metadata=facts)
    result = evaluate_onnx(path, {}, data=data, runtime=runtime)
    assert result["student_score"] == 7 / 9 and result["eval_count"] == 9 and result["file"] == "net.onnx"
    assert result["runtime"].startswith({"ort": "onnxruntime ", "openvino": "openvino "}[runtime])
    assert len(result["file_sha256"]) == 64 and result["eval_data"]["name"] == "set.npz"


def test_options_win_over_metadata(data: str, tmp_path: Path) -> None:
    facts = FACTS | {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4), metadata=facts)
    assert evaluate_onnx(path, {"channels": "rgb"}, data=data)["student_score"] == 3 / 9


def test_metadata_becomes_facts(tmp_path: Path) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=("c", "h", "w"), metadata=FACTS)
    model = load_onnx(path)
    assert (model.mean, model.std, model.channels) == ((0.5, 0.25, 0.0), (0.5, 0.25, 1.0), "bgr")
    assert (model.image, model.classes, model.task) == ((3, 4, 4), 3, "classify")
    assert open_file(path).metadata["labels"] == ["a", "b", "c"]
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(model.net(x), x.sum((2, 3)))


def test_a_file_of_the_exporter_without_prefix_and_a_foreign_one(tmp_path: Path) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4))
    model = onnx.load(str(path))
    facts = {"task": "classify", "channels": "bgr", "mean": "[0.5, 0.5, 0.5]", "std": "[1, 1, 1]"}
    helper.set_model_props(model, facts)
    onnx.save(model, str(path))
    assert open_file(path).metadata == {}  # keys of other programs may mean other things
    model.producer_name = "zsq"
    onnx.save(model, str(path))
    assert load_onnx(path).channels == "bgr" and load_onnx(path).mean == (0.5, 0.5, 0.5)


def test_a_file_without_metadata_needs_the_options(data: str, tmp_path: Path) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4))
    with pytest.raises(BadInput, match="--mean and --std"):
        evaluate_onnx(path, {}, data=data)
    assert evaluate_onnx(path, {"mean": 0.0, "std": 1.0, "channels": "bgr"}, data=data)["student_score"] == 7 / 9
    free = onnx_files.linear(tmp_path / "free.onnx", SUMS, image=("c", "h", "w"))
    with pytest.raises(BadInput, match="--image"):
        load_onnx(free)
    assert load_onnx(free, {"image": (3, 4, 4)}).classes == 3


@pytest.mark.parametrize("count", [1, 4, 6])
def test_files_of_fixed_batch_size(tmp_path: Path, count: int) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4), batch=4)
    x = torch.randn(count, 3, 4, 4)
    torch.testing.assert_close(OnnxModel(open_file(path))(x), x.sum((2, 3)))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher("digits")
    x, labels = next(load_data("digits:train", teacher).batches(1000))
    wanted = torch.nn.functional.one_hot(labels, 10).float()
    weight = torch.linalg.lstsq(x.flatten(1), wanted, driver="gelsd").solution.numpy()  # a least-squares classifier
    facts = {"mean": teacher.mean, "std": teacher.std, "classes": 10}
    path = onnx_files.linear(tmp_path / "net.onnx", weight, image=teacher.image, metadata=facts)
    main(["evaluate", str(path), "--data", "digits", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "top1" and 0.8 < result["student_score"] < 1 and result["eval_count"] == 599


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "net.onnx"], "--data"),
        (["evaluate", "absent.onnx", "--data", "digits"], "no such file"),
        (["evaluate", "text.onnx", "--data", "digits"], "expected an ONNX model"),
        (["evaluate", "net.onnx", "--data", "digits", "--weights", "w.safetensors"], "--weights"),
        (["quantize", "net.onnx"], "a network in torch"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4), metadata=FACTS)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and words in captured.err and captured.err.count("\n") == 1


def test_files_that_are_no_classifiers(tmp_path: Path) -> None:
    twice = [helper.make_node("ReduceMean", ["image"], ["a"]), helper.make_node("ReduceMax", ["image"], ["b"])]
    shape, ends = ["batch", 3, 4, 4], {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}
    path = onnx_files.save(tmp_path / "two.onnx", twice, {}, shape=shape, outputs=ends)
    with pytest.raises(BadInput, match="one output, the logits, got 2 outputs"):
        load_onnx(path)
    cast = [helper.make_node("Cast", ["image"], ["a"], to=TensorProto.FLOAT)]
    path = onnx_files.save(tmp_path / "int.onnx", cast, {}, shape=shape, outputs={"a": shape}, kind=TensorProto.UINT8)
    with pytest.raises(BadInput, match="one float32 input"):
        open_file(path)


def test_metadata_that_cannot_be_meant(tmp_path: Path) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4), metadata={"mean": [123.0, 116.0, 103.0]})
    with pytest.raises(BadInput, match=r"net\.onnx: metadata\['mean'\]: expected numbers from 0 to 1"):
        load_onnx(path)


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_file_the_runtime_refuses(tmp_path: Path, runtime: str) -> None:
    nodes = [helper.make_node("Squash", ["image"], ["a"], domain="elsewhere")]
    path = onnx_files.save(tmp_path / "net.onnx", nodes, {}, shape=[1, 3], outputs={"a": [1, 3]})
    model = onnx.load(str(path))
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    onnx.save(model, str(path))
    with pytest.raises(BadInput, match="can run, got .*Squash"):
        onnx_session.session(open_file(path), runtime)


def test_images_the_file_does_not_take(tmp_path: Path) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=("c", "h", "w"), metadata=FACTS)
    with pytest.raises(RunFailed, match=r"net\.onnx in ort"):
        OnnxModel(open_file(path))(torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize(
    ("missing", "extra"), [("onnx", "export"), ("onnxruntime", "export"), ("openvino", "openvino")]
)
def test_missing_extras_name_the_command(
    missing: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = onnx_files.linear(tmp_path / "net.onnx", SUMS, image=(3, 4, 4), metadata=FACTS)
    real = importlib.import_module

    def without(name: str) -> object:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(onnx_session.importlib, "import_module", without)
    with pytest.raises(BadInput, match=rf'pip install "zsq\[{extra}\]"'):
        load_onnx(path, runtime="openvino" if missing == "openvino" else "ort")
