"""The probe pool: one fixed synthetic set per teacher, so that recipes can be compared without labels."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from zsq.checkpoint import load_tree, save_tree
from zsq.errors import BadInput
from zsq.sources.noise import probe_images
from zsq.teachers import Teacher

VERSION = 1  # part of the file name: a change of the recipe for the pool must not read an old one


def cache_folder() -> Path:
    """`ZSQ_CACHE`, or zsq in the user's cache folder."""
    if own := os.environ.get("ZSQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "zsq"


def probe_pool(teacher: Teacher) -> Tensor:
    """Images optimised through the teacher with a fixed seed; made once per teacher, then read from the cache.

    Args:
        teacher: any teacher; without BatchNorm the images only follow its classes.

    Returns:
        Shape [n, c, h, w], float32, in the teacher's normalised space.
    """
    shape = "x".join(map(str, teacher.image))  # the same weights may be used on images of several sizes
    path = cache_folder() / f"probe-v{VERSION}-{teacher.fingerprint[:16]}-{shape}.safetensors"
    try:
        return load_tree(path)["images"].to(teacher.device)
    except (BadInput, KeyError, TypeError):  # none yet, or a damaged one, which is made again
        images = probe_images(teacher)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tree(path, {"images": images.cpu()})
    except (OSError, BadInput):  # the cache only saves time; a machine without one still gets its images
        pass
    return images
