"""`zsq bench`: the matrix, its cells, and what happens when one fails."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tiny import Command
from zsq import bench
from zsq.bench import Cell, read_matrix, rows, run_cell, run_matrix
from zsq.bench.matrix import read_look
from zsq.errors import BadInput, RunFailed

MATRIX = """
teachers = ["digits", "nets/mine.py:net"]
bits = [[4, 4], [3, 8]]
seeds = [0, 1]

[options]
budget = "quick"
eval = "digits"

[[method]]
name = "KL + GI"
recipe = "ait"

[[method]]
name = "KL"
recipe = "ait"
options = { inundation = "off", micro_batch = 4, mean = [0.5, 0.25] }
seeds = [2]
bits = [[3, 8]]
"""
SUMMARY = {"student_score": 0.5, "teacher_score": 0.75, "agreement": 0.6, "probe_agreement": 0.7, "seconds": 60.0,
           "steps": 3, "float_sites": 4, "base": "gdfq", "plan": {}, "eval_count": 599, "eval_data": {},
           "placement": "paper", "device": "cpu"}  # fmt: skip


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    (tmp_path / "matrix.toml").write_text(MATRIX)
    return tmp_path / "matrix.toml"


class FakeRuns:
    """Stands for the processes: writes what a finished run leaves behind, or fails."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.fails: set[str] = set()
        self.leaves_checkpoints: set[str] = set()

    def __call__(self, command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.environments.append(env)
        folder = Path(command[command.index("--run") + 1])
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"command": ["cli.py", *command[3:]]}))
        if folder.name in self.fails:
            (folder / "checkpoint" / "000-calibrate.safetensors").write_text("")
            return subprocess.CompletedProcess(command, 1, "", "progress\nzsq: it went wrong\n")
        score = 0.5 + 0.1 * int(command[command.index("--seed") + 1])
        (folder / "summary.json").write_text(json.dumps(SUMMARY | {"student_score": score}))
        return subprocess.CompletedProcess(command, 0, "{}", "")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(bench.subprocess, "run", fake)
    monkeypatch.setattr(bench, "commit", lambda: "abc")
    return fake


# ---- reading


def test_cells(matrix: Path) -> None:
    cells, shared = read_matrix(matrix)
    assert shared == {"budget": "quick", "eval": "digits"}
    assert [cell.name for cell in cells] == [
        "digits-KL---GI-W4A4-s0", "digits-KL---GI-W4A4-s1", "digits-KL---GI-W3A8-s0", "digits-KL---GI-W3A8-s1",
        "digits-KL-W3A8-s2",
        "nets-mine.py:net-KL---GI-W4A4-s0", "nets-mine.py:net-KL---GI-W4A4-s1", "nets-mine.py:net-KL---GI-W3A8-s0",
        "nets-mine.py:net-KL---GI-W3A8-s1", "nets-mine.py:net-KL-W3A8-s2",
    ]  # fmt: skip


def test_the_command_of_a_cell(matrix: Path, tmp_path: Path) -> None:
    cells, shared = read_matrix(matrix)
    command = cells[4].command(tmp_path / "run", shared)
    assert command[:2] == [sys.executable, "-m"] and command[3:7] == ["quantize", "digits", "--recipe", "ait"]
    text = " ".join(command)
    for part in ("--budget quick", "--eval digits", "--inundation off", "--micro-batch 4", "--mean 0.5 0.25",
                 "--weight-bits 3 --act-bits 8 --seed 2", f"--run {tmp_path / 'run'}", "--json"):  # fmt: skip
        assert part in text
    assert "--resume" not in command
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    assert "--resume" not in cells[4].command(tmp_path / "run", shared)
    (tmp_path / "run" / "checkpoint" / "000-a.safetensors").write_text("")
    assert "--resume" in cells[4].command(tmp_path / "run", shared)


def test_switches() -> None:
    command = Cell("t", "m", "ait", 4, 4, 0, {"a_b": True, "c": False}).command(Path("x"), {})
    assert "--a-b" in command and "--c" not in command


def test_a_cell_overrides_what_is_shared() -> None:
    command = Cell("t", "m", "ait", 4, 4, 0, {"budget": "paper"}).command(Path("x"), {"budget": "quick"})
    assert command[command.index("--budget") + 1] == "paper" and command.count("--budget") == 1


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "bench").glob("*.toml")), ids=lambda f: f.stem)
def test_the_matrices_of_the_project(file: Path) -> None:
    cells, _ = read_matrix(file)
    assert cells and tomllib.loads(file.read_text())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("teachers =", "teacher =", "no key 'teachers'"),
        ('teachers = ["digits", "nets/mine.py:net"]', 'teachers = "digits"', "is not a list"),
        ("seeds = [0, 1]", "", "no key 'seeds'"),
        ('recipe = "ait"\n\n', "\n", "no key 'recipe'"),
        ("bits = [[4, 4], [3, 8]]", "bits = [4, 4]", "expected teachers, bits, seeds"),
        ("bits = [[4, 4], [3, 8]]", "bits = [[4, 4, 4]]", "expected teachers, bits, seeds"),
        ("[[method]]", "[method]", "expected teachers, bits, seeds"),
        ("bits =", "bits ", "expected teachers, bits, seeds"),
        ('eval = "digits"', "", "expected a labelled set for every cell, got none for digits"),
        ('name = "KL + GI"', 'name = "KL"\nbits = [[3, 8]]\nseeds = [2]', "digits-KL-W3A8-s2 more than once"),
    ],
)
def test_a_matrix_that_cannot_be_read(matrix: Path, old: str, new: str, message: str) -> None:
    assert old in MATRIX
    matrix.write_text(MATRIX.replace(old, new, 1) if old != "[[method]]" else MATRIX.split(old)[0] + new + "\nname=1")
    with pytest.raises(BadInput) as caught:
        read_matrix(matrix)
    assert message in str(caught.value)


def test_a_matrix_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadInput, match="expected a matrix file"):
            read_matrix(path)


def test_another_teacher_and_budget(matrix: Path) -> None:
    matrix.write_text(MATRIX + '[teacher.resnet20-cifar100]\neval = "npz:other.npz"\n')
    cells, shared = read_matrix(matrix, teacher="resnet20-cifar100", budget="paper")
    assert {cell.teacher for cell in cells} == {"resnet20-cifar100"} and len(cells) == 5
    assert cells[0].name == "resnet20-cifar100-KL---GI-W4A4-s0-paper"  # not the directory of the quick run
    text = " ".join(cells[4].command(Path("x"), shared))
    assert "--eval npz:other.npz" in text and "--budget paper" in text and "--inundation off" in text
    assert len(read_matrix(matrix, teacher="digits")[0]) == 5
    with pytest.raises(BadInput, match=r'--teacher: expected one of digits, .*got .elsewhere.*\[teacher."elsewhere"\]'):
        read_matrix(matrix, teacher="elsewhere")


def test_the_study_is_an_option_away_from_the_other_teacher_and_the_published_schedule() -> None:
    file = Path(__file__).parents[2] / "bench" / "ait_study.toml"
    cells, shared = read_matrix(file)
    assert len(cells) == 30 and len({(cell.method, cell.weight_bits) for cell in cells}) == 18
    assert len(read_look(file, cells).cells) == 6
    other, paper = read_matrix(file, teacher="resnet20-cifar100", budget="paper")
    assert all("cifar100_test.npz[2000:]" in cell.asked(paper)["eval"] for cell in other) and len(other) == 30
    assert (shared["budget"], paper["budget"]) == ("quick", "paper")
    assert not {cell.name for cell in cells} & {cell.name for cell in other}


LOOK = '\n[analysis]\nwhat = ["flips", "cosine"]\nmethods = ["KL"]\nbits = [[3, 8]]\nseeds = [2]\n'


def test_what_the_instruments_look_at(matrix: Path) -> None:
    cells, _ = read_matrix(matrix)
    assert read_look(matrix, cells) == ((), [])
    matrix.write_text(MATRIX + LOOK)
    assert read_look(matrix, cells) == (("flips", "cosine"), [cells[4], cells[9]])
    matrix.write_text(MATRIX + '[analysis]\nwhat = ["trace"]')
    assert read_look(matrix, cells).cells == cells


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"cosine"', '"sine"', "expected what = [...] of cosine, trace, landscape, flips, got ['flips', 'sine']"),
        ("what", "which", "expected what = [...]"),
        ('["KL"]', '["CE"]', "expected methods = [...] of KL + GI; KL, got ['CE']"),
        ("seeds = [2]", "seeds = [3]", "expected a choice with at least one cell, got none"),
    ],
)
def test_a_look_that_cannot_be_had(matrix: Path, old: str, new: str, message: str) -> None:
    matrix.write_text(MATRIX + LOOK.replace(old, new))
    with pytest.raises(BadInput) as caught:
        read_look(matrix, read_matrix(matrix)[0])
    assert message in str(caught.value)


# ---- running


def test_every_cell_once(matrix: Path, runs: FakeRuns, tmp_path: Path) -> None:
    said: list[str] = []
    result = run_matrix(matrix, runs=tmp_path / "runs", report=said.append)
    assert len(runs.commands) == len(result["cells"]) == len(said) == 10
    assert said[0] == "digits-KL---GI-W4A4-s0: top1 50.00 %"
    assert result["matrix"] == "matrix.toml" and result["options"] == {"budget": "quick"}
    assert result["cells"][4]["method"] == "KL" and result["cells"][4]["student_score"] == 0.7
    assert [(row["teacher"], row["bits"], row["method"], row["seeds"]) for row in result["table"]][:3] == [
        ("digits", "W4A4", "KL + GI", 2), ("digits", "W3A8", "KL + GI", 2), ("digits", "W3A8", "KL", 1)
    ]  # fmt: skip
    assert str(tmp_path) not in json.dumps({key: value for key, value in result.items() if key != "cells"})
    # again: nothing is left to do
    again = run_matrix(matrix, runs=tmp_path / "runs")
    assert len(runs.commands) == 10 and again == result


def test_side_by_side_uses_one_thread_each(matrix: Path, runs: FakeRuns, tmp_path: Path) -> None:
    a = run_matrix(matrix, runs=tmp_path / "a", jobs=3)
    assert all(environment["OMP_NUM_THREADS"] == "1" for environment in runs.environments)
    assert [cell["seed"] for cell in a["cells"]][:5] == [0, 1, 0, 1, 2]  # in the order of the matrix
    with pytest.raises(BadInput, match="--jobs: expected 1 or more, got 0"):
        run_matrix(matrix, runs=tmp_path, jobs=0)


def test_a_failing_cell_stops_no_other(matrix: Path, runs: FakeRuns, tmp_path: Path) -> None:
    runs.fails = {"digits-KL---GI-W3A8-s0"}
    said: list[str] = []
    with pytest.raises(RunFailed, match=r"1 of 10 cells failed; .* ended with code 1: zsq: it went wrong"):
        run_matrix(matrix, runs=tmp_path / "runs", report=said.append)
    assert len(runs.commands) == 10 and "it went wrong" in said[2]
    runs.fails = set()
    result = run_matrix(matrix, runs=tmp_path / "runs")
    assert len(runs.commands) == 11 and "--resume" in runs.commands[-1]
    assert len(result["cells"]) == 10


def test_a_cell_of_another_matrix_is_not_read(matrix: Path, runs: FakeRuns, tmp_path: Path) -> None:
    cells, shared = read_matrix(matrix)
    run_cell(cells[0], tmp_path / "cell", shared, None)
    with pytest.raises(RunFailed, match=r"expected the options of the matrix, got others of --budget, --steps in"):
        run_cell(cells[0], tmp_path / "cell", {"eval": "digits", "steps": 5}, None)
    assert run_cell(cells[0], tmp_path / "cell", {**shared, "device": "cpu"}, None)["student_score"] == 0.5
    (tmp_path / "cell" / "config.json").write_text("{}")
    with pytest.raises(RunFailed, match="Remove that directory"):
        run_cell(cells[0], tmp_path / "cell", shared, None)


def test_ctrl_c_begins_no_further_cell(matrix: Path, runs: FakeRuns, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_matrix(matrix, runs=tmp_path / "runs", report=stop)
    assert len(runs.commands) < 10


def test_mean_and_deviation() -> None:
    cells = [{**SUMMARY, "teacher": "t", "method": "m", "weight_bits": 4, "act_bits": 3, "student_score": score}
             for score in (0.6, 0.7, 0.8)]  # fmt: skip
    (row,) = rows(cells)
    assert (row["bits"], row["seeds"]) == ("W4A3", 3)
    assert row["student_score"] == pytest.approx(0.7) and row["deviation"] == pytest.approx(0.1)
    assert row["drop_points"] == pytest.approx(5) and row["agreement"] == pytest.approx(0.6)
    assert next(rows(cells[:1]))["deviation"] is None


# ---- the command


def test_table_json_and_file(
    zsq: Command, matrix: Path, runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    said = zsq("bench", matrix, "--output", "out.json", "--json")
    assert said.code == 0 and said.out.count("\n") == 1
    result = json.loads(said.out)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert len(result["cells"]) == 10 and "50.00 %" in said.err
    table = zsq("bench", matrix).out
    assert "KL + GI" in table and "55.00 ± 7.07" in table and "75.00" in table


def test_the_output_is_checked_first(zsq: Command, matrix: Path, runs: FakeRuns) -> None:
    said = zsq("bench", matrix, "--output", "nowhere/out.json")
    assert said.code == 2 and "--output" in said.err and not runs.commands


# ---- cells that were measured before

TINY = """
teachers = ["digits"]
bits = [[4, 4]]
seeds = [0]

[options]
eval = "digits"
steps = 2
warmup = 2
batch = 8
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a matrix with one real cell, and its result file."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "first.toml").write_text(TINY + '[[method]]\nname = "AIT"\nrecipe = "ait"\n')
    (folder / "first.json").write_text(json.dumps(run_matrix(folder / "first.toml", runs=folder / "runs")))
    return folder


@pytest.fixture
def measured(first: Path, tmp_path: Path) -> Path:
    """A copy of the result file, beside its matrix."""
    for name in ("first.toml", "first.json"):
        (tmp_path / name).write_text((first / name).read_text())
    return tmp_path / "first.json"


def test_reuse_goes_by_what_a_cell_is(measured: Path, runs: FakeRuns, tmp_path: Path) -> None:
    (tmp_path / "second.toml").write_text(
        TINY + '[[method]]\nname = "the same"\nrecipe = "ait"\noptions = { base = "gdfq", temperature = 20.0 }\n'
        '[[method]]\nname = "AIT"\nrecipe = "ait"\noptions = { inundation = "off" }\n'
        '[[method]]\nname = "other layers"\nrecipe = "ait"\noptions = { layer_bits = ["*=8"] }\n'
        '[[method]]\nname = "other weights"\nrecipe = "gdfq"\n'
        '[[method]]\nname = "in parts"\nrecipe = "ait"\noptions = { micro_batch = 4 }\n'
    )
    old = json.loads(measured.read_text())
    old["commit"] = "old"
    del old["cells"][0]["commit"], old["cells"][0]["asked"], old["cells"][0]["recipe"]  # as files were before
    measured.write_text(json.dumps(old))
    said: list[str] = []
    result = run_matrix(tmp_path / "second.toml", runs=tmp_path / "runs", reuse=[measured], report=said.append)
    taken = result["cells"][0]
    assert [Path(c[c.index("--run") + 1]).name for c in runs.commands] == [
        "digits-AIT-W4A4-s0", "digits-other-layers-W4A4-s0", "digits-other-weights-W4A4-s0", "digits-in-parts-W4A4-s0",
    ]  # fmt: skip
    assert taken["method"] == "the same" and taken["student_score"] == old["cells"][0]["student_score"]
    assert (taken["commit"], result["cells"][1]["commit"], taken["taken_from"]) == ("old", "abc", "first.json")
    assert "taken from first.json" in said[0]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"placement": "deploy"}, {"eval_data": {"name": "digits", "sha256": "0"}}, {"float_sites": 1},
     {"recipe": "zsq"}, {"fidelity": "paper"}, {"asked": {"layer_bits": ["*=8"]}}, {"base": "qimera"}],
)  # fmt: skip
def test_no_reuse_of_a_cell_that_differs(measured: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    from zsq.bench.reuse import Measured

    cells, shared = read_matrix(tmp_path / "first.toml")
    record = Measured([measured]).find(cells[0], shared)
    assert record is not None and record["taken_from"] == "first.json"
    result = json.loads(measured.read_text())
    result["cells"][0] |= change
    measured.write_text(json.dumps(result))
    assert Measured([measured]).find(cells[0], shared) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"commit": "a", "versions": {}, "cells": [{}]}', None])
def test_reuse_of_something_else(zsq: Command, matrix: Path, runs: FakeRuns, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "old.json").write_text(text)
    said = zsq("bench", matrix, "--reuse", tmp_path / "old.json")
    assert said.code == 2 and "expected a result file of `zsq bench`" in said.err and not runs.commands


# ---- what the instruments say


def test_the_instruments_on_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(
        TINY + '[[method]]\nname = "GDFQ, KL+GI"\nrecipe = "ait"\n'
        '[[method]]\nname = "GDFQ, KL only"\nrecipe = "ait"\noptions = { inundation = "off" }\n'
        '[analysis]\nwhat = ["flips", "cosine", "trace", "landscape"]\n'
    )
    from zsq import analysis

    monkeypatch.setitem(analysis.PRESETS, "quick", analysis.Effort(8, 4, 2, 2, 3, 2))
    result = run_matrix(tmp_path / "tiny.toml", runs=tmp_path / "runs", figures=tmp_path / "out", jobs=2)
    record = json.loads((tmp_path / "out_analysis.json").read_text())
    assert [row["method"] for row in result["analysis"]] == ["GDFQ, KL+GI", "GDFQ, KL only"]
    assert record["table"] == json.loads(json.dumps(result["analysis"]))
    layers = record["cells"][0]["flips"]["layers"]
    share = sum(x["size"] * x["own_grid"][0] for x in layers) / sum(x["size"] for x in layers)
    row = result["analysis"][0]
    assert row["flips_early"] == pytest.approx(share) and row["flips_early_least"] <= share <= row["flips_early_most"]
    assert set(row["trace"]) == {"ce", "kl_as_trained", "kl_batchmean", "kl_t1"}
    assert all(-1 <= value <= 1 for value in row["cosine"].values()) and len(row["cosine"]) == 4
    for name in ("flips", "cosine", "trace", "landscape"):
        assert (tmp_path / f"out_{name}.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "runs" / "digits-GDFQ--KL-GI-W4A4-s0" / "analysis" / "flips.json").stat().st_mtime_ns
    again = run_matrix(tmp_path / "tiny.toml", runs=tmp_path / "runs", figures=tmp_path / "out")
    assert again["analysis"] == result["analysis"]  # read, not measured again
    assert (tmp_path / "runs" / "digits-GDFQ--KL-GI-W4A4-s0" / "analysis" / "flips.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_real_cells(zsq: Command, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        'teachers = ["digits"]\nbits = [[4, 4]]\nseeds = [0]\n'
        '[options]\neval = "digits"\nsteps = 2\nwarmup = 2\nbatch = 8\n'
        '[[method]]\nname = "GI"\nrecipe = "ait"\n'
        '[[method]]\nname = "off"\nrecipe = "ait"\noptions = { inundation = "off", layer_bits = ["*=8"] }\n'
    )
    said = zsq("bench", "tiny.toml", "--json", "--jobs", 2)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert [row["method"] for row in result["table"]] == ["GI", "off"]
    assert all(cell["eval_count"] == 599 and cell["steps"] == 2 for cell in result["cells"])
    assert Path("runs/bench/digits-off-W4A4-s0/student.safetensors").exists()
    again = zsq("bench", "tiny.toml", "--json", "--jobs", 2)
    assert json.loads(again.out)["cells"] == result["cells"]


def test_only_some_cells(matrix: Path, runs: FakeRuns, tmp_path: Path, zsq: Command) -> None:
    result = run_matrix(matrix, runs=tmp_path / "runs", only=["digits-KL---GI-W4A4-*", "*-W3A8-s2"])
    names = [command[command.index("--run") + 1].rpartition("/")[2] for command in runs.commands]
    assert names == ["digits-KL---GI-W4A4-s0", "digits-KL---GI-W4A4-s1", "digits-KL-W3A8-s2",
                     "nets-mine.py:net-KL-W3A8-s2"]  # fmt: skip
    assert len(result["cells"]) == 4 and "analysis" not in result
    said = zsq("bench", matrix, "--only", "*-s9")
    assert said.code == 2 and "--only: expected patterns of cells, got '*-s9', which matches none" in said.err
    assert "named like digits-KL---GI-W4A4-s0" in " ".join(said.err.split())


def test_instruments_look_at_what_is_left(matrix: Path, runs: FakeRuns, tmp_path: Path, monkeypatch: Any) -> None:
    matrix.write_text(matrix.read_text().replace("[options]", '[analysis]\nwhat = ["flips"]\n\n[options]', 1))
    seen: list[Any] = []
    monkeypatch.setattr("zsq.bench.study.study", lambda look, *rest: seen.append(look))
    run_matrix(matrix, runs=tmp_path / "runs", only=["digits-KL-*"])
    assert [cell.name for cell in seen[0].cells] == ["digits-KL---GI-W4A4-s0", "digits-KL---GI-W4A4-s1",
                                                     "digits-KL---GI-W3A8-s0", "digits-KL---GI-W3A8-s1",
                                                     "digits-KL-W3A8-s2"]  # fmt: skip


def test_a_label_in_place_of_a_users_network(matrix: Path) -> None:
    """The facts of a network stand in its table, once for all methods; a method's own option goes before them."""
    matrix.write_text(
        MATRIX.replace('"nets/mine.py:net"', '"mine"')
        + '[teacher.mine]\nsource = "nets/mine.py:net"\ntask = "segment"\nsynthetic = "8x8"\n'
        + "std = [0.1]\nmean = [0.0]\n"
    )
    cells, shared = read_matrix(matrix)
    assert cells[9].name == "mine-KL-W3A8-s2"
    command = cells[9].command(Path("x"), shared)
    assert command[3:5] == ["quantize", "nets/mine.py:net"] and "--source" not in command
    text = " ".join(command)
    assert "--task segment" in text and "--synthetic 8x8" in text and "--mean 0.5 0.25" in text and "--std 0.1" in text
    assert cells[0].command(Path("x"), shared)[4] == "digits"


def test_rows_say_what_was_measured() -> None:
    cell = SUMMARY | {"teacher": "t", "method": "m", "weight_bits": 4, "act_bits": 8}
    assert [row["metric"] for row in rows([cell | {"metric": "miou"}, cell | {"method": "n"}])] == ["miou", "top1"]
