"""Train the teachers `shapes-segment` and `shapes-detect`: python scripts/train_shapes.py TASK [--steps N].

Scenes are drawn by `zsq.data.shapes`: 4,000 for training, mirrored at random; the 400 held-out ones are scored once at
the end. Deterministic on one machine (one thread, fixed seed); about five minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.data import load_data
from zsq.data.shapes import TRAIN, Scenes, draw_scenes
from zsq.evaluation import score
from zsq.tasks.boxes import overlaps
from zsq.teachers import EMBEDDED, make_teacher
from zsq.teachers.embedded import FOLDER
from zsq.teachers.nets import grid_boxes

BATCH, LR, DECAY = 64, 3e-3, 1e-3


def normalised(images: Tensor, name: str) -> Tensor:
    """[n, h, w, 3] uint8 to [n, 3, h, w], normalised as the teacher is declared."""
    facts = EMBEDDED[name].facts
    mean, std = (torch.tensor(v or ())[:, None, None] for v in (facts.mean, facts.std))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def mirrored(
    x: Tensor, masks: Tensor, corners: list[Tensor], rng: torch.Generator
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Every scene mirrored by coin, left and right."""
    coin = torch.rand(len(x), generator=rng) < 0.5
    x = torch.where(coin[:, None, None, None], x.flip(3), x)
    masks = torch.where(coin[:, None, None], masks.flip(2), masks)
    turned = [
        torch.stack((1 - c[:, 2], c[:, 1], 1 - c[:, 0], c[:, 3]), 1) if flip else c
        for c, flip in zip(corners, coin.tolist(), strict=True)
    ]
    return x, masks, turned


def segment_loss(out: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy per pixel at full size."""
    return F.cross_entropy(out, masks)


def detect_loss(out: Tensor, corners: list[Tensor], classes: list[Tensor]) -> Tensor:
    """Binary cross entropy of objectness; in the cells that hold a centre also overlap and class."""
    b, _, h, w = out.shape
    owner = torch.cat([torch.full((len(c),), i) for i, c in enumerate(corners)])
    boxes, kinds = torch.cat(corners), torch.cat(classes)
    column = ((boxes[:, 0] + boxes[:, 2]) / 2 * w).long().clamp(0, w - 1)
    row = ((boxes[:, 1] + boxes[:, 3]) / 2 * h).long().clamp(0, h - 1)
    target = torch.zeros(b, h, w)
    target[owner, row, column] = 1
    found = grid_boxes(out)[:, :, :4].reshape(b, h, w, 4)[owner, row, column]
    overlap = overlaps(found, boxes).diagonal()
    distance = (found - boxes).abs().mean(1)
    probability = out[owner, 5:, row, column].gather(1, kinds[:, None]).clamp_min(1e-6)
    objectness = F.binary_cross_entropy(out[:, 0].clamp(1e-6, 1 - 1e-6), target, reduction="sum") / len(boxes)
    return objectness + 2 * (1 - overlap).mean() + 5 * distance.mean() - probability.log().mean()


def train(name: str, scenes: Scenes, steps: int) -> nn.Module:
    """AdamW with a one-cycle schedule."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    net = EMBEDDED[name].build().train()
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    images = normalised(scenes.images, name)
    for step in range(steps):
        part = torch.randint(len(images), (BATCH,), generator=rng).tolist()
        x, masks, corners = mirrored(images[part], scenes.masks[part], [scenes.boxes[i].corners for i in part], rng)
        out = net(x)
        if name == "shapes-segment":
            loss = segment_loss(out, masks)
        else:
            loss = detect_loss(out, corners, [scenes.boxes[i].classes for i in part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("segment", "detect"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    name = f"shapes-{options.task}"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    net = train(name, draw_scenes(TRAIN, seed=0), options.steps)
    output = options.output or FOLDER / EMBEDDED[name].weights
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, output)
    output.chmod(0o644)  # the library writes files that only their owner can read
    teacher = make_teacher(net, EMBEDDED[name].facts, name=name)
    print(score(teacher.net, load_data(name, teacher)))
    print(f"{sum(p.numel() for p in net.parameters())} parameters; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
