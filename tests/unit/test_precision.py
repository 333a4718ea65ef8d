"""What a run multiplies in: chosen once, recorded, kept by a resumed run, and obeyed by sources and student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tiny import SHORT, Command, Folder, tiny_teacher
from zsq import machine
from zsq.errors import BadInput
from zsq.machine import choose_precision, matrix_rate
from zsq.precision import half_gradient_holds, trainable_at
from zsq.recipes.gdfq import gdfq, source
from zsq.run import Run

CPU = torch.device("cpu")


def rates(monkeypatch: pytest.MonkeyPatch, *, bf16: float, float32: float) -> None:
    found = {torch.bfloat16: bf16, torch.float32: float32}
    monkeypatch.setattr(machine, "matrix_rate", lambda kind, *_, **__: found[kind])


@pytest.mark.parametrize(("bf16", "chosen"), [(200e9, "bf16"), (126e9, "bf16"), (124e9, "float32"), (60e9, "float32")])
def test_auto_is_the_faster_one(bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, bf16=bf16, float32=100e9)
    assert choose_precision("auto", CPU) == chosen


@pytest.mark.parametrize("asked", ["bf16", "float32"])
def test_what_is_asked_for_is_not_measured(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matrix_rate", None)
    assert choose_precision(asked, CPU) == asked


def test_a_run_that_goes_on_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, bf16=200e9, float32=100e9)
    begun = tmp_path / "config.json"
    assert choose_precision("auto", CPU, begun=begun) == "bf16"  # nothing to resume is said elsewhere
    begun.write_text(json.dumps({"config": {"precision": "float32"}}))
    assert choose_precision("auto", CPU, begun=begun) == "float32"
    begun.write_text(json.dumps({"config": {}}))  # of an earlier version
    assert choose_precision("auto", CPU, begun=begun) == "bf16"


def test_others_are_refused() -> None:
    with pytest.raises(BadInput, match="--precision: expected auto, bf16 or float32, got 'half'"):
        choose_precision("half", CPU)


def test_a_rate_is_a_rate() -> None:
    assert 1e8 < matrix_rate(torch.float32, CPU, size=256) < 1e14


class Kinds(TorchFunctionMode):
    """Types of the factors of every convolution and linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.halves, self.integers = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("conv2d", "conv_transpose2d") and isinstance(result, torch.Tensor):
            self.halves += result.dtype == torch.bfloat16
        self.integers += "qconv2d_pointwise" in str(func)
        return result


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_source_and_student_obey(precision: str) -> None:
    teacher = replace(tiny_teacher(), precision=precision)  # type: ignore[arg-type]
    assert source(teacher, batch=4, milestones=())._precision == precision
    with Kinds() as kinds, Run(None, progress=False) as run:
        gdfq(teacher, run, warmup=2, steps=2, batch=8)
    assert (kinds.halves > 0) == (precision == "bf16")
    assert (kinds.integers > 0) == (precision == "bf16")


def test_the_command_records_and_keeps_it(zsq: Command, folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = ["quantize", *folder.teacher(), "--run", path, *SHORT]
    said = zsq(*command, "--precision", "float32")
    assert said.code == 0, said.err
    assert json.loads((path / "config.json").read_text())["config"]["precision"] == "float32"
    (path / "summary.json").unlink()
    said = zsq(*command, "--resume", "--precision", "bf16")
    assert said.code == 2 and "precision" in said.err
    said = zsq(*command, "--resume")
    assert said.code == 0, said.err


# ---- where bfloat16 is wrong


def test_a_network_with_dilated_groups_is_not_trained_in_bf16() -> None:
    grouped = nn.Conv2d(8, 8, 3, groups=8, dilation=2)
    others = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, dilation=2), nn.Linear(2, 2)
    assert not half_gradient_holds(grouped) and all(half_gradient_holds(layer) for layer in others)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), grouped)
    found = [trainable_at(net, kind) for kind in ("float32", "bf16", "integers")]
    assert found == ["float32", "float32", "integers"]
    assert trainable_at(nn.Sequential(nn.Conv2d(1, 8, 3)), "bf16") == "bf16"
