"""The cache of the probe pool: it saves time and never decides anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import tiny_teacher
from zsq import probe
from zsq.teachers import Teacher


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache in a folder that does not exist yet; the list grows whenever a pool is made."""
    calls: list[str] = []

    def fake(teacher: Teacher) -> Tensor:
        calls.append(teacher.name)
        return torch.full((4, *teacher.image), float(len(calls)))

    monkeypatch.setattr(probe, "probe_images", fake)
    monkeypatch.setenv("ZSQ_CACHE", str(tmp_path / "new" / "cache"))
    return calls


def test_it_is_made_once(made: list[str], tmp_path: Path) -> None:
    first, second = probe.probe_pool(tiny_teacher()), probe.probe_pool(tiny_teacher())
    assert torch.equal(first, second) and len(made) == 1
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 1


def test_another_teacher_or_image_size_has_another_pool(made: list[str]) -> None:
    small, large, other = tiny_teacher(), tiny_teacher(16), tiny_teacher()
    with torch.no_grad():
        other.net[0].weight.add_(1)
    shapes = [probe.probe_pool(teacher).shape for teacher in (small, large, small)]
    assert shapes == [(4, 1, 8, 8), (4, 1, 16, 16), (4, 1, 8, 8)] and len(made) == 2
    same = Teacher(small.net, "again", "classify", 10, (1, 12, 12), fingerprint=small.fingerprint)
    assert probe.probe_pool(same).shape == (4, 1, 12, 12)


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_damaged_file_is_made_again(made: list[str], tmp_path: Path, damage: bytes | None) -> None:
    first = probe.probe_pool(tiny_teacher())
    (file,) = (tmp_path / "new" / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    second = probe.probe_pool(tiny_teacher())
    assert len(made) == 2 and first.shape == second.shape
    assert torch.equal(probe.probe_pool(tiny_teacher()), second) and len(made) == 2


def test_no_cache_is_no_failure(made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZSQ_CACHE", str(tmp_path / "file" / "cache"))
    assert probe.probe_pool(tiny_teacher()).shape == probe.probe_pool(tiny_teacher()).shape
    assert len(made) == 2
    assert (tmp_path / "file").read_text() == ""


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSQ_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert probe.cache_folder() == Path("/a")
    monkeypatch.delenv("ZSQ_CACHE")
    assert probe.cache_folder() == Path("/b/zsq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert probe.cache_folder() == Path("/c/.cache/zsq")
