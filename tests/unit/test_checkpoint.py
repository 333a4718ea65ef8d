"""Trees on disk: what goes in comes out, and a file is whole or untouched."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import resource
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zsq.checkpoint import load_tree, read_json, save_tree, write_json_atomic
from zsq.errors import BadInput


def same(a: Any, b: Any) -> bool:
    """Equal in value, type and, for tensors, in bits, dtype and memory order."""
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) for x, y in zip(a, b, strict=True)) and all(
            same(a[key], b[key]) for key in a)  # fmt: skip
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return (math.isnan(a) and math.isnan(b)) if isinstance(a, float) and math.isnan(a) else repr(a) == repr(b)


def there_and_back(tmp_path: Path, tree: Any) -> Any:
    save_tree(tmp_path / "t.safetensors", tree)
    return load_tree(tmp_path / "t.safetensors")


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3, 4)], ids=str)
def test_tensors_of_every_kind(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    assert same(there_and_back(tmp_path, {"x": [tensor]}), {"x": [tensor]})


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    assert same(there_and_back(tmp_path, tensor), tensor)


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, -3, 2**80, 0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan, "", "a.b", "\ud800 é\0",
     [], {}, (), [1, [2, (3,)]], {0: "int", "0": "str", None: 1, True: 2, 0.5: 3, (1, "a"): 4}, Counter({3: 2, 5: 1})],
    ids=repr,
)  # fmt: skip
def test_plain_values(tmp_path: Path, value: Any) -> None:
    assert same(there_and_back(tmp_path, {"v": value}), {"v": value})


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=3),
        st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(tree=trees)
def test_any_tree(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    assert same(there_and_back(tmp_path_factory.getbasetemp(), tree), tree)


def test_shared_memory_and_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "whole": base,
        "row": base[1],
        "again": base,
        "columns": base.t(),
        "gap": base[:, ::2],
        "one": base[:1].expand(3, 4),
    }
    back = there_and_back(tmp_path, tree)
    assert same(back, tree)
    back["whole"].zero_()
    assert same(back["again"], base)  # every tensor owns its memory


def test_memory_order_survives(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    back = there_and_back(tmp_path, [image, image.permute(3, 0, 1, 2)])
    assert back[0].stride() == image.stride()
    assert back[1].stride() == image.permute(3, 0, 1, 2).stride()
    assert same(back[0], image)


def test_tensors_own_aligned_memory(tmp_path: Path) -> None:
    tree = {"flag": torch.tensor(True), "x": torch.randn(5), "y": torch.randn(5, dtype=torch.float64)}
    assert all(value.data_ptr() % 64 == 0 for value in there_and_back(tmp_path, tree).values())


def test_a_flat_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    save_tree(tmp_path / "net.safetensors", net.state_dict(), metadata={"step": "7"})
    data = (tmp_path / "net.safetensors").read_bytes()
    assert set(safetensors.torch.load(data)) == set(net.state_dict())
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"


def test_same_tree_same_bytes(tmp_path: Path) -> None:
    tree = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int8), "lr": 0.1}
    files = set()
    for _ in range(5):  # the library alone writes metadata in a random order
        save_tree(tmp_path / "x", tree, metadata={"step": "1", "stage": "fit", "total": "2"})
        files.add((tmp_path / "x").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.Adam(p, 1e-3),
    lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True), lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
], ids=["sgd", "adam", "adamw", "rmsprop"])  # fmt: skip
def test_optimizer_and_schedule_go_on_bit_for_bit(tmp_path: Path, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 2))
        net = net.to(memory_format=torch.channels_last)
        optimizer = make(net.parameters())
        schedules = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 6]),
                     torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)]  # fmt: skip
        return net, optimizer, schedules

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, schedules: list[Any], steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            for schedule in schedules:
                schedule.step()

    straight = build()
    train(*straight, range(8))
    first = build()
    train(*first, range(4))
    state = {"net": first[0].state_dict(), "opt": first[1].state_dict(), "s": [s.state_dict() for s in first[2]]}
    back = there_and_back(tmp_path, state)
    second = build()
    second[0].load_state_dict(back["net"])
    second[1].load_state_dict(back["opt"])
    for schedule, saved in zip(second[2], back["s"], strict=True):
        schedule.load_state_dict(saved)
    assert back["net"]._metadata == state["net"]._metadata
    train(*second, range(4, 8))
    assert same(dict(second[0].state_dict()), dict(straight[0].state_dict()))
    assert same(second[1].state_dict(), straight[1].state_dict())


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": {"b": object()}}, "a.b"), ([{1, 2}], "0"), ({"n": lambda: 0}, "n"), ({"s": torch.eye(2).to_sparse()}, "s"),
     ({"m": torch.ones(1, device="meta")}, "m")],
    ids=["object", "set", "function", "sparse", "meta"],
)  # fmt: skip
def test_refuses_what_it_cannot_restore(tmp_path: Path, value: Any, place: str) -> None:
    with pytest.raises(TypeError, match=rf"^{place}: expected .* got"):
        save_tree(tmp_path / "x", value)
    assert not list(tmp_path.iterdir())


# ---- files of others


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gone: expected a safetensors file written by zsq, got no such file"):
        load_tree(tmp_path / "gone")


@pytest.mark.parametrize("length", [0, 4, 8, 60, -1], ids=str)
def test_truncated_file(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x"
    save_tree(file, {"w": torch.ones(4)})
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(BadInput, match="got a truncated file or one of another kind"):
        load_tree(file)


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("unpickled",))


def test_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "pickle": pickle.dumps(Trap()),
        "text": b"hello, this is certainly not a checkpoint at all",
        "plain": safetensors.torch.save({"w": torch.ones(1)}),
        "other": safetensors.torch.save({"w": torch.ones(1)}, metadata={"zsq_tree": '{"tensor": "absent"}'}),
        "huge": (2**62).to_bytes(8, "little") + b"{}",
    }
    for name, data in contents.items():
        Path(name).write_bytes(data)
        with pytest.raises(BadInput, match="expected a safetensors file written by zsq"):
            load_tree(name)
    assert not Path("unpickled").exists()


# ---- a disk that says no


def break_call(monkeypatch: pytest.MonkeyPatch, name: str, code: int, after: int = 0) -> None:
    """Make a function of `os` fail from its call number `after` on."""
    real, calls = getattr(os, name), []

    def broken(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **named)

    monkeypatch.setattr(os, name, broken)


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [("write", errno.ENOSPC, "no space left"), ("fsync", errno.EIO, "input/output error"),
     ("replace", errno.EROFS, "read-only"), ("open", errno.EACCES, "permission denied")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["tree", "json"])
def test_a_refused_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str, kind: str
) -> None:
    file = tmp_path / "x"

    def write(value: int) -> None:
        save_tree(file, {"v": value}) if kind == "tree" else write_json_atomic(file, {"v": value})

    write(1)
    before = file.read_bytes()
    break_call(monkeypatch, call, code)
    with pytest.raises(BadInput, match=rf"writing .*x: expected a writable folder.* got .*{words}.*Nothing on disk"):
        write(2)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    write(3)
    assert file.read_bytes() != before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    save_tree(tmp_path / "x", {"w": torch.arange(50)})
    monkeypatch.undo()
    assert same(load_tree(tmp_path / "x"), {"w": torch.arange(50)})


def test_a_folder_that_cannot_be_synced_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_call(monkeypatch, "fsync", errno.EINVAL, after=1)  # the first is the file's
    save_tree(tmp_path / "x", {"a": 1})
    assert load_tree(tmp_path / "x") == {"a": 1}
    monkeypatch.undo()
    break_call(monkeypatch, "fsync", errno.EIO, after=1)
    with pytest.raises(BadInput, match="input/output error"):
        save_tree(tmp_path / "x", {"a": 2})


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="got no such file or directory"):
        save_tree(tmp_path / "absent" / "x", {"a": 1})


def fork() -> int:
    with warnings.catch_warnings():  # Python 3.12 warns of threads; the child only writes a file and leaves
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def test_a_real_limit_of_the_file_size(tmp_path: Path) -> None:
    """A forked child that may write 4096 bytes per file: what a full disk does, without a full disk."""
    file = tmp_path / "x"
    save_tree(file, {"w": torch.ones(8)})
    before = file.read_bytes()
    child = fork()
    if child == 0:  # no clean-up of the parent's test session in here
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            save_tree(file, {"w": torch.ones(5000)})
        except BadInput as error:
            code = error.exit_code if "file too large" in str(error) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# ---- JSON


def test_json(tmp_path: Path) -> None:
    value = {"a": (1, 2.5, None), "p": Path("runs/x"), "inf": math.inf, "nan": math.nan, 3: "é"}
    write_json_atomic(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, None], "p": "runs/x", "inf": "inf", "nan": "nan", "3": "é"}
    json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)


def test_json_refuses_objects(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected plain data for JSON, got object"):
        write_json_atomic(tmp_path / "x.json", {"a": object()})


def test_damaged_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(BadInput, match="expected a JSON file, got damaged text"):
        read_json(tmp_path / "x.json")
    with pytest.raises(BadInput, match="expected a JSON file, got no such file"):
        read_json(tmp_path / "y.json")


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A child dies by SIGKILL at a random one of its system calls; the file is the old or the new one."""
    file = tmp_path / "x"
    trees = [{"v": torch.full((9,), float(i))} for i in range(2)]
    save_tree(file, trees[0])
    choose, seen = random.Random(0), set()
    for _ in range(12):
        save_tree(file, trees[0])
        victim, name = choose.random(), choose.choice(["write", "fsync", "replace", "close"])
        child = fork()
        if child == 0:
            real = getattr(os, name)

            def die(*args: Any, real: Any = real, late: bool = victim < 0.5) -> Any:
                if late:
                    real(*args)
                os.kill(os.getpid(), 9)

            setattr(os, name, die)
            save_tree(file, trees[1])
            os._exit(0)
        os.waitpid(child, 0)
        found = [same(load_tree(file), tree) for tree in trees]
        assert any(found)
        seen.add(tuple(found))
    assert len(seen) == 2  # both outcomes happened
