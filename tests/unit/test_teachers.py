"""Teachers by name and from files: facts, weights, everything that can be wrong with them."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import Shared
from zsq.errors import BadInput
from zsq.teachers import EMBEDDED, FOLDER, Teacher, load_teacher, make_teacher, teacher_names
from zsq.teachers.facts import Facts, fit_together, read_facts
from zsq.teachers.weight_files import fingerprint, flush_denormals, load_weights

NET = """
from torch import nn

ZSQ = {"classes": 4, "image": (3, 8, 8), "mean": (0.5,), "std": (0.25, 0.25, 0.5)}


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def broken():
    width = 1
    raise RuntimeError("no such layer")


def needs_argument(width):
    return nn.Linear(width, 2)


def number():
    return 3


constant = 3
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's file beside the weights of its network `small`."""
    (tmp_path / "mine.py").write_text(NET)
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    return tmp_path


def load(user: Path, **facts: Any) -> Teacher:
    return load_teacher(f"{user / 'mine.py'}:small", weights=user / "mine.safetensors", **facts)


def rewrite(user: Path, change: dict[str, Tensor | None]) -> None:
    """Change tensors of the weights file; None removes one."""
    state = load_file(user / "mine.safetensors") | change
    save_file({key: value for key, value in state.items() if value is not None}, user / "mine.safetensors")


# ---- what is loaded


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_teachers_are_frozen_and_complete(name: str) -> None:
    teacher = load_teacher(name)
    assert not [m for m in teacher.net.modules() if m.training]
    assert not [p for p in teacher.net.parameters() if p.requires_grad]
    logits = teacher.outputs.parts(teacher.net(torch.zeros(2, *teacher.image)))["class"]
    assert teacher.task == EMBEDDED[name].facts.task and logits.shape[:2] == (2, teacher.classes)
    assert teacher.mean is not None and len(teacher.mean) == teacher.image[0]
    assert re.fullmatch("[0-9a-f]{64}", teacher.fingerprint)
    with pytest.raises(AttributeError):
        teacher.classes = 3  # type: ignore[misc]


def test_names_are_listed_with_what_they_reach() -> None:
    names = teacher_names()
    assert {"digits", "resnet20-cifar10", "resnet20-cifar100", "timm:NAME", "FILE.py:CALLABLE"} <= set(names)
    assert all("%" in names[name] for name in EMBEDDED)


def test_normalise_is_what_training_used() -> None:
    teacher = load_teacher("resnet20-cifar10")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    x = teacher.normalise(pixels)
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous()
    expected = (pixels[1, 5, 7, 2].item() / 255 - 0.4465) / 0.2010
    assert x[1, 2, 5, 7].item() == pytest.approx(expected, rel=1e-5)


def test_bgr_reverses_the_channels_and_not_the_mean(user: Path) -> None:
    teacher = load(user, channels="bgr", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    pixels[..., 0] = 255  # red comes last in BGR
    assert teacher.normalise(pixels)[0, :, 0, 0].tolist() == pytest.approx([-0.1, -0.2, 0.7])


def test_a_users_file(user: Path) -> None:
    teacher = load(user)
    assert (teacher.name, teacher.classes, teacher.image) == ("mine.py:small", 4, (3, 8, 8))
    assert teacher.mean == (0.5, 0.5, 0.5) and teacher.std == (0.25, 0.25, 0.5)
    assert torch.equal(teacher.net[0].weight, load_file(user / "mine.safetensors")["0.weight"])
    assert load(user, image=[3, 9, 9], mean=0.25).image == (3, 9, 9)  # an argument wins over ZSQ
    assert load(user, mean=0.25).mean == (0.25,) * 3


def test_classes_are_read_off_the_output(user: Path) -> None:
    (user / "mine.py").write_text(NET.replace('"classes": 4, ', ""))
    assert load(user).classes == 4


def test_a_file_can_import_its_neighbours(user: Path) -> None:
    (user / "zsq_neighbour.py").write_text(NET)
    (user / "other.py").write_text("from zsq_neighbour import ZSQ, small\n")
    teacher = load_teacher(f"{user / 'other.py'}:small", weights=user / "mine.safetensors")
    assert teacher.classes == 4 and str(user) not in sys.path


def test_weights_replace_those_of_an_embedded_teacher(tmp_path: Path) -> None:
    state = {key: value * 1 for key, value in load_file(FOLDER / "digits.safetensors").items()}
    state["output.bias"] += 1
    save_file(state, tmp_path / "better.safetensors")
    teacher = load_teacher("digits", weights=tmp_path / "better.safetensors")
    assert teacher.fingerprint != load_teacher("digits").fingerprint


def test_counters_may_be_absent_or_extra(user: Path) -> None:
    whole = load(user).fingerprint
    rewrite(user, {"1.num_batches_tracked": None})
    assert load(user).fingerprint == whole
    rewrite(user, {"1.num_batches_tracked": torch.tensor(7), "9.num_batches_tracked": torch.tensor(1)})
    assert load(user).fingerprint == whole


def test_a_shared_tensor_may_have_either_name(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(
        "from torch import nn\nZSQ = {'image': (1, 2, 2)}\nclass Tied(nn.Module):\n def __init__(s):\n"
        "  super().__init__(); s.a = nn.Linear(4, 4); s.b = s.a\n def forward(s, x): return s.b(s.a(x.flatten(1)))\n"
    )
    save_file({"b.weight": torch.eye(4), "b.bias": torch.zeros(4)}, tmp_path / "tied.safetensors")
    teacher = load_teacher(f"{tmp_path / 'tied.py'}:Tied", weights=tmp_path / "tied.safetensors")
    assert torch.equal(teacher.net.a.weight, torch.eye(4))


def test_fingerprint_sees_names_shapes_and_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6))
    first = fingerprint(net)
    assert fingerprint(net.float()) == first
    with torch.no_grad():
        net[0].weight[0, 0].add_(1e-7)
    second = fingerprint(net)
    reshaped = nn.Sequential(nn.Linear(6, 2, bias=False))
    assert len({first, second, fingerprint(reshaped), fingerprint(nn.ModuleList(net))}) == 3  # same names: same print


def test_denormal_arithmetic_is_switched_off_only_where_it_matters() -> None:
    net = nn.Linear(100, 100)
    try:
        assert not flush_denormals(net)
        with torch.no_grad():
            net.weight[:50] = 1e-40
        supported = flush_denormals(net)
        assert not supported or (torch.tensor([1e-40]) + 0).item() == 0
    finally:
        torch.set_flush_denormal(False)


# ---- bad names and files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "Did you mean digits"),
        ("resnet18", "got 'resnet18'. See `zsq list teachers`"),
        ("torchvision:", "got 'torchvision:'"),
        ("nowhere.py:net", "expected an existing file .*, got no file 'nowhere.py'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_teacher(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("large", "expected a callable 'large' in mine.py, got nothing of that name. It defines: small, broken"),
        ("constant", "expected a callable 'constant' in mine.py, got int"),
        ("broken", r"got RuntimeError: no such layer \(mine.py, line 14\)"),
        ("needs_argument", "expected a callable that works without arguments, got TypeError"),
        ("number", "expected a torch.nn.Module as the result, got int"),
    ],
)
def test_callables(user: Path, function: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_teacher(f"{user / 'mine.py'}:{function}", weights=user / "mine.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = (\n", r"got SyntaxError: .*line 2"),
        ("x = 1\nraise KeyError('k')\n", r"got KeyError: 'k' \(bad.py, line 2\)"),
        ("import zsq_no_such_package\n", r"got ModuleNotFoundError: .*\(bad.py, line 1\)"),
        ("ZSQ = 3\nfrom torch.nn import ReLU as net\n", "bad.py: ZSQ: expected a dictionary, got int"),
        ("ZSQ = {'size': 3}\nfrom torch.nn import ReLU as net\n", "bad.py: ZSQ: expected keys out of .*, got size"),
        ("ZSQ = {'image': (3, 8)}\nfrom torch.nn import ReLU as net\n", r"ZSQ\['image'\]: expected three positive"),
    ],
)
def test_files_that_do_not_work(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_teacher(f"{tmp_path / 'bad.py'}:net", weights="any")


def test_a_users_network_needs_weights_and_a_shape(user: Path) -> None:
    with pytest.raises(BadInput, match=r"--weights: expected the trained weights of mine.py:small"):
        load_teacher(f"{user / 'mine.py'}:small")
    (user / "mine.py").write_text(NET.replace('"image": (3, 8, 8), ', ""))
    with pytest.raises(BadInput, match=r"--image: expected the input shape of mine.py:small, got nothing"):
        load(user)


def test_the_normalisation_is_asked_for_when_pixels_come(user: Path) -> None:
    (user / "mine.py").write_text(NET.replace('"mean": (0.5,), "std": (0.25, 0.25, 0.5)', ""))
    teacher = load(user)
    with pytest.raises(BadInput, match="--mean and --std: expected the normalisation"):
        teacher.normalise(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    for wrong in (torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 1, dtype=torch.uint8)):
        with pytest.raises(BadInput, match="expected uint8 of shape"):
            teacher.normalise(wrong)


# ---- bad facts


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"task": "sing"}, "--task: expected classify or segment or detect, got 'sing'"),
        ({"channels": "gbr"}, "--channels: expected rgb or bgr"),
        ({"classes": 1}, "--classes: expected a whole number of at least 2"),
        ({"classes": 4.0}, "--classes: expected a whole number"),
        ({"resize": 0}, "--resize: expected a whole number of at least 1"),
        ({"image": "3x8x8"}, "--image: expected three positive whole numbers"),
        ({"image": (3, 0, 8)}, "--image: expected three positive whole numbers"),
        ({"mean": (105.7, 103.3, 99.6)}, "--mean: expected numbers from 0 to 1 .* Divide values for pixels in 0..255"),
        ({"mean": ()}, "--mean: expected numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "--std: expected numbers"),
        ({"std": float("nan")}, "--std: expected numbers"),
    ],
)
def test_facts_one_by_one(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_facts(facts)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (Facts(mean=(0.5, 0.5), std=(0.5,)), r"--mean: expected 3 numbers \(or one\)"),
        (Facts(mean=(0.5,)), "--std: expected to be given together with --mean"),
        (Facts(std=(0.5,)), "--mean: expected to be given together with --std"),
        (Facts(crop=7), "--crop: expected the size of --image, 8x8, got 7x7"),
        (Facts(crop=8, resize=6), "--resize: expected at least the crop, 8, got 6"),
    ],
)
def test_facts_that_contradict_each_other(facts: Facts, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fit_together(facts, (3, 8, 8))


def test_one_channel_has_no_order() -> None:
    with pytest.raises(BadInput, match="--channels: expected rgb for 1-channel images"):
        fit_together(Facts(channels="bgr"), (1, 8, 8))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"image": (1, 8, 8), "mean": 0.5, "std": 0.5},
            "--image 1x8x8: expected an image shape that mine.py:small accepts",
        ),
        ({"image": (3, 2, 2)}, "--image 3x2x2: expected an image shape"),
        ({"classes": 5}, "--classes: expected 4, the width of the output of mine.py:small, got 5"),
    ],
)
def test_facts_that_the_network_refuses(user: Path, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(user, **facts)


def test_image_shape_that_an_embedded_teacher_refuses() -> None:
    with pytest.raises(BadInput, match="--image 3x8x8: expected an image shape that digits accepts, got RuntimeError"):
        load_teacher("digits", image=(3, 8, 8))


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Tuple(), r"expected one tensor .* logits of shape \[batch, classes\], got a tuple"),
        (nn.Conv2d(1, 2, 1), r"expected logits .*, got shape \[2, 2, 4, 4\]"),
        (nn.Flatten(0), r"expected one tensor .*, got shape \[32\]"),
        (Undefined(), "expected finite logits for a black image"),
    ],
)
def test_outputs_that_are_no_logits(net: nn.Module, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_teacher(net, Facts(image=(1, 4, 4)), name="net")


# ---- bad weights


class Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was executed')",))


@pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "pickle"])
def test_a_pickle_is_refused_without_reading_it(user: Path, zipped: bool) -> None:
    path = user / "mine.pth"
    if zipped:
        torch.save({"w": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"w": Bomb()}))
    got = "a zip archive, as torch.save writes it" if zipped else "got a pickle"
    with pytest.raises(BadInput, match=got):
        load_teacher(f"{user / 'mine.py'}:small", weights=path)


def test_the_lines_that_convert_a_pickle_work(user: Path) -> None:
    torch.save(load_file(user / "mine.safetensors"), user / "old.pth")
    with pytest.raises(BadInput, match="weights_only=True") as caught:
        load_teacher(f"{user / 'mine.py'}:small", weights=user / "old.pth")
    lines = "\n".join(line.strip() for line in str(caught.value).splitlines()[1:])
    subprocess.run([sys.executable, "-W", "ignore", "-c", lines], cwd=user, check=True)
    converted = load_teacher(f"{user / 'mine.py'}:small", weights=user / "old.safetensors")
    assert converted.fingerprint == load(user).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a .safetensors file, got no such file"),
        (b"", r"got a file of another kind \(0 bytes\)"),
        (b"hello, these are my weights", "got a file of another kind"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00{abc}", "got a damaged one"),
        ("half", "expected [0-9]+ bytes, as its header says, got [0-9]+: the file is truncated"),
        ("header", "expected [0-9]+ bytes, as its header says, got 100: the file is truncated"),
    ],
)
def test_files_that_hold_no_weights(user: Path, content: bytes | str | None, message: str) -> None:
    whole, path = (user / "mine.safetensors").read_bytes(), user / "bad.safetensors"
    if content is not None:
        cut = {"half": whole[:-100], "header": whole[:100]}
        path.write_bytes(cut[content] if isinstance(content, str) else content)
    with pytest.raises(BadInput, match=message):
        load_teacher(f"{user / 'mine.py'}:small", weights=path)


def test_a_directory_is_no_file(user: Path) -> None:
    with pytest.raises(BadInput, match="got a directory"):
        load_teacher(f"{user / 'mine.py'}:small", weights=user)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"5.bias": None, "0.weight": None}, r"expected the 8 tensors .*2 missing \(0.weight, 5.bias\)"),
        ({"fc.weight": torch.zeros(1)}, r"1 unexpected \(fc.weight\)"),
        ({"5.weight": torch.zeros(6, 8)}, r"expected / got: 5.weight \[4, 8\] / \[6, 8\]"),
        ({"0.bias": torch.zeros(8, dtype=torch.int8)}, "expected floating point tensors, got 0.bias torch.int8"),
        (
            {"0.bias": torch.full((8,), float("nan"))},
            r"mine.safetensors: expected finite numbers, got NaN or infinity in 0.bias",
        ),
        ({"1.running_var": torch.full((8,), float("inf"))}, "got NaN or infinity in 1.running_var"),
        ({"1.running_var": torch.full((8,), -1.0)}, "expected finite logits for a black image"),
    ],
)
def test_weights_that_do_not_fit(user: Path, change: dict[str, Tensor | None], message: str) -> None:
    rewrite(user, change)
    with pytest.raises(BadInput, match=message):
        load(user)


def test_many_wrong_names_are_counted_and_a_wrapper_is_recognised(user: Path) -> None:
    state = load_file(user / "mine.safetensors")
    save_file({f"module.{key}": value for key, value in state.items()}, user / "mine.safetensors")
    with pytest.raises(BadInput, match=r"8 missing \(.* and 5 more\).*Every name starts with 'module.'"):
        load(user)


def test_nothing_is_copied_if_a_check_fails() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = fingerprint(net)
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()} | {"1.bias": torch.zeros(5)}
    with pytest.raises(BadInput, match=r"expected the network's shapes.*1.bias \[4\] / \[5\]"):
        load_weights(net, state, name="w")
    assert fingerprint(net) == before


# ---- other packages


@pytest.mark.parametrize("package", ["torchvision", "timm", "pytorchcv"])
def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [package, *(key for key in sys.modules if key.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=rf'expected package {package}.*pip install "zsq\[vision\]"'):
        load_teacher(f"{package}:resnet18")


def test_no_zoo_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, zsq.teachers; zsq.teachers.load_teacher('digits'); sys.exit(bool({'torchvision', 'timm', " \
           "'pytorchcv', 'sklearn', 'PIL'} & set(sys.modules)))"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def tiny() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))


class FakeTorchvision(ModuleType):
    """The four functions of torchvision.models that are used."""

    asked: Any = None

    def list_models(self, module: ModuleType) -> list[str]:
        return ["resnet18"]

    def get_model_weights(self, name: str) -> Any:
        prepare = SimpleNamespace(crop_size=[20], resize_size=[24], mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3])
        return SimpleNamespace(
            DEFAULT=SimpleNamespace(transforms=lambda: prepare, meta={"categories": list("abcdefg")})
        )

    def get_model(self, name: str, weights: Any) -> nn.Module:
        FakeTorchvision.asked = weights
        return tiny()


def test_torchvision_gives_network_and_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeTorchvision("torchvision.models")
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    teacher = load_teacher("torchvision:resnet18")
    assert FakeTorchvision.asked is not None
    assert (teacher.classes, teacher.image, teacher.resize, teacher.crop) == (7, (3, 20, 20), 24, 20)
    assert teacher.mean == (0.4, 0.5, 0.6) and teacher.name == "torchvision:resnet18"
    save_file({"2.weight": torch.ones(7, 3), "2.bias": torch.zeros(7)}, tmp_path / "w.safetensors")
    assert load_teacher("torchvision:resnet18", weights=tmp_path / "w.safetensors").net[2].weight.sum() == 21
    assert FakeTorchvision.asked is None  # with --weights nothing is downloaded
    with pytest.raises(BadInput, match=r"expected a network of torchvision, got 'resnet81'. Did you mean resnet18"):
        load_teacher("torchvision:resnet81")
    monkeypatch.setattr(fake, "get_model", lambda name, weights: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(BadInput, match=r"expected its weights, .*got no route. Give them as --weights"):
        load_teacher("torchvision:resnet18")


def test_timm_gives_network_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, config = (
        ModuleType("timm"),
        {"input_size": (3, 20, 20), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875},
    )

    def create(name: str, pretrained: bool) -> nn.Module:
        net = tiny()
        net.num_classes = 7
        return net

    vars(fake).update(is_model=lambda name: name == "tiny", list_models=lambda: ["tiny"], create_model=create)
    data = ModuleType("timm.data")
    vars(data).update(resolve_model_data_config=lambda net: config)
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    teacher = load_teacher("timm:tiny")
    assert (teacher.classes, teacher.image, teacher.resize, teacher.crop) == (7, (3, 20, 20), 22, 20)
    with pytest.raises(BadInput, match="Did you mean tiny"):
        load_teacher("timm:tin")


def test_pytorchcv_gives_network_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_model(name: str, pretrained: bool) -> nn.Module:
        if "cifar" not in name:
            raise ValueError(f"Unsupported model: {name}")
        net = tiny()
        net.num_classes, net.in_size = 7, (32, 32)
        return net

    provider = ModuleType("pytorchcv.model_provider")
    vars(provider).update(get_model=get_model, _models={"tiny_cifar10": None})
    monkeypatch.setitem(sys.modules, "pytorchcv", ModuleType("pytorchcv"))
    monkeypatch.setitem(sys.modules, "pytorchcv.model_provider", provider)
    teacher = load_teacher("pytorchcv:tiny_cifar10")
    assert (teacher.classes, teacher.image, teacher.mean) == (7, (3, 32, 32), (0.4914, 0.4822, 0.4465))
    with pytest.raises(BadInput, match="Did you mean tiny_cifar10"):
        load_teacher("pytorchcv:tiny_cfar10")


def test_a_package_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BadInput, match="expected package torchvision to import, got operator nms does not exist"):
        load_teacher("torchvision:resnet18")


# ---- real networks


@pytest.mark.parametrize(
    ("function", "classes"), [("cifar10_resnet20_a", 10), ("cifar100_resnet20_p", 100)], ids=["option-a", "distiller"]
)
def test_networks_of_others(shared: Shared, function: str, classes: int) -> None:
    file, weights = shared / "teachers/nets.py", shared / f"teachers/{function}.safetensors"
    teacher = load_teacher(f"{file}:{function}", weights=weights, image=(3, 32, 32))
    assert teacher.classes == classes and teacher.name == f"nets.py:{function}"
