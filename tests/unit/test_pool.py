"""The pool of images. (What every source promises is in tests/contracts/test_sources.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zsq.checkpoint import save_tree
from zsq.errors import BadInput
from zsq.sources.pool import PoolSource, read_pool


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int) -> torch.Tensor:
    """Image i has the value i everywhere."""
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 4, 4).clone()


def values(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


def test_held_out_images_are_never_drawn() -> None:
    source = PoolSource(numbered(40), None, name="n", batch=16)
    drawn = {v for step in range(40) for v in values(source.draw(rng(step)).images)}
    assert drawn == set(range(35))
    assert sorted(values(source.sample(100, rng()).images)) == [35, 36, 37, 38, 39]


def test_at_most_1024_images_are_held_out() -> None:
    assert len(PoolSource(numbered(10_000), None, name="n").sample(5000, rng()).images) == 1024


def test_labels_stay_with_their_images() -> None:
    source = PoolSource(numbered(64), torch.arange(64), name="n", batch=16)
    for batch in (source.draw(rng()), source.sample(8, rng())):
        assert batch.labels.tolist() == values(batch.images)


@pytest.mark.parametrize(
    "images", [torch.zeros(7, 1, 4, 4), torch.zeros(0, 1, 4, 4), torch.zeros(64, 4, 4)], ids=["7", "none", "3d"]
)
def test_too_small_a_pool(images: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="at least 8 images"):
        PoolSource(images, None, name="n")


def test_an_empty_batch() -> None:
    with pytest.raises(BadInput, match="--batch: expected at least 1 image, got 0"):
        PoolSource(numbered(8), None, name="n", batch=0)


# ---- files


def test_a_pool_of_ours_and_of_anyone(tmp_path: Path) -> None:
    save_tree(tmp_path / "ours.safetensors", {"images": numbered(16)})
    save_file({"images": numbered(16).half(), "labels": torch.arange(16) % 3}, tmp_path / "theirs.safetensors")
    images, labels = read_pool(tmp_path / "ours.safetensors", image=(1, 4, 4), classes=3)
    assert torch.equal(images, numbered(16)) and labels is None
    images, labels = read_pool(tmp_path / "theirs.safetensors", image=(1, 4, 4), classes=3)
    assert torch.equal(images, numbered(16)) and images.dtype == torch.float32
    assert labels.tolist() == [i % 3 for i in range(16)]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"pixels": numbered(8)}, r"'images' of shape \[n, 1, 4, 4\], got tensors pixels"),
        ({"images": torch.zeros(8, 1, 4, 4, dtype=torch.uint8)}, r"got torch.uint8 \[8, 1, 4, 4\]"),
        ({"images": torch.zeros(8, 3, 4, 4)}, r"got torch.float32 \[8, 3, 4, 4\]"),
        ({"images": torch.zeros(())}, r"got torch.float32 \[\]"),
        ({"images": numbered(8) / 0}, "expected finite pixels"),
        ({"images": numbered(8), "labels": torch.full((8,), 3)}, "one label from 0 to 2 per image, got .* from 3 to 3"),
        ({"images": numbered(8), "labels": torch.full((8,), -1)}, "from -1 to -1"),
        ({"images": numbered(8), "labels": torch.zeros(7, dtype=torch.int64)}, r"got torch.int64 \[7\]"),
        ({"images": numbered(8), "labels": torch.zeros(8)}, r"got torch.float32 \[8\]"),
        ({"images": torch.zeros(0, 1, 4, 4), "labels": torch.zeros(0, dtype=torch.int64)}, None),
    ],
)
def test_what_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str | None) -> None:
    save_file(tensors, tmp_path / "pool.safetensors")
    if words is None:  # left to PoolSource, which says how many it needs
        images, _ = read_pool(tmp_path / "pool.safetensors", image=(1, 4, 4), classes=3)
        assert len(images) == 0
        return
    with pytest.raises(BadInput, match=words):
        read_pool(tmp_path / "pool.safetensors", image=(1, 4, 4), classes=3)


def anonymous_memory() -> int:
    """Bytes of this process that are not the pages of some file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory is made of")
def test_a_saved_pool_stays_in_its_file(tmp_path: Path) -> None:
    """A pool larger than memory can be drawn from: a draw costs its own images."""
    images = torch.arange(4096.0)[:, None, None, None].expand(4096, 3, 64, 64)  # 201 MB
    save_file({"images": images.contiguous()}, tmp_path / "pool.safetensors")
    before = anonymous_memory()
    pool, _ = read_pool(tmp_path / "pool.safetensors", image=(3, 64, 64), classes=3)
    source = PoolSource(pool, None, name="large", batch=32)
    drawn = [source.draw(torch.Generator().manual_seed(seed)).images for seed in range(10)]
    held = source.sample(500, torch.Generator().manual_seed(0)).images
    assert anonymous_memory() - before < 64 * 2**20  # ten batches and 500 images are 40 MB
    assert all(bool((batch == batch[:, :1, :1, :1]).all()) and batch.max() < 3584 for batch in drawn)
    assert held.min() >= 3584 and len({float(value) for value in held[:, 0, 0, 0]}) == 500
