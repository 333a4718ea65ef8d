"""Bad input through the command line: exit code 2, one message (expected, got, what to do), nothing on disk touched."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import SHORT, Command, Folder, Said, contents
from zsq.run import Run

Refused = Callable[..., str]


@pytest.fixture
def refused(zsq: Command, folder: Folder, tmp_path: Path) -> Refused:
    """Runs the command; checks everything that every refusal promises; gives the message."""

    def check(*arguments: object) -> str:
        before, mine = contents(tmp_path), contents(folder.path)
        said = zsq(*arguments)
        one_message(said)
        assert contents(tmp_path) == before and contents(folder.path) == mine
        return said.err

    return check


def one_message(said: Said) -> None:
    assert said.code == 2, said.err
    assert said.out == ""
    assert said.err.startswith("zsq: ") and said.err.count("zsq: ") == 1, said.err
    assert ": expected " in said.err and ", got " in said.err and "Traceback" not in said.err
    assert said.err.rstrip()[-1] in ".?)`", said.err  # it ends with a sentence or a line to type, not in the middle


# ---- words on the command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frob", "COMMAND: expected one of "),
        ("quantize nonsense", "teacher: expected a name from `zsq list teachers`"),
        ("quantize resnet20-cifar11", "Did you mean resnet20-cifar10"),
        ("quantize torchvision:", "teacher: expected a name"),
        ("quantize --recipe nonsense", "--recipe: expected one of ait, "),
        ("quantize --recipe=nonsense", "--recipe: expected one of ait"),
        ("quantize --recipe", "--recipe: expected a value, got nothing"),
        ("quantize --bits 1", "--bits: expected a whole number from 2 to 8, got 1. Choose 2 to 8."),
        ("quantize --bits 9", "--bits: expected a whole number from 2 to 8, got 9"),
        ("quantize --bits four", "--bits: expected a whole number, got 'four'. See `zsq quantize --help`."),
        ("quantize --bits 2.5", "--bits: expected a whole number, got '2.5'"),
        ("quantize --bits", "--bits: expected a value, got nothing"),
        ("quantize --bits 3 --bits 4", "--bits: expected to be given once, got more than once"),
        ("quantize --weight-bits 0", "--weight-bits: expected a whole number from 2 to 8, got 0"),
        ("quantize --act-bits 16", "--act-bits: expected a whole number from 2 to 8, got 16"),
        ("quantize --layer-bits conv", "--layer-bits: expected PATTERN=N, got 'conv'. For example"),
        ("quantize --layer-bits conv=x", "--layer-bits: expected PATTERN=N"),
        ("quantize --layer-bits conv=²", "--layer-bits: expected PATTERN=N"),
        ("quantize --layer-bits *=9", "layer_bits['*']: expected a whole number from 2 to 8, got 9"),
        (
            "quantize --layer-bits nothing=4",
            "layer_bits pattern 'nothing': expected a layer or call site, got no match",
        ),
        ("quantize --exclude nothing", "exclude pattern 'nothing'"),
        ("quantize --include nothing", "include pattern 'nothing'"),
        ("quantize --leaf nothing", "leaf pattern 'nothing'"),
        ("quantize --exclude *", "expected at least one"),
        ("quantize --placement both", "--placement: expected one of paper, deploy, got 'both'"),
        ("quantize --budget huge", "--budget: expected one of quick, standard, paper, got 'huge'"),
        ("quantize --recipe ait --fidelity exact", "--fidelity: expected one of best, paper, official, got 'exact'"),
        ("quantize --task guess", "--task: expected"),
        ("quantize --frob 3", "zsq quantize: expected options that it has, got --frob"),
        ("quantize --flip-ratee 3", "got --flip-ratee. Did you mean --flip-rate?"),
        ("quantize --recipe gdfq --flip-rate 0.1", "got --flip-rate"),
        ("quantize --recipe gdfq --base gdfq", "recipe gdfq: expected the options budget"),
        ("quantize --recipe ait --base nonsense", "--base: expected one of gdfq"),
        ("quantize digits more", "zsq quantize: expected no further argument, got 'more'"),
        ("quantize --lr much", "--lr: expected a number, got 'much'"),
        ("quantize --lr -1", "--lr: expected a number from 0, got -1.0"),
        ("quantize --lr nan", "--lr: expected a number from 0, got nan"),
        ("quantize --steps -1", "--steps: expected a number from 0, got -1"),
        ("quantize --warmup 2.5", "--warmup: expected a whole number, got '2.5'"),
        ("quantize --warmup 0", "expected at least one observed batch"),
        ("quantize --recipe ait --batch 1", "--batch: expected at least 2 images, got 1"),
        ("quantize --micro-batch 0", "--micro-batch: expected a whole number from 1, got 0"),
        ("quantize --temperature 0", "temperature: expected a number above 0"),
        ("quantize --flip-rate 2", "flip_rate: expected a share above 0, at most 1, got 2"),
        ("quantize --recipe ait --inundation much", "--inundation: expected one of exact, search, off, got 'much'"),
        ("quantize --seed -1", "--seed: expected a number from 0"),
        ("quantize --seed 99999999999999999999", "--seed: expected a number from 0"),
        ("quantize --json=3", "--json: expected no value"),
        (
            "quantize --resume",
            "run directory runs/digits-zsq-W4A4-s0: expected an interrupted run to resume, got nothing",
        ),
        ("quantize --resume --run nowhere", "run directory nowhere: expected an interrupted run"),
        ("quantize --image 3x32", "--image: expected CxHxW such as 3x32x32, got '3x32'"),
        ("quantize --image 3x0x8", "--image: expected CxHxW"),
        ("quantize --image 3x32x32x1", "--image: expected CxHxW"),
        ("quantize --image 3x32x32", "--image 3x32x32: expected an image shape that digits accepts"),
        ("quantize --image 1x10x10", "image size: expected height and width divisible by 4"),
        ("quantize --classes 7", "--classes: expected 10, the width of the output of digits, got 7"),
        ("quantize --classes 0", "--classes: expected"),
        ("quantize --mean 128 --std 64", "--mean: expected numbers from 0 to 1"),
        ("quantize --channels bgr", "--channels: expected rgb for 1-channel images"),
        ("quantize --crop 4", "--crop: expected the size of --image"),
        ("quantize --eval nonsense", "data: expected digits, shapes-segment"),
        ("quantize --eval npz:", "data: expected digits, shapes-segment"),
        ("quantize --eval npz:none.npz", "data none.npz: expected an .npz file, got no such file"),
        ("quantize --eval digits:all", "data: expected digits or digits:train"),
        ("quantize --eval cifar10:nowhere", "nowhere"),
        ("quantize --eval imagefolder:nowhere", "nowhere"),
        (
            "quantize --images none.safetensors",
            "images none.safetensors: expected a .safetensors file, got no such file",
        ),
        ("quantize --images nonsense", "data: expected digits"),
        ("quantize --images digits --eval digits", "--images digits: expected images apart from those of --eval"),
        ("quantize --recipe gdfq --images digits:train", "expected a label per image, got a source of images without"),
        ("evaluate", "SUBJECT: expected a value, got nothing"),
        ("evaluate nonsense --data digits", "teacher: expected a name"),
        ("evaluate digits", "zsq evaluate: expected --data to score 'digits' on"),
        ("evaluate digits --data nonsense", "data: expected digits"),
        ("evaluate resnet20-cifar10 --data digits", "data"),
        ("evaluate .", "expected a finished run directory"),
        ("list", "WHAT: expected a value, got nothing"),
        ("list everything", "WHAT: expected one of recipes, teachers, data, got 'everything'"),
        ("bench", "MATRIX: expected a value"),
        ("bench none.toml", "none.toml: expected a matrix file, got No such file or directory"),
    ],
)
def test_words(refused: Refused, words: str, message: str) -> None:
    assert message in refused(*words.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(refused: Refused) -> None:
    for words in (["quantize"], ["evaluate", "digits", "--data", "digits"]):
        assert "--device: expected cuda with a GPU that torch can use, got none" in refused(*words, "--device", "cuda")


# ---- weights


def test_missing_weights(refused: Refused, folder: Folder) -> None:
    teacher, _, _ = folder.teacher()
    assert "--weights: expected the trained weights of mine.py:net" in refused("quantize", teacher)
    assert "got no such file" in refused("quantize", teacher, "--weights", "none.safetensors")
    assert "got a directory" in refused("quantize", teacher, "--weights", folder.path)


def test_damaged_weights(refused: Refused, folder: Folder, tmp_path: Path) -> None:
    teacher, _, weights = folder.teacher()
    whole = Path(weights).read_bytes()
    for name, data, message in (
        ("cut", whole[:-10], "the file is truncated"),
        ("header", whole[:50], "the file is truncated"),
        ("empty", b"", "a file of another kind (0 bytes)"),
        ("text", b"these are no weights at all", "a file of another kind"),
        ("noise", whole[:8] + b"{" + b"?" * (len(whole) - 9), "damaged"),
    ):
        (tmp_path / name).write_bytes(data)
        assert message in refused("quantize", teacher, "--weights", name), name


def test_weights_of_another_network(refused: Refused, folder: Folder, tmp_path: Path) -> None:
    teacher, _, weights = folder.teacher()
    state = load_file(weights)
    save_file({**state, "8.weight": torch.zeros(6, 8)}, tmp_path / "shape.safetensors")
    save_file({key: value for key, value in state.items() if key != "8.bias"}, tmp_path / "less.safetensors")
    save_file({**state, "9.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({**state, "8.bias": torch.full((10,), float("nan"))}, tmp_path / "nan.safetensors")
    for name, message in (
        ("shape", "8.weight [10, 8] / [6, 8]"),
        ("less", "1 missing (8.bias)"),
        ("more", "1 unexpected (9.weight)"),
        ("nan", "NaN or infinity in 8.bias"),
    ):
        assert message in refused("quantize", teacher, "--weights", f"{name}.safetensors")


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_a_pickle_is_never_read(refused: Refused, folder: Folder, tmp_path: Path, protocol: int | str) -> None:
    sprung = tmp_path / "sprung"
    with (tmp_path / "weights.pth").open("wb") as file:
        if protocol == "torch":
            torch.save({"8.bias": Trap(sprung)}, file)
        else:
            pickle.dump({"8.bias": Trap(sprung)}, file, protocol=int(protocol))
    (tmp_path / "pool.safetensors").write_bytes((tmp_path / "weights.pth").read_bytes())
    teacher = folder.teacher()[0]
    said = refused("quantize", teacher, "--weights", "weights.pth")
    assert protocol == 0 or ("pickle" in said and "weights_only=True" in said and "save_file" in said)
    refused("quantize", "--images", "pool.safetensors")
    refused("quantize", "--eval", "npz:weights.pth")
    refused("evaluate", teacher, "--weights", "weights.pth", "--data", "digits")
    assert not sprung.exists()
    pickle.loads((tmp_path / "weights.pth").read_bytes()) if protocol != "torch" else sprung.touch()
    assert sprung.exists()  # the trap works


# ---- networks


@pytest.mark.parametrize("recipe", ["ait", "gdfq", "zsq", "qimera", "autorecon"])
def test_a_teacher_without_batchnorm(refused: Refused, folder: Folder, recipe: str) -> None:
    said = refused("quantize", *folder.teacher("without_norms"), "--recipe", recipe)
    assert "expected a network with BatchNorm layers" in said


@pytest.mark.parametrize("recipe", ["gdfq", "qimera", "autorecon"])
def test_a_loss_that_needs_labels(refused: Refused, recipe: str) -> None:
    said = refused("quantize", "--recipe", recipe, "--images", "noise", "--steps", "2", "--warmup", "1")
    assert "expected a label per image, got a source of images without labels" in said


def test_a_network_that_cannot_be_traced(refused: Refused, folder: Folder) -> None:
    said = refused("quantize", *folder.teacher("Branching"))
    line = (folder.path / "mine.py").read_text().splitlines().index("        if x.sum() > 0:") + 1
    assert f"mine.py, line {line}" in said and "--leaf" in said and "if x.sum() > 0:" in said
    assert "--leaf inner" in refused("quantize", *folder.teacher("Holder"))


def test_a_file_that_does_not_work(refused: Refused, tmp_path: Path, folder: Folder) -> None:
    weights = folder.teacher()[2]
    for text, message in (
        ("def net(:", "line 1"),
        ("1 / 0", "ZeroDivisionError"),
        ("def net():\n    return 3\n", "expected a torch.nn.Module as the result, got int"),
        ("def net(x):\n    return x\n", "expected a callable that works without arguments"),
        ("other = 1", "expected a callable 'net'"),
        ("from torch import nn\nnet = nn.ReLU\n", "--image: expected the input shape"),
        ("from torch import nn\nZSQ = {'image': (1, 8), }\nnet = nn.ReLU\n", "three positive whole numbers"),
        ("from torch import nn\nZSQ = {'size': 8}\nnet = nn.ReLU\n", "expected keys out of"),
    ):
        (tmp_path / "own.py").write_text(text)
        said = refused("quantize", "own.py:net", *([] if "nn" in text else ["--weights", weights]))
        assert message in said or "--weights" in said, text
    assert "no file 'none.py'" in refused("quantize", "none.py:net")


# ---- data


def npz(path: Path, **arrays: Any) -> str:
    pixels = np.zeros((20, 8, 8, 1), dtype=np.uint8)
    np.savez(path, **{"images": pixels, "labels": np.arange(20) % 10, **arrays})
    return f"npz:{path.name}"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((20, 8, 8, 1), dtype=np.float32)}, "expected images of type uint8, 0..255, got float32"),
        ({"images": np.zeros((20, 9, 9, 1), dtype=np.uint8)}, "8"),
        ({"images": np.zeros((20, 8, 8, 3), dtype=np.uint8)}, "8"),
        ({"images": np.zeros((20, 1, 8, 8), dtype=np.uint8)}, "8"),
        ({"labels": np.arange(20)}, "expected labels from 0 to 9, the classes of digits, got 0 to 19"),
        ({"labels": np.arange(20) % 10 - 1}, "got -1 to 8"),
        ({"labels": np.arange(19) % 10}, "expected 20 labels, one per image, got 19"),
        ({"labels": np.zeros(20)}, "expected labels of type int64"),
        ({"labels": np.array([None] * 20)}, "pickled objects are never read"),
    ],
)
def test_arrays_that_do_not_fit(refused: Refused, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    data = npz(tmp_path / "set.npz", **arrays)
    assert message in refused("quantize", "--eval", data)
    assert message in refused("evaluate", "digits", "--data", data)


def test_keys_and_slices(refused: Refused, tmp_path: Path) -> None:
    np.savez(tmp_path / "keys.npz", x=np.zeros(3), y=np.zeros(3))
    assert "expected the keys images and labels, got x, y" in refused("quantize", "--eval", "npz:keys.npz")
    assert "expected the keys images, got x, y" in refused("quantize", "--images", "npz:keys.npz")
    data = npz(tmp_path / "set.npz")
    assert "got an empty one" in refused("quantize", "--eval", f"{data}[20:]")
    assert "whole numbers a and b" in refused("quantize", "--eval", f"{data}[a:b]")
    assert "at least 8 images" in refused("quantize", "--images", f"{data}[:7]")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:-30])
    assert "expected an .npz file of plain arrays" in refused("quantize", "--eval", "npz:cut.npz")


def test_real_images_without_a_known_normalisation(refused: Refused, folder: Folder, tmp_path: Path) -> None:
    source = (folder.path / "mine.py").read_text().replace(', "mean": 0.305, "std": 0.376', "")
    (tmp_path / "own.py").write_text(source)
    said = refused("quantize", "own.py:net", *folder.teacher()[1:], "--eval", "digits")
    assert "--mean and --std: expected the normalisation the network was trained with" in said


def test_the_wrong_number_of_classes(refused: Refused, folder: Folder) -> None:
    six = folder.teacher("six_classes")
    assert "expected a network with 10 classes, got 6" in refused("quantize", *six, "--eval", "digits")
    assert "--classes: expected 6" in refused("quantize", *six, "--classes", "10")


def test_a_pool_for_another_teacher(refused: Refused, tmp_path: Path) -> None:
    save_file({"images": torch.zeros(64, 3, 32, 32)}, tmp_path / "pool.safetensors")
    assert "shape [n, 1, 8, 8], got torch.float32" in refused("quantize", "--images", "pool.safetensors")


# ---- run directories


@pytest.fixture
def command(folder: Folder) -> list[str]:
    return ["quantize", *folder.teacher(), "--run", "run", "--json", *SHORT]


def interrupt(zsq: Command, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `run` unfinished, with checkpoints."""
    with monkeypatch.context() as patch:
        patch.setattr("zsq.pipeline.label_free", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert zsq(*command).code == 130
    assert len(list(Path("run/checkpoint").iterdir())) == 2


def test_a_directory_of_another_configuration(
    refused: Refused, zsq: Command, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(zsq, command, monkeypatch)
    assert "expected a directory without checkpoints" in refused(*command)
    for more, words in (
        (["--bits", "3"], "spec.act_bits=4, spec.weight_bits=4), got spec.act_bits=3, spec.weight_bits=3"),
        (["--seed", "1"], "(seed=0), got seed=1"),
        (["--lr", "0.5"], "got options.lr=0.5"),
        (["--recipe", "gdfq"], "recipe=gdfq"),
        (["--fidelity", "paper"], "options.fidelity=paper"),
    ):
        for resume in ([], ["--resume"]):
            named = [word for word in command if more[0] != "--recipe" or word not in ("--recipe", "ait")]
            said = refused(*named, *more, *resume)
            assert "the configuration it was begun with" in said and words in said
    assert zsq(*command, "--resume").code == 0
    assert "finished one" in refused(*command)


def test_a_directory_of_something_else(refused: Refused, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"mine": 1}')
    assert "the config.json of something else" in refused(*command)
    (tmp_path / "run" / "config.json").write_text("{")
    assert "expected a JSON file, got damaged text" in refused(*command)
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "summary.json without a config.json" in refused(*command)


def test_a_directory_in_use(zsq: Command, command: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    code = f"from zsq.run import Run\nwith Run({path!r}, progress=False):\n    print(1, flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = contents(tmp_path)
        said = zsq(*command)
        one_message(said)
        assert f"got one in use by process {other.pid}. Wait until it ends" in said.err
        assert contents(tmp_path) == before
        other.communicate(b"\n")


def test_a_directory_that_cannot_be_written(refused: Refused, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    command[command.index("run")] = "file/run"
    assert "run directory file/run: expected a directory that can be written, got not a directory" in refused(*command)
    if os.geteuid() == 0:  # whom permissions do not stop
        return
    (tmp_path / "locked").mkdir(mode=0o500)
    command[command.index("file/run")] = "locked/run"
    assert "got permission denied" in refused(*command)


def test_a_full_disk(zsq: Command, command: list[str], finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written, room = os.write, [0], [0]

    def full(descriptor: int, data: Any) -> int:
        written[0] += len(data) > 1000
        if written[0] > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    ends = []
    for files in range(0, 12, 2):
        written[0], room[0] = 0, files
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            said = zsq(*command, *(["--resume"] if Path("run/config.json").exists() else []))
        ends.append(said.code)
        if said.code == 0:
            break
        message = said.err[said.err.index("zsq: ") :]  # behind the progress
        one_message(said._replace(err=message))
        assert "no space left on device" in said.err and "Make room" in said.err and "--resume" in said.err
        assert not list(Path("run").rglob(".*.tmp")) and not Path("run/summary.json").exists()
    assert len(ends) > 2 and set(ends[:-1]) == {2}
    if ends[-1] != 0:
        assert zsq(*command, "--resume").code == 0
    assert Path("run/student.safetensors").read_bytes() == (finished_run / "student.safetensors").read_bytes()


@pytest.mark.slow
def test_a_file_size_limit(folder: Folder, tmp_path: Path) -> None:
    """The same with a limit of the system: the process may write no file above 100 kB."""
    command = [sys.executable, "-m", "zsq", "quantize", *folder.teacher(), "--run", str(tmp_path / "run"), *SHORT]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    message = done.stderr[done.stderr.index("zsq: ") :]
    one_message(Said(done.returncode, done.stdout, message))
    assert "file too large" in message and not list((tmp_path / "run").rglob("*.tmp"))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- finished runs


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{}"),
        ("config.json", '{"config": {"teacher": {}}}'),
        ("config.json", '{"config": {"teacher": 3}}'),
        ("config.json", None),
        ("summary.json", None),
        ("summary.json", "{"),
        ("student.json", None),
        ("student.json", "{}"),
        ("student.json", '{"spec": {"bits": 3}}'),
        ("student.safetensors", None),
        ("student.safetensors", "no tensors"),
        ("images.safetensors", None),
    ],
)
def test_a_run_with_a_damaged_file(refused: Refused, run_copy: Path, name: str, text: str | None) -> None:
    if text is None:
        (run_copy / name).unlink()
    else:
        (run_copy / name).write_text(text)
    refused("evaluate", run_copy)


def test_a_run_whose_teacher_is_another(refused: Refused, run_copy: Path, folder: Folder, tmp_path: Path) -> None:
    state = load_file(folder.teacher()[2])
    save_file({**state, "8.bias": state["8.bias"] + 1}, tmp_path / "other.safetensors")
    record = json.loads((run_copy / "config.json").read_text())
    record["config"]["teacher"]["weights"] = str(tmp_path / "other.safetensors")
    (run_copy / "config.json").write_text(json.dumps(record))
    assert "expected the teacher it was made from" in refused("evaluate", run_copy)


def test_a_run_knows_its_teacher(refused: Refused, run_copy: Path, folder: Folder) -> None:
    said = refused("evaluate", run_copy, *folder.teacher()[1:])
    assert "expected no facts of a network" in said and "got --weights" in said
    assert "got --leaf, --mean" in refused("evaluate", run_copy, "--mean", 0.5, "--leaf", "x")


def test_an_unfinished_run(refused: Refused, zsq: Command, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(zsq, command, monkeypatch)
    assert "--resume" in refused("evaluate", "run")


def test_data_that_does_not_fit_a_run(refused: Refused, run_copy: Path, tmp_path: Path) -> None:
    refused("evaluate", run_copy, "--data", "nonsense")
    refused("evaluate", run_copy, "--data", npz(tmp_path / "set.npz", labels=np.arange(20)))


def test_a_loss_that_is_not_finite_is_a_failed_run(zsq: Command, command: list[str]) -> None:
    said = zsq(*command, "--lr", "1e30", "--inundation", "off", "--kl-reduction", "batchmean")
    assert said.code == 1 and "finite" in said.err and "Traceback" not in said.err


def test_a_refusal_leaves_the_library_usable(refused: Refused, zsq: Command) -> None:
    refused("quantize", "--recipe", "nonsense")
    assert zsq("quantize", "--help").code == 0
    Run(None, progress=False).close()
