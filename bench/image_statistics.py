"""How far images without data are from real ones, as a network's BatchNorms see it.

    python bench/image_statistics.py --json bench/results/image_statistics.json

Of each network and each kind of images: the distance of the means from the stored ones in stored standard deviations,
and the log-ratio of the standard deviations, both as mean magnitudes over channels and layers. Real images are the
labelled sets beside the project (CIFAR-10's dev slice, CamVid's validation images, which its network was trained on,
and ImageNet-compatible photographs); they are measured, nothing is made of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.data import load_images
from zsq.generators_adversarial import AdversaryGenerator, input_space
from zsq.machine import versions
from zsq.run import Run
from zsq.sources.leaves import LeavesSource
from zsq.teachers import Teacher, load_teacher
from zsq.view import frozen, look

COUNT, BATCH = 64, 16
SIZES = {"resnet20-cifar10": (32, 32), "MobileNetV1": (160, 160), "FastestDet": (192, 192), "CGNet": (128, 160)}


def networks(shared: Path) -> dict[str, tuple[Teacher, str]]:
    """Networks, and real images for each."""
    nets, data, photos = f"{shared}/teachers/nets.py", shared / "data", f"imagefolder:{shared}/data/imagenet_ccby"

    def weights(name: str) -> Path:
        return shared / "teachers" / f"{name}.safetensors"

    mobile = load_teacher(
        f"{nets}:imagenet_mobilenetv1_x025", weights=weights("imagenet_mobilenetv1_x025"), task="classify",
        image=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, crop=224,
    )  # fmt: skip
    detector = load_teacher(
        f"{nets}:coco_fastestdet", weights=weights("coco_fastestdet"), task="detect", classes=80, image=(3, 352, 352),
        channels="bgr", mean=(0.0,), std=(1.0,),
    )  # fmt: skip
    segmenter = load_teacher(
        f"{nets}:camvid_cgnet", weights=weights("camvid_cgnet"), task="segment", classes=11, image=(3, 360, 480),
        mean=(0.41434607, 0.40521503, 0.39068394), std=(1 / 255,),
    )  # fmt: skip
    return {
        "resnet20-cifar10": (load_teacher("resnet20-cifar10"), f"npz:{data}/cifar10_test.npz[:{COUNT}]"),
        "MobileNetV1": (mobile, photos), "FastestDet": (detector, photos),
        "CGNet": (segmenter, f"camvid:{data}/camvid/val"),
    }  # fmt: skip


def kinds(teacher: Teacher, real: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """Images of every kind, in the teacher's space."""
    image = (teacher.image[0], *size)
    space, rng = input_space(image, teacher.mean, teacher.std), torch.Generator().manual_seed(0)
    leaves = LeavesSource(teacher, batch=COUNT, count=COUNT, image=image)
    with Run(None, seed=0, progress=False) as run:
        leaves.prepare(run)
    generator = AdversaryGenerator(image, space, width=16, rng=rng)
    with torch.no_grad():
        made = torch.cat([generator(torch.randn(BATCH, 256, generator=rng)) for _ in range(COUNT // BATCH)])
    photos = F.interpolate(load_images(real, teacher)[:COUNT], size, mode="bilinear", antialias=True)
    return {"real images": photos, "drawn": leaves.draw(rng).images, "a generator that learned nothing": made,
            "noise": space.noise(COUNT, image, rng)}  # fmt: skip


def distances(teacher: Teacher, images: Tensor) -> dict[str, float]:
    """Of means and of standard deviations; layers' dead channels are left out."""
    with torch.no_grad(), frozen(teacher.net):
        seen = [look(teacher.net, part, norms=True).norms for part in images.split(BATCH)]
    means, spreads = [], []
    for parts in zip(*seen, strict=True):
        mean = torch.stack([part.mean for part in parts]).mean(0)
        var = torch.stack([part.var + part.mean.square() for part in parts]).mean(0) - mean.square()
        stored_mean, stored_var = parts[0].running_mean, parts[0].running_var
        alive = stored_var > 1e-6
        if not bool(alive.any()):
            continue
        mean, var, stored_mean, stored_var = (value[alive] for value in (mean, var, stored_mean, stored_var))
        means.append(((mean - stored_mean).abs() / stored_var.sqrt()).mean())
        spreads.append((((var + 1e-5) / (stored_var + 1e-5)).log() / 2).abs().mean())
    return {"mean": float(torch.stack(means).mean()), "spread": float(torch.stack(spreads).mean())}


def main() -> None:
    """All networks, all kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of data and teachers")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_flush_denormal(True)
    table = []
    for name, (teacher, real) in networks(asked.shared).items():
        for kind, images in kinds(teacher, real, SIZES[name]).items():
            row = {"network": name, "images": kind, "size": list(SIZES[name]), **distances(teacher, images)}
            print(f"{name:18s} {kind:34s} means {row['mean']:.2f}  spreads {row['spread']:.2f}", flush=True)
            table.append(row)
    if asked.json is not None:
        write_json_atomic(asked.json, {"count": COUNT, "table": table, "versions": versions(), "commit": commit()})


if __name__ == "__main__":
    main()
