"""Labelled sets: what is read, how it is preprocessed, and every way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import Shared
from zsq.data import LabelledData, check_disjoint, load_data, load_images, split_slice
from zsq.data.files import Shape, digits_split
from zsq.data.images import open_image
from zsq.errors import BadInput
from zsq.teachers import Teacher, load_teacher


def teacher(image: tuple[int, int, int] = (3, 8, 8), classes: int = 10, **facts: Any) -> Teacher:
    """A teacher whose input space is pixels in 0..1."""
    return Teacher(nn.Identity(), "test", "classify", classes, image, (0.0,) * image[0], (1.0,) * image[0], **facts)


def write_npz(path: Path, n: int = 12, **arrays: Any) -> str:
    """An npz of n images whose first pixel is their position; labels are position mod 10."""
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    whole = {"images": images, "labels": np.arange(n) % 10} | arrays
    np.savez_compressed(path, **{key: value for key, value in whole.items() if value is not None})
    return f"npz:{path}"


def positions(data: LabelledData, size: int = 5) -> list[int]:
    """First pixels, which `write_npz` made the positions in the file."""
    return [round(v) for images, _ in data.batches(size) for v in (images[:, 0, 0, 0] * 255).tolist()]


# ---- digits


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    (train, train_labels, train_at), (test, test_labels, test_at) = (
        digits_split(held_out=flag) for flag in (False, True)
    )
    assert (len(train), len(test)) == (1198, 599) and train.shape[1:] == (8, 8, 1)
    assert sorted([*train_at, *test_at]) == list(range(1797))
    shares = np.bincount(test_labels) / (np.bincount(test_labels) + np.bincount(train_labels))
    assert np.abs(shares - 1 / 3).max() < 0.01
    assert test.min() == 0 and test.max() == 255 and len(np.unique(test)) == 17
    assert hashlib.sha256(test_at.astype("<i8").tobytes()).hexdigest().startswith("188d992fe4ffbcbe")


def test_digits_as_data() -> None:
    digits = load_teacher("digits")
    data, rest = load_data("digits", digits), load_data("digits:train", digits)
    assert (data.name, data.count, rest.count) == ("digits", 599, 1198) and data.sha256 != rest.sha256
    images, labels = next(data.batches(7))
    assert images.shape == (7, 1, 8, 8) and labels.dtype == torch.int64
    everything = torch.cat([images for images, _ in data.batches()])
    assert abs(everything.mean()) < 0.05 and abs(everything.std() - 1) < 0.05
    assert torch.equal(load_images("digits", digits), everything)


def test_digits_need_their_extra_and_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="data digits: expected a network with 10 classes, got 100"):
        load_data("digits", teacher((1, 8, 8), 100))
    with pytest.raises(BadInput, match=r"data digits: expected images of shape \[n, 8, 8, 3\]"):
        load_data("digits", teacher())
    with pytest.raises(BadInput, match="expected digits or digits:train, got 'digits:test'"):
        load_data("digits:test", teacher((1, 8, 8)))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BadInput, match=r'expected package scikit-learn.*pip install "zsq\[eval\]"'):
        load_data("digits", load_teacher("digits"))


# ---- npz


def test_npz_gives_images_labels_and_provenance(tmp_path: Path) -> None:
    spec = write_npz(tmp_path / "set.npz")
    data = load_data(spec, teacher())
    assert (data.name, data.count) == ("set.npz", 12)
    assert data.sha256 == hashlib.sha256((tmp_path / "set.npz").read_bytes()).hexdigest()
    assert positions(data) == positions(data, 12) == list(range(12))  # twice: a set can be read again
    assert torch.cat([labels for _, labels in data.batches(5)]).tolist() == [*range(10), 0, 1]
    assert torch.equal(load_images(spec, teacher()), torch.cat([images for images, _ in data.batches(3)]))


bound = st.one_of(st.none(), st.integers(-15, 15))


@given(start=bound, stop=bound)
def test_slices_are_pythons(tmp_path_factory: pytest.TempPathFactory, start: int | None, stop: int | None) -> None:
    path = tmp_path_factory.getbasetemp() / "slices.npz"
    if not path.exists():
        write_npz(path)
    spec = f"npz:{path}[{'' if start is None else start}:{'' if stop is None else stop}]"
    expected = list(range(12))[start:stop]
    if expected:
        data = load_data(spec, teacher())
        assert positions(data) == expected and data.labels.tolist() == [p % 10 for p in expected]
    else:
        with pytest.raises(BadInput, match="expected a slice of its 12 images, got an empty one"):
            load_data(spec, teacher())


def test_the_slice_is_part_of_the_name(tmp_path: Path) -> None:
    spec = write_npz(tmp_path / "set.npz")
    assert load_data(f"{spec}[-2:]", teacher()).name == "set.npz[-2:]"
    assert split_slice("a[1].npz") == (Path("a[1].npz"), slice(None))
    assert split_slice("a[1].npz[ 2 : ]") == (Path("a[1].npz"), slice(2, None))


@pytest.mark.parametrize("inner", ["", "5", "a:b", "1:2:3", "1.5:", ":-"])
def test_bad_slice_text(inner: str) -> None:
    with pytest.raises(BadInput, match=r"expected FILE or FILE\[a:b\] with whole numbers a and b, got \["):
        load_data(f"npz:set.npz[{inner}]", teacher())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": None}, "expected the keys images and labels, got images"),
        ({"images": None}, "expected the keys images and labels, got labels"),
        ({"images": np.uint8(3)}, r"expected images of shape \[n, 8, 8, 3\]"),
        ({"images": np.zeros((12, 8, 8, 3), np.float32)}, "expected images of type uint8, 0..255, got float32"),
        ({"images": np.zeros((12, 8, 8), np.uint8)}, r"expected images of shape \[n, 8, 8, 3\].*got \[12, 8, 8\]"),
        ({"images": np.zeros((12, 3, 8, 8), np.uint8)}, r"expected images of shape \[n, 8, 8, 3\]"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.arange(0)}, r"got \[0, 8, 8, 3\]"),
        ({"labels": np.arange(11) % 10}, "expected 12 labels, one per image, got 11"),
        ({"labels": np.zeros((12, 10), int)}, r"expected labels of type int64 and shape \[n\], got int64 \[12, 10\]"),
        ({"labels": np.zeros(12)}, "expected labels of type int64 and shape .*got float64"),
        ({"labels": np.arange(12)}, "expected labels from 0 to 9, the classes of test, got 0 to 11"),
        ({"labels": np.arange(12) - 3}, "expected labels from 0 to 9, .*got -3 to 8"),
        ({"labels": np.array([{}] * 12)}, "expected an .npz file of plain arrays.*pickled objects are never read"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_data(write_npz(tmp_path / "set.npz", **arrays), teacher())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected an .npz file, got no such file"),
        (b"", "expected an .npz file of plain arrays"),
        (b"hello", "expected an .npz file of plain arrays"),
        (b"PK\x03\x04 not a zip", "expected an .npz file of plain arrays"),
        ("npy", "expected an .npz file of plain arrays"),
        ("cut", "expected an .npz file of plain arrays"),
        ("spoilt", "expected an .npz file of plain arrays"),
    ],
)
def test_files_that_are_no_npz(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "bad.npz"
    if content == "npy":
        np.save(tmp_path / "a.npy", np.zeros(3))
        path.write_bytes((tmp_path / "a.npy").read_bytes())
    elif isinstance(content, str):
        write_npz(path)
        whole = bytearray(path.read_bytes())
        whole[200:240] = bytes(40)
        path.write_bytes(path.read_bytes()[:-200] if content == "cut" else whole)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load_data(f"npz:{path}", teacher())


def test_images_alone_need_no_labels(tmp_path: Path) -> None:
    spec = write_npz(tmp_path / "set.npz", labels=None)
    assert load_images(f"{spec}[:4]", teacher()).shape == (4, 3, 8, 8)
    spec = write_npz(tmp_path / "odd.npz", labels=np.array([{}] * 12))  # not even opened
    assert len(load_images(spec, teacher())) == 12


@pytest.mark.parametrize("spec", ["", "npz", "npz:", "mnist", "cifar10", "tar:x", "set.npz", "imagefolder:"])
def test_unknown_forms(spec: str) -> None:
    with pytest.raises(BadInput, match=r"data: expected digits, .*npz:FILE, .*imagefolder:DIR, .*yolo:DIR, got"):
        load_data(spec, teacher())


# ---- CIFAR


@pytest.mark.parametrize(("classes", "file", "head"), [(10, "test_batch.bin", 1), (100, "test.bin", 2)])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_binary(tmp_path: Path, classes: int, file: str, head: int, inside: bool) -> None:
    folder = tmp_path / {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[classes]
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 10, (4, head + 3072), dtype=np.uint8)
    rows[:, head - 1] = [3, 1, 4, 9]
    rows[2, head + 1024 + 32 * 5 + 7] = 200  # green, row 5, column 7
    rows.tofile(folder / file)
    data = load_data(f"cifar{classes}:{folder if inside else tmp_path}", teacher((3, 32, 32), classes))
    images, labels = next(data.batches())
    assert labels.tolist() == [3, 1, 4, 9] and round(images[2, 1, 5, 7].item() * 255) == 200
    rows.reshape(-1)[:-1].tofile(folder / file)
    with pytest.raises(BadInput, match=f"expected rows of {head + 3072} bytes, got .*cut short"):
        load_data(f"cifar{classes}:{folder}", teacher((3, 32, 32), classes))


@pytest.mark.parametrize(
    ("classes", "pickled"),
    [(10, "test_batch"), (10, "cifar-10-batches-py/test_batch"), (100, "test"), (100, "cifar-100-python/test")],
)
def test_pickled_cifar_is_refused_naming_the_other(tmp_path: Path, classes: int, pickled: str) -> None:
    (tmp_path / pickled).parent.mkdir(exist_ok=True)
    (tmp_path / pickled).write_bytes(b"\x80\x02}q\x01.")
    message = f"got the pickled version, which is never read. Unpack cifar-{classes}-binary.tar.gz"
    with pytest.raises(BadInput, match=message):
        load_data(f"cifar{classes}:{tmp_path}", teacher((3, 32, 32), classes))


def test_cifar_missing_or_of_another_network(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"expected test_batch.bin of the binary version, got none there"):
        load_data(f"cifar10:{tmp_path}", teacher((3, 32, 32)))
    with pytest.raises(BadInput, match="data cifar10: expected a network with 10 classes, got 100"):
        load_data(f"cifar10:{tmp_path}", teacher((3, 32, 32), 100))


# ---- folders


def save(path: Path, pixels: np.ndarray) -> None:
    pil = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(pixels).save(path)


def flat(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_class_folders_are_sorted(tmp_path: Path) -> None:
    for name, values in (("dog", [40, 30]), ("cat", [20]), ("ant", [10])):
        for value in values:
            save(tmp_path / name / f"{value}.png", flat(value))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load_data(f"imagefolder:{tmp_path}", teacher(classes=3))
    images, labels = next(data.batches())
    assert labels.tolist() == [0, 1, 2, 2] and (images[:, 0, 0, 0] * 255).round().tolist() == [10, 20, 30, 40]
    assert data.name == f"imagefolder {tmp_path.name}"
    before = data.sha256
    save(tmp_path / "cat" / "20.png", flat(21))
    assert load_data(f"imagefolder:{tmp_path}", teacher(classes=3)).sha256 != before
    with pytest.raises(BadInput, match="expected 10 class folders, one per class of the network, got 3"):
        load_data(f"imagefolder:{tmp_path}", teacher())


def test_flat_folder_with_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", flat(1))
    save(tmp_path / "images" / "b.png", flat(2))
    (tmp_path / "labels.csv").write_text("label,file,source\n7,b.png,web\n2,a.png,web\n")
    images, labels = next(load_data(f"imagefolder:{tmp_path}", teacher()).batches())
    assert labels.tolist() == [7, 2] and (images[:, 0, 0, 0] * 255).round().tolist() == [2, 1]
    (tmp_path / "labels.csv").unlink()
    assert len(load_images(f"imagefolder:{tmp_path}", teacher())) == 2  # pixels need no labels


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,label\na.png,1\n", "expected columns file and label, got name, label"),
        ("", "expected columns file and label, got none"),
        ("file,label\na.png,1\nb.png,2\n", "line 3: expected an existing file and a class number, got 'b.png', '2'"),
        ("file,label\na.png,cat\n", "line 2: expected an existing file and a class number, got 'a.png', 'cat'"),
        ("file,label\na.png\n", "line 2: expected an existing file and a class number"),
        ("file,label\na.png,10\n", "expected labels from 0 to 9, .*got 10 to 10"),
        ("file,label\n", "expected class folders with images, or labels.csv, got neither"),
    ],
)
def test_bad_tables(tmp_path: Path, table: str, message: str) -> None:
    save(tmp_path / "a.png", flat(1))
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(BadInput, match=message):
        load_data(f"imagefolder:{tmp_path}", teacher())


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a folder, got none of that name"):
        load_data(f"imagefolder:{tmp_path / 'no'}", teacher())
    for read in (load_data, load_images):
        with pytest.raises(BadInput, match=r"expected class folders with images, or labels.csv, got neither"):
            read(f"imagefolder:{tmp_path}", teacher())


def test_the_first_unreadable_image_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "x" / f"{name}.png", flat(1))
    for name in ("b", "c"):
        (tmp_path / "x" / f"{name}.png").write_bytes((tmp_path / "x" / "a.png").read_bytes()[:40])
    data = load_data(f"imagefolder:{tmp_path}", teacher(classes=1))
    with pytest.raises(BadInput, match=r"image .*b\.png: expected a readable image"):
        list(data.batches())


def test_a_missing_pillow_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BadInput, match=r'expected package pillow.*pip install "zsq\[eval\]"'):
        load_data(f"imagefolder:{tmp_path}", teacher())


# ---- preprocessing of files


def test_resize_shorter_side_and_crop_the_centre(tmp_path: Path) -> None:
    across = np.tile(np.arange(40, dtype=np.uint8)[None, :, None] * 4, (20, 1, 3))  # 20 high, 40 wide: a ramp
    save(tmp_path / "ramp.png", across)
    whole = open_image(tmp_path / "ramp.png", Shape((3, 10, 20), resize=10))
    part = open_image(tmp_path / "ramp.png", Shape((3, 6, 6), resize=10, crop=6))
    assert torch.equal(part, whole[2:8, 7:13])
    # Halving with antialiasing: a triangle of width 4 around each centre, weights 1 3 3 1 over 8.
    at = np.arange(40.0) * 4
    by_hand = (at[1:-3] + 3 * at[2:-2] + 3 * at[3:-1] + at[4:])[::2] / 8
    assert np.abs(whole[5, 1:-1, 0].numpy() - by_hand[:18]).max() <= 1


def test_without_antialiasing_a_checkerboard_would_survive(tmp_path: Path) -> None:
    board = ((np.indices((32, 32)).sum(0) % 2) * 255).astype(np.uint8)
    save(tmp_path / "board.png", np.stack([board] * 3, -1))
    small = open_image(tmp_path / "board.png", Shape((3, 8, 8), resize=8)).float()
    assert (small - 127.5).abs().max() < 8


def test_colour_follows_the_network(tmp_path: Path) -> None:
    red = flat(0)
    red[..., 0] = 255
    save(tmp_path / "x" / "red.png", red)
    grey = open_image(tmp_path / "x" / "red.png", Shape((1, 8, 8)))
    assert grey.shape == (8, 8, 1) and grey.unique().tolist() == [76]  # 0.299 of 255
    data = load_data(f"imagefolder:{tmp_path}", teacher(classes=1, channels="bgr"))
    assert next(data.batches())[0][0, :, 0, 0].tolist() == [0, 0, 1]
    save(tmp_path / "grey.png", np.full((8, 8), 9, np.uint8))
    assert open_image(tmp_path / "grey.png", Shape((3, 8, 8))).unique().tolist() == [9]


@pytest.mark.parametrize(("resize", "crop"), [(None, None), (9, None), (None, 9), (6, 8)])
def test_another_size_than_the_networks(tmp_path: Path, resize: int | None, crop: int | None) -> None:
    save(tmp_path / "a.png", np.zeros((10, 12, 3), np.uint8))
    with pytest.raises(BadInput, match=r"expected 8x8 pixels, .*Set --resize \(shorter side\) and --crop"):
        open_image(tmp_path / "a.png", Shape((3, 8, 8), resize=resize, crop=crop))


# ---- pools and evaluation sets


def test_disjoint(tmp_path: Path) -> None:
    one, two = write_npz(tmp_path / "one.npz"), write_npz(tmp_path / "two.npz", 13)
    (tmp_path / "copy.npz").write_bytes((tmp_path / "one.npz").read_bytes())
    (tmp_path / "a" / "b").mkdir(parents=True)
    apart = [
        (f"{one}[:4]", f"{one}[4:]"), (f"{one}[-2:]", f"{one}[:-2]"), (one, two), ("digits:train", "digits"),
        (one, "digits"), (f"imagefolder:{tmp_path / 'a'}", f"imagefolder:{tmp_path / 'c'}"),
    ]  # fmt: skip
    for images, evaluation in apart:
        check_disjoint(images, evaluation)
    common = [
        (f"{one}[:5]", f"{one}[4:]"), (one, one), (f"{one}[3:]", f"npz:{tmp_path / 'copy.npz'}[:-2]"),
        ("digits", "digits"), (f"imagefolder:{tmp_path / 'a'}", f"imagefolder:{tmp_path / 'a' / 'b'}"),
        (f"cifar10:{tmp_path}", f"cifar10:{tmp_path}/a/.."),
    ]  # fmt: skip
    for images, evaluation in common:
        with pytest.raises(
            BadInput, match=r"--images .*: expected images apart from those of --eval .*got common ones"
        ):
            check_disjoint(images, evaluation)
    with pytest.raises(BadInput, match="got no such file"):
        check_disjoint(f"npz:{tmp_path / 'none.npz'}", one)


# ---- real files


def test_real_files(shared: Shared) -> None:
    cifar = load_teacher("resnet20-cifar10")
    data = load_data(f"npz:{shared / 'data/cifar10_test.npz'}[2000:]", cifar)
    assert data.count == 8000 and data.name == "cifar10_test.npz[2000:]"
    assert data.labels[:20].tolist() == [*range(10)] * 2
    with pytest.raises(BadInput, match="expected labels from 0 to 9"):
        load_data(f"npz:{shared / 'data/cifar100_test.npz'}", cifar)


@pytest.mark.slow
def test_real_image_folder(shared: Shared) -> None:
    net = teacher((3, 224, 224), 1000, resize=256, crop=224)
    data = load_data(f"imagefolder:{shared / 'data/imagenet_ccby'}", net)
    assert data.count == 1000 and len(data.labels.unique()) == 430
    assert next(data.batches(4))[0].shape == (4, 3, 224, 224)
