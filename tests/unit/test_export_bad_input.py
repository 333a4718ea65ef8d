"""What can go wrong with `zsq export` as a user meets it: exit code 2, one message, and nothing on disk has changed."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny import SHORT, Command, contents, settled

ODD = """
import torch
from torch import nn

ZSQ = {"image": (1, 8, 8), "mean": 0.305, "std": 0.376}


class Running(nn.Module):
    def forward(self, x):
        return x.cumsum(2)


def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Running(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )
"""


def refused(zsq: Command, folder: Path, *arguments: object) -> str:
    """The one message of an export that was refused and changed nothing."""
    before = contents(folder)
    said = zsq("export", *arguments)
    assert said.code == 2, said.err
    assert said.out == "" and said.err.count("zsq: ") == 1 and said.err.count("\n") == 1
    assert "expected " in said.err and "got " in said.err and "Traceback" not in said.err
    assert contents(folder) == before
    return said.err


@pytest.mark.parametrize("target", ["ort", "openvino", "torch"])
def test_an_unfinished_run(target: str, zsq: Command, run_copy: Path) -> None:
    (run_copy / "summary.json").unlink()
    message = refused(zsq, run_copy, run_copy, "--target", target)
    assert "expected a finished run directory" in message and "--resume" in message


@pytest.mark.parametrize("target", ["ort", "openvino", "torch"])
@pytest.mark.parametrize("wrong", ["folder", "missing folder", "file as folder"])
def test_a_path_that_cannot_be_written(wrong: str, target: str, zsq: Command, run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    paths = {"folder": tmp_path, "missing folder": tmp_path / "a" / "m", "file as folder": tmp_path / "file" / "m"}
    message = refused(zsq, tmp_path, run_copy, "--target", target, "--output", paths[wrong])
    assert "Choose another" in message


@pytest.mark.parametrize("target", ["ort", "torch"])
def test_a_full_disk(target: str, zsq: Command, run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on device" in refused(zsq, run_copy, run_copy, "--target", target).lower()


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [("ort", "onnxruntime", "export"), ("ort", "onnx", "export"), ("openvino", "openvino", "export,openvino")],
)
def test_a_missing_extra(
    target: str, package: str, extra: str, zsq: Command, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails as if it were not there
    message = refused(zsq, run_copy, run_copy, "--target", target)
    assert f"the package {package}" in message and f'pip install "zsq[{extra}]"' in message


@pytest.mark.parametrize(
    ("reason", "said"),
    [("libcrypto.so.9: cannot open shared object file", "libcrypto.so.9: cannot open shared object file"),
     ("", "built for other packages")],  # an onnxruntime of numpy 1 beside numpy 2
)  # fmt: skip
def test_a_broken_package_is_not_called_missing(
    reason: str, said: str, zsq: Command, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"raise ImportError({reason!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    message = refused(zsq, run_copy, run_copy, "--target", "ort")
    assert f"got one that does not import ({said}" in message and "not installed" not in message


def test_an_operator_that_cannot_be_exported(zsq: Command, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    scope: dict[str, object] = {"__name__": "odd"}
    exec(ODD, scope)
    torch.manual_seed(0)
    save_file(settled(scope["net"]()).state_dict(), tmp_path / "odd.safetensors")  # type: ignore[operator]
    names = ["odd.py:net", "--weights", "odd.safetensors", "--placement", "deploy", "--run", "run"]
    assert zsq("quantize", *names, "--json", *SHORT).code == 0
    message = refused(zsq, tmp_path / "run", "run", "--target", "ort")
    assert "operator cumsum.default" in message and "'3" in message and "--target torch" in message
    assert zsq("export", "run", "--target", "torch", "--json").code == 0  # what the message proposes works


def test_a_runtime_too_old_for_the_opset(zsq: Command, run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file needs opset 21 (4-bit tensors): a runtime that does not read it is named, with what to install."""
    import onnx

    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 20)
    message = refused(zsq, run_copy, run_copy, "--target", "ort")
    assert "a version that knows opset 21" in message and "pip install -U" in message


def test_a_runtime_that_refuses_the_file(zsq: Command, run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def old(*given: object, **named: object) -> None:
        raise RuntimeError("Unsupported model IR version: 10, max supported IR version: 9")

    monkeypatch.setattr(onnxruntime, "InferenceSession", old)
    message = refused(zsq, run_copy, run_copy, "--target", "ort")
    assert "onnxruntime" in message and "max supported IR version: 9" in message and "pip install -U" in message


@pytest.mark.parametrize("name", ["student.safetensors", "images.safetensors"])
def test_a_run_with_a_damaged_file(name: str, zsq: Command, run_copy: Path) -> None:
    (run_copy / name).write_bytes(b"not what it was")
    assert name in refused(zsq, run_copy, run_copy, "--target", "ort")
