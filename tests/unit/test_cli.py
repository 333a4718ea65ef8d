"""The command `zsq`: what it prints, writes and gives back. (What it refuses is in test_bad_input.py.)"""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny import SHORT, Command, Folder, contents
from zsq import recipes
from zsq.checkpoint import load_tree
from zsq.options import COMMON
from zsq.run import Run

SUMMARY = {
    "teacher", "recipe", "base", "weight_bits", "act_bits", "placement", "fidelity", "seed", "steps", "seconds",
    "device", "agreement", "agreement_inputs", "probe_agreement", "float_sites", "quantized_weights",
    "activation_sites", "checkpoint",
}  # fmt: skip
SCORES = {"metric", "teacher_score", "student_score", "eval_data", "eval_count"}


def write_npz(path: Path, count: int = 40) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(count) % 10)
    return path


# ---- quantize


def test_a_users_network_end_to_end(zsq: Command, folder: Folder, tmp_path: Path) -> None:
    said = zsq("quantize", *folder.teacher(), "--json", "--eval", "digits", "--bits", 3, *SHORT)
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    path = tmp_path / "runs" / "mine.py-net-ait-W3A3-s0"
    assert json.loads((path / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY | SCORES
    assert summary["teacher"] == "mine.py:net" and (summary["weight_bits"], summary["act_bits"]) == (3, 3)
    assert (summary["metric"], summary["eval_count"]) == ("top1", 599)
    assert summary["eval_data"]["name"] == "digits" and len(summary["eval_data"]["sha256"]) == 64
    assert str(tmp_path) not in said.out
    names = {"config.json", "metrics.jsonl", "student.safetensors", "student.json", "images.safetensors"}
    names.add("labelled.safetensors")  # it was scored
    assert {file.name for file in path.iterdir()} == names | {"summary.json", "checkpoint", "history"}
    config = json.loads((path / "config.json").read_text())
    parameters = inspect.signature(recipes.load("ait")).parameters
    # without those that follow the fidelity
    assert config["config"]["options"].keys() >= {k for k, p in parameters.items() if k not in COMMON and p.default}


def test_a_table_for_people(zsq: Command, folder: Folder) -> None:
    said = zsq("quantize", *folder.teacher(), "--run", "runs/[bold]", "--eval", "digits", *SHORT)
    assert said.code == 0 and re.search(r"student score\W+\d+\.\d\d %", said.out)
    assert "[bold]" in said.out and "digits" in said.out
    assert "calibrate" in said.err and "fit" in said.err  # progress


def test_options_of_a_recipe_reach_it(zsq: Command, folder: Folder) -> None:
    own = ["--temperature", 4, "--kl-reduction", "batchmean", "--flip-rate", 0.01, "--inundation", "search"]
    said = zsq("quantize", *folder.teacher(), "--json", "--placement", "deploy", "--weight-bits", 5, "--act-bits", 6,
               "--layer-bits", "8=4", "--micro-batch", 4, "--seed", 3, *own, *SHORT)  # fmt: skip
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    plan = summary["plan"]
    assert (plan["temperature"], plan["kl_reduction"], plan["flip_rate"]) == (4, "batchmean", 0.01)
    assert (plan["inundation"], plan["warmup"], plan["batch"], plan["base"]) == ("search", 3, 8, "gdfq")
    assert (summary["weight_bits"], summary["act_bits"], summary["seed"]) == (5, 6, 3)
    assert summary["placement"] == "deploy"
    run = Path("runs/mine.py-net-ait-W5A6-s3")
    bits = {row["name"]: row["bits"] for row in json.loads((run / "student.json").read_text())["weights"]}
    assert bits["8"] == 4


@pytest.mark.parametrize("name", recipes.names())
def test_help_shows_every_option(zsq: Command, name: str) -> None:
    said = zsq("quantize", "--recipe", name, "--help")
    assert said.code == 0
    for option in {*inspect.signature(recipes.load(name)).parameters, "bits", "weights", "run", "layer-bits"}:
        if option not in ("teacher", "spec"):
            assert f"--{option.replace('_', '-')}" in said.out, option
    assert "TEACHER" in said.out


def test_the_default_recipe_is_ours(zsq: Command, folder: Folder) -> None:
    assert "--generators" in zsq("quantize", "--help").out
    short = ["--steps", 2, "--warmup", 1, "--batch", 8, "--count", 32, "--shown", 8, "--lead", 1]
    said = zsq("quantize", *folder.teacher(), "--json", *short)
    assert said.code == 0, said.err
    assert json.loads(said.out)["recipe"] == "zsq" and Path("runs/mine.py-net-zsq-W4A4-s0/pool.safetensors").exists()


def test_other_recipes_have_other_options(zsq: Command) -> None:
    assert "--flip-rate" in zsq("quantize", "--recipe=ait", "--help").out
    assert "--flip-rate" not in zsq("quantize", "--recipe=gdfq", "--help").out
    assert "--ce-weight" in zsq("quantize", "--recipe", "gdfq", "--help").out
    assert "--ce-weight" not in zsq("quantize", "--help").out


def test_a_finished_directory_is_left_as_it_is(zsq: Command, folder: Folder, run_copy: Path) -> None:
    before = contents(run_copy)
    for more in ([], ["--resume"]):
        said = zsq("quantize", *folder.teacher(), "--run", run_copy, "--json", *SHORT, *more)
        assert said.code == 2 and "finished" in said.err and said.out == ""
    assert contents(run_copy) == before


# ---- images


@pytest.mark.parametrize("recipe", recipes.names())
def test_a_saved_pool(zsq: Command, folder: Folder, finished_run: Path, recipe: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    images = load_tree(finished_run / "images.safetensors")["images"]
    save_file({"images": images, "labels": torch.arange(len(images)) % 10}, tmp_path / "pool.safetensors")
    short = SHORT[2:] if "steps" in inspect.signature(recipes.load(recipe)).parameters else SHORT[4:]
    said = zsq("quantize", *folder.teacher(), "--recipe", recipe, "--images", "pool.safetensors", "--json", *short)
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert summary["base"] == "saved images (pool.safetensors)" and "128 held-out" in summary["agreement_inputs"]


def test_images_of_a_run_feed_the_next(zsq: Command, folder: Folder, finished_run: Path) -> None:
    pool = finished_run / "images.safetensors"
    said = zsq("quantize", *folder.teacher(), "--images", pool, "--json", *SHORT)
    assert said.code == 0 and json.loads(said.out)["plan"]["batch"] == 8


def test_real_images_are_named_and_apart(zsq: Command, folder: Folder, tmp_path: Path) -> None:
    file = write_npz(tmp_path / "set.npz")
    common = ["quantize", *folder.teacher(), "--json", *SHORT]
    said = zsq(*common, "--images", f"npz:{file}[:20]", "--eval", f"npz:{file}[19:]")
    assert said.code == 2 and "images apart from those of --eval" in said.err and not Path("runs").exists()
    said = zsq(*common, "--images", f"npz:{file}[:20]", "--eval", f"npz:{file}[20:]")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert summary["base"] == "real images (set.npz[:20])" and summary["eval_data"]["name"] == "set.npz[20:]"
    # the same holds for an evaluation afterwards
    run = "runs/mine.py-net-ait-W4A4-s0"
    said = zsq("evaluate", run, "--data", f"npz:{file}[10:]")
    assert said.code == 2 and "common ones" in said.err
    assert zsq("evaluate", run, "--data", f"npz:{file}[30:]").code == 0


# ---- evaluate


def test_evaluate_a_run(zsq: Command, run_copy: Path) -> None:
    before = json.loads((run_copy / "summary.json").read_text())
    assert not SCORES & before.keys()
    said = zsq("evaluate", run_copy, "--json")
    assert said.code == 0, said.err
    agreed = json.loads(said.out)
    assert agreed.keys() == {"agreement", "agreement_inputs", "crop_agreement", "probe_agreement"}
    assert {key: before[key] for key in agreed} == agreed  # the saved student is the one that was measured
    said = zsq("evaluate", run_copy, "--data", "digits", "--json")
    assert json.loads(said.out).keys() >= SCORES
    after = json.loads((run_copy / "summary.json").read_text())
    assert after == before | agreed | json.loads(said.out)


def test_evaluate_a_teacher(zsq: Command, folder: Folder) -> None:
    said = zsq("evaluate", "digits", "--data", "digits", "--json")
    assert json.loads(said.out)["teacher_score"] > 0.98
    said = zsq("evaluate", *folder.teacher(), "--data", "digits", "--json")
    assert said.code == 0 and json.loads(said.out)["eval_count"] == 599
    table = zsq("evaluate", "digits", "--data", "digits")
    assert re.search(r"teacher score\W+99\.\d\d %", table.out) and table.err == ""


# ---- list, and the command itself


@pytest.mark.parametrize("what", ["recipes", "teachers", "data"])
def test_list(zsq: Command, what: str) -> None:
    rows = json.loads(zsq("list", what, "--json").out)[what]
    table = re.sub(r"[\s│]+", "", zsq("list", what).out)
    for row in rows:
        first = next(iter(row.values()))
        assert re.sub(r"\s+", "", first) in table
    assert "npz:FILE[a:b]" in table or what != "data"  # square brackets are no markup


def test_help_is_quick_and_version_known() -> None:
    code = (
        "import sys; from zsq.cli import main\n"
        "for line in ('--help', '--version', 'evaluate --help', 'list recipes --json', 'bench -h'):\n"
        "    main(line.split())\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("quantize", "evaluate", "list", "bench"):
        assert word in done.stdout


@pytest.mark.parametrize("entry", [["-m", "zsq"], ["-m", "zsq.cli"]])
def test_entries(entry: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *entry, "list", "data", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    assert len(json.loads(done.stdout)["data"]) > 3


# ---- stopped and resumed, in this process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [2, 5])
def test_a_signal_saves_and_gives_its_code(
    zsq: Command, folder: Folder, finished_run: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int, at: int
) -> None:
    command = ["quantize", *folder.teacher(), "--run", "run", "--json", *SHORT]
    real, logged = Run.log, [0]

    def log(run: Run, **terms: Tensor | float) -> None:
        logged[0] += run.path is not None  # not during the rehearsal
        if logged[0] == at:
            os.kill(os.getpid(), signum)
        real(run, **terms)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        said = zsq(*command)
    assert said.code == code and said.out == "" and "--resume" in said.err
    assert not Path("run/student.safetensors").exists() and not Path("run/.lock").exists()
    said = zsq(*command, "--resume")
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps"] == 3
    # one uninterrupted run of the same options: same bytes
    for name in ("student.safetensors", "images.safetensors"):
        assert Path("run", name).read_bytes() == (finished_run / name).read_bytes()
    for file in (finished_run / "history").iterdir():
        assert Path("run/history", file.name).read_bytes() == file.read_bytes()


def test_ctrl_c_outside_a_run(zsq: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zsq.catalogue.recipes", interrupt)
    said = zsq("list", "recipes")
    assert said.code == 130 and said.err == "zsq: interrupted.\n"


# ---- killed and resumed, real processes

LONG = ("--recipe", "ait", "--steps", "300", "--warmup", "50", "--batch", "8", "--json")


def start(folder: Folder, run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zsq", "quantize", *folder.teacher(), "--run", str(run), *LONG, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], sign: Path) -> None:
    """Until a file is there, or the process has ended."""
    end = time.monotonic() + 120
    while not sign.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("straight") / "run"
    process = start(folder, path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("\n") == 1 and json.loads(out)["steps"] == 300
    return path


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["checkpoint/000-calibrate.safetensors", "history/000120.safetensors"])
def test_killed_and_resumed_gives_the_same_bytes(folder: Folder, straight: Path, tmp_path: Path, sign: str) -> None:
    process = start(folder, tmp_path / "run")
    wait_for(process, tmp_path / "run" / sign)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "run" / "summary.json").exists()
    process = start(folder, tmp_path / "run", "--resume")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    for name in ("student.safetensors", "student.json", "images.safetensors", "history/000300.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process(folder: Folder, tmp_path: Path, signum: int, code: int) -> None:
    process = start(folder, tmp_path / "run")
    wait_for(process, tmp_path / "run" / "history" / "000030.safetensors")
    process.send_signal(signum)
    out, err = process.communicate(timeout=100)
    assert process.returncode == code and out == ""
    assert err.strip().splitlines()[-1].startswith(f"zsq: stopped by signal {signum}. Stage fit is saved after step")
    assert list((tmp_path / "run" / "checkpoint").glob("*-fit.safetensors"))
