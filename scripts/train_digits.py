"""Train the `digits` teacher: python scripts/train_digits.py [--validate] [--output FILE].

Scikit-learn's 1,797 digits, 8x8 pixels. The held-out third (599 images, `zsq.data.files.digits_split`) is neither
trained on nor looked at before the end. With --validate a fifth of the training part is kept back and scored instead:
settings are chosen on that. Deterministic on one machine (one thread, fixed seed); half a minute on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.data.files import digits_split
from zsq.teachers import EMBEDDED
from zsq.teachers.nets import digits_net

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "zsq" / "weights" / "digits.safetensors"
EPOCHS, BATCH, LR, DECAY, SHIFT = 60, 64, 0.1, 5e-4, 1


def normalised(images: Tensor) -> Tensor:
    """[n, 8, 8, 1] uint8 to [n, 1, 8, 8], normalised as the teacher is declared."""
    facts = EMBEDDED["digits"].facts
    assert facts.mean is not None and facts.std is not None
    return (images.permute(0, 3, 1, 2).float() / 255 - facts.mean[0]) / facts.std[0]


def shifted(x: Tensor, background: float, rng: torch.Generator) -> Tensor:
    """Every image moved by up to SHIFT pixels in each direction, the background moving in."""
    n, _, h, w = x.shape
    padded = F.pad(x, (SHIFT,) * 4, value=background)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=rng)
    rows = (down[:, None] + torch.arange(h))[:, None, :, None]
    columns = (right[:, None] + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], 0, rows, columns]


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """SGD with a one-cycle schedule on the given images."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    net, background = digits_net().train(), float(images.min())
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=rng)
        for part in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(net(shifted(images[part], background, rng)), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def top1(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right decisions."""
    with torch.no_grad():
        return (net(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true", help="score a fifth of the training part instead")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    pixels, numbers, _ = digits_split(held_out=False)
    images, labels = normalised(torch.from_numpy(pixels)), torch.from_numpy(numbers)
    if options.validate:
        kept = torch.arange(len(images)) % 5 == 4
        net = train(images[~kept], labels[~kept])
        print(f"validation top-1 {100 * top1(net, images[kept], labels[kept]):.2f} % of {int(kept.sum())}")
    else:
        net = train(images, labels)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, options.output)
        options.output.chmod(0o644)  # the library writes files that only their owner can read
        pixels, numbers, _ = digits_split(held_out=True)
        score = top1(net, normalised(torch.from_numpy(pixels)), torch.from_numpy(numbers))
        parameters = sum(p.numel() for p in net.parameters())
        print(f"held-out top-1 {100 * score:.2f} % of {len(numbers)}; {parameters} parameters")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
