"""ZeroQ: images whose statistics match the BatchNorms fix the activation ranges; nothing is trained (Cai et al., CVPR 2020).

"ZeroQ: A Novel Zero Shot Quantization Framework" (arXiv 2001.00281), uniform bit widths. Minutes, even for a large network;
good at 8 and 6 bits, and the calibration-only control of every method that trains.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, ones, zeros
from torch.nn.modules.batchnorm import _BatchNorm

from zsq import losses
from zsq.fit import calibrate
from zsq.insert import QuantSpec, quantize
from zsq.presets import RANGES, Outcome, choose, feed, settle
from zsq.quantizer import LiveMinMax
from zsq.run import Run
from zsq.sources.base import Batch, Source
from zsq.sources.noise_pool import NoiseSource
from zsq.teachers import Teacher
from zsq.view import INPUT, View

PAPER = "Cai et al., CVPR 2020, arXiv 2001.00281"
PARTS = "images from noise by BatchNorm statistics | live min/max weights, percentile activations | no training"

PUBLISHED = {"image_lr": 0.5, "schedule": "plateau", "ranges": "ema"}
FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"image_lr": 0.2, "schedule": "cosine", "ranges": "percentile", "statistics": "batch", "start": 1.0},
    "paper": {**PUBLISHED, "statistics": "batch", "start": 1.0},
    "official": {**PUBLISHED, "statistics": "image", "start": 73.61 / 5418.75},
}
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {"count": 256, "iterations": 100, "group": 288, "warmup": 20, "batch": 64},
    "standard": {"count": 512, "iterations": 300, "group": 288, "warmup": 50, "batch": 64},
    "paper": {"count": 64, "iterations": 500, "group": 72, "warmup": 1, "batch": 64},
}


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...] = (), fidelity: str = "best",
    count: int = 512, iterations: int = 150, group: int = 256, image_lr: float | None = None,
    statistics: Literal["batch", "image"] | None = None,
) -> NoiseSource:  # fmt: skip
    """Images whose statistics are those of the BatchNorms, without classes (zeroq.md, section 3).

    Args:
        teacher: needs BatchNorm layers.
        batch: images per draw.
        milestones: not used: the pool does not learn while it is read.
        fidelity: best, paper or official: start, statistics and learning rate of the images.
        count: images to draw from.
        iterations: Adam steps per image.
        group: images optimised together.
        image_lr: of Adam on the pixels; the fidelity's if not given.
        statistics: of a whole group, or of every image alone (standard deviations, the image itself
            as a layer); the fidelity's if not given.
    """
    norms = {
        name: (module.running_mean, (module.running_var + 1e-6).sqrt())
        for name, module in teacher.net.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }
    row = settle(choose("--fidelity", fidelity, FIDELITY), image_lr=image_lr, statistics=statistics)
    alone = row.statistics == "image"

    def image_loss(t: View, images: Batch) -> dict[str, Tensor]:
        if not alone:
            return {"i_bns": losses.bn_gap(t.norms)}
        x = images.images
        layers = [(t.features[name + INPUT], mean, std) for name, (mean, std) in norms.items()]
        image = (x, zeros(x.shape[1], device=x.device), ones(x.shape[1], device=x.device))
        return {"i_bns": losses.statistics_gap([*layers, image] if layers else [])}

    return NoiseSource(teacher, lambda _: image_loss, name="zeroq", batch=batch, count=count, iterations=iterations,
                       group=group, lr=row.image_lr, schedule=row.schedule, start=row.start, patience=100, labelled=False,
                       features=tuple(name + INPUT for name in norms) if alone else ())  # fmt: skip


def zeroq(
    teacher: Teacher,
    run: Run,
    *,
    spec: QuantSpec | None = None,
    images: Source | None = None,
    budget: str = "quick",
    fidelity: str = "best",
    warmup: int | None = None,
    batch: int | None = None,
    count: int | None = None,
    iterations: int | None = None,
    group: int | None = None,
    image_lr: float | None = None,
    statistics: Literal["batch", "image"] | None = None,
    ranges: Literal["percentile", "ema", "mse", "official"] | None = None,
) -> Outcome:
    """Quantize `teacher` with ZeroQ: calibration only.

    Args:
        teacher: the float network.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the ranges are this recipe's.
        images: another source in place of the images from noise.
        budget: quick, standard or paper.
        fidelity: best, paper or official.
        warmup: batches the activation ranges are taken from; the budget's if not given.
        batch: images per batch; the budget's if not given.
        count: images to make; the budget's if not given.
        iterations: Adam steps per image; the budget's if not given.
        group: images optimised together, whose statistics are compared.
        image_lr: learning rate on the pixels; the fidelity's if not given.
        statistics: compared over a whole group (batch) or for every image alone (image); the fidelity's if not given.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or official.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm, or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | statistics | of all images | of every image alone, standard deviations | of all (best, paper), of every image (official) | one mean for every image makes them alike | tests/unit/test_zeroq.py |
    | sum over layers and channels | sum | sum | mean (best, paper), sum (official) | Adam does not feel the factor | tests/unit/test_noise_losses.py |
    | start | normal noise | noise divided by its variance: deviation 0.0136 | deviation 1 (best, paper), 0.0136 (official) | a slip | tests/unit/test_zeroq.py |
    | activation range | extremes | extremes of one forward, from 0 | 99.9 % of the values (best), extremes of one batch of a paper budget (paper, official) | at few bits the extremes cost most | tests/unit/test_zeroq.py |
    | image learning rate | not stated | 0.5, x 0.1 on a plateau of 100 | 0.2 along half a cosine (best), 0.5 with plateau (paper, official) | short budgets | tests/unit/test_noise_pool.py |
    | mixed precision | by sensitivity | absent | option --layer-bits, chosen by the user | not part of this recipe | tests/unit/test_cli.py |
    """  # fmt: skip
    plan = settle(
        choose("--budget", budget, BUDGETS), choose("--fidelity", fidelity, FIDELITY), {"steps": 0},
        warmup=warmup, batch=batch, count=count, iterations=iterations, group=group, image_lr=image_lr,
        statistics=statistics, ranges=ranges,
    )  # fmt: skip
    choose("--statistics", plan.statistics, dict.fromkeys(("batch", "image")))
    student, report = quantize(
        teacher.net, replace(spec or QuantSpec(), weight=LiveMinMax, act=choose("--ranges", plan.ranges, RANGES))
    )
    make = partial(source, teacher, batch=plan.batch, fidelity=fidelity, count=plan.count, iterations=plan.iterations, group=plan.group,
                   image_lr=plan.image_lr, statistics=plan.statistics)  # fmt: skip
    batches = feed(images, make, batch=plan.batch)
    calibrate(student, batches, steps=plan.warmup, run=run)
    return Outcome(student, report, batches, vars(plan))
