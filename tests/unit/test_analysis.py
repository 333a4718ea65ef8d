"""`zsq analyse`: files, figures, arms, and one clear message for what cannot be used."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import zsq as package
from tiny import Command
from zsq.analysis import INSTRUMENTS, figures
from zsq.checkpoint import load_tree, save_tree
from zsq.errors import BadInput

FAST = ("--count", "12", "--probes", "2", "--points", "3")


@pytest.fixture
def real(tmp_path: Path) -> str:
    """Real images whose labels must never be read: they do not even belong to ten classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=pixels, labels=np.full(20, 77))
    return f"npz:{tmp_path / 'real.npz'}[4:16]"


def test_everything_with_a_control_arm(zsq: Command, run_copy: Path, real: str) -> None:
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    said = zsq("analyse", run_copy, "--images", real, "--json", *FAST)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert list(result) == list(INSTRUMENTS)
    for name in INSTRUMENTS:
        record = json.loads((run_copy / "analysis" / f"{name}.json").read_text())
        assert record["instrument"] == name and record["images"]["real images (real.npz[4:16])"]["count"] == 12
        assert (run_copy / "analysis" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert name in said.err  # progress
    curves = json.loads((run_copy / "analysis" / "cosine.json").read_text())["curves"]
    assert [c["labels"] for c in curves if c["arm"].startswith("real")] == ["teacher's labels"] * 2
    assert all(path.read_bytes() == content for path, content in before.items())


def test_one_instrument_as_a_table(zsq: Command, run_copy: Path) -> None:
    said = zsq("analyse", run_copy, "--what", "flips")
    assert said.code == 0 and "of the weights" in said.out
    assert sorted(p.name for p in (run_copy / "analysis").iterdir()) == ["flips.json", "flips.png"]


def test_images_without_labels_are_measured_with_the_teachers(zsq: Command, run_copy: Path) -> None:
    tree = load_tree(run_copy / "images.safetensors")
    save_tree(run_copy / "images.safetensors", {"images": tree["images"]})
    said = zsq("analyse", run_copy, "--what", "cosine", "--count", "4", "--json")
    assert said.code == 0 and "labels asked for" not in said.out
    curves = json.loads((run_copy / "analysis" / "cosine.json").read_text())["curves"]
    assert [curve["labels"] for curve in curves] == ["teacher's labels"] * 2


def test_from_python_and_without_history(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "history")
    result = package.analyse(run_copy, count=4, probes=2, points=3, progress=False)
    assert result["flips"] == {"skipped": "the run has no history"} and "figure" in result["trace"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probes", "0"], "--probes: expected at least 2 (a standard error needs two), got 0"),
        (["--count", "0"], "--count: expected at least 1 image, got 0"),
        (["--points", "10"], "--points: expected an odd number from 3, so that the centre is one of them, got 10"),
        (["--what", "nothing"], "nothing"),
        (["--images", "npz:none.npz"], "none.npz"),
    ],
)
def test_bad_options(zsq: Command, run_copy: Path, arguments: list[str], message: str) -> None:
    said = zsq("analyse", run_copy, *arguments)
    assert said.code == 2 and message in " ".join(said.err.split()) and not (run_copy / "analysis").exists()


def test_unfinished_and_without_history(zsq: Command, run_copy: Path) -> None:
    shutil.rmtree(run_copy / "history")
    said = zsq("analyse", run_copy, "--what", "flips")
    assert said.code == 2 and "expected a history of at least two snapshots" in said.err
    (run_copy / "summary.json").unlink()
    said = zsq("analyse", run_copy)
    assert said.code == 2 and "expected a finished run directory" in said.err
    said = zsq("analyse", "nowhere")
    assert said.code == 2 and "expected a finished run directory" in said.err


def test_without_matplotlib(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install "zsq\[report\]"'):
        package.analyse(run_copy, progress=False)
    assert not (run_copy / "analysis").exists()


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["shapes-segment", "shapes-detect"])
def test_networks_that_answer_per_position(zsq: Command, teacher: str) -> None:
    made = zsq("quantize", teacher, "--recipe", "zaq", "--steps", "2", "--warmup", "1", "--batch", "2", "--run", "run")
    assert made.code == 0, made.err
    said = zsq("analyse", "run", "--json", "--count", "2", "--probes", "2", "--points", "3")
    assert said.code == 0, said.err
    trace, curves = (json.loads(Path(f"run/analysis/{name}.json").read_text()) for name in ("trace", "cosine"))
    values = trace["arms"]["synthetic images"]
    assert trace["method"] == "gauss_newton" and 0 < values["kl_t1"][-1]["trace"] < float("inf")
    assert [curve["labels"] for curve in curves["curves"]] == ["teacher's labels"] * 2


def test_a_figure_needs_its_file_only(tmp_path: Path) -> None:
    layer = {"own_grid": [0.0], "fixed_grid": [0.1], "moved_zeros": [0.0], "size": 10}
    figures.draw({"instrument": "flips", "run": "x", "steps": [0, 5], "layers": [layer]}, tmp_path / "flips.png")
    estimate = {"trace": -1.0, "stderr": "inf", "trace_over_loss": None, "layers": [-1.0]}
    record = {"instrument": "trace", "run": "x", "steps": [None], "sizes": [3], "arms": {"a": {"ce": [estimate]}}}
    figures.draw(record, tmp_path / "trace.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("flips", "trace"))
