"""IntraQ: images of one class that differ from each other, then distillation on them (Zhong et al., CVPR 2022).

"IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot Network Quantization" (arXiv 2111.09136).
Crops while the images are made, a margin around each class centre, and class targets below certainty spread the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, lr_scheduler

from zsq import losses
from zsq.fit import calibrate, fit
from zsq.insert import QuantSpec, codes_and_latents, quantize
from zsq.presets import RANGES, Outcome, choose, feed, milestones_at, noise_budget, settle, size_class
from zsq.quantizer import LiveMinMax
from zsq.recipes.gdfq import source as gdfq_source
from zsq.run import Run
from zsq.sources.base import Batch, Source, require_image_labels
from zsq.sources.crops import CropSource, reinforce
from zsq.sources.generator import Loss
from zsq.sources.noise_pool import Group, NoiseSource
from zsq.teachers import Teacher
from zsq.units import class_centres, classifier_input, pooled
from zsq.view import View

PAPER = "Zhong et al., CVPR 2022, arXiv 2111.09136"
PARTS = "heterogeneous images from noise | live min/max weights, least-error activations | KL + cross-entropy"

PUBLISHED = {"image_lr": 0.5, "schedule": "plateau", "lr": 1e-4, "ranges_from": "generator", "observe_last": None}
FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"image_lr": 0.2, "schedule": "cosine", "lr": 1e-5, "ranges_from": "pool", "observe_last": 50,
             "ranges": "mse", "decay_at": [0.5, 0.75, 0.9]},
    "paper": {**PUBLISHED, "ranges": "ema"},
    "official": {**PUBLISHED, "ranges": "official"},
}  # fmt: skip
MARGINS: dict[str, dict[str, Any]] = {
    "cifar10": {"target": 0.95, "low": 0.05, "high": 0.8},
    "cifar100": {"target": 0.6, "low": 0.02, "high": 1.0},
    "imagenet": {"target": 1.0, "low": 0.0, "high": 2.0},  # the released script: both losses are off
}


def margins(kind: str, fidelity: str) -> dict[str, Any]:
    """Class probability and distances of a size class; ImageNet borrows CIFAR-100's unless as released."""
    return MARGINS["cifar100" if kind == "imagenet" and fidelity != "official" else kind]


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...] = (), fidelity: str = "best",
    count: int = 512, iterations: int = 150, group: int = 256, image_lr: float | None = None,
    target: float | None = None, low: float | None = None, high: float | None = None, leaf: Sequence[str] = (),
) -> NoiseSource:  # fmt: skip
    """Heterogeneous images: BatchNorm statistics, class probability, distance to the class centre (intraq.md, section 3).

    Args:
        teacher: needs BatchNorm layers.
        batch: images per draw.
        milestones: not used: the pool does not learn while it is read.
        fidelity: best, paper or official: start and learning rate of the images.
        count: images to draw from.
        iterations: Adam steps per image.
        group: images optimised together.
        image_lr: of Adam on the pixels; the fidelity's if not given.
        target: half of the images are asked for a class probability uniform between this and 1, the others for 1.
        low: smallest cosine distance to the class centre without penalty.
        high: largest one.
        leaf: patterns of modules kept whole.
    """
    require_image_labels(teacher, "intraq")
    kind = size_class(teacher.classes, teacher.image)
    near = settle(choose("--fidelity", fidelity, FIDELITY), margins(kind, fidelity),
                  target=target, low=low, high=high, image_lr=image_lr)  # fmt: skip
    where = classifier_input(teacher.net, leaf=leaf) if near.low > 0 or near.high < 2 else None

    def loss_of(made: Group) -> Loss:
        coin, place = torch.rand(2, len(made.labels), generator=made.rng)
        targets = torch.where(coin < 0.5, 1.0, near.target + (1 - near.target) * place).to(made.labels.device)
        centred = where if len(made.images) > 0 else None  # the first group finds no centres
        if centred is not None:
            centres, known = class_centres(teacher.net, centred, made.images, made.image_labels, teacher.classes)

        def image_loss(t: View, images: Batch) -> dict[str, Tensor]:
            terms = {"i_bns": losses.bn_gap(t.norms), "i_class": losses.inception(t.logits, made.labels, targets)}
            if centred is not None:
                z, limits = pooled(t.features[centred]), {"low": near.low, "high": near.high}
                terms["i_margin"] = losses.marginal_distance(z, made.labels, centres, known, **limits)
            return terms

        return image_loss

    return NoiseSource(teacher, loss_of, name="intraq", batch=batch, count=count, iterations=iterations, group=group,
                       lr=near.image_lr, schedule=near.schedule, augment=partial(reinforce, scale=(0.5, 1.0)),
                       features=() if where is None else (where,))  # fmt: skip


def intraq(
    teacher: Teacher, run: Run, *, spec: QuantSpec | None = None, images: Source | None = None,
    budget: str = "quick", fidelity: str = "best", steps: int | None = None, warmup: int | None = None,
    batch: int | None = None, micro_batch: int | None = None, count: int | None = None,
    iterations: int | None = None, group: int | None = None, image_lr: float | None = None,
    target: float | None = None, low: float | None = None, high: float | None = None, lr: float | None = None,
    weight_decay: float = 1e-4, kl_weight: float = 20.0, ce_weight: float = 1.0, temperature: float = 20.0,
    ranges: Literal["percentile", "ema", "mse", "official"] | None = None,
) -> Outcome:  # fmt: skip
    """Quantize `teacher` with IntraQ.

    Args:
        teacher: the float network.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the ranges are this recipe's.
        images: another source in place of the images from noise.
        budget: quick, standard or paper.
        fidelity: best, paper or official.
        steps: student updates; the budget's if not given.
        warmup: batches the activation ranges are taken from; the budget's if not given.
        batch: images per step; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size, same gradient, less memory.
        count: images to make; the budget's if not given.
        iterations: Adam steps per image; the budget's if not given.
        group: images optimised together, whose statistics are compared.
        image_lr: learning rate on the pixels; the fidelity's if not given.
        target: lower end of the class probability asked for; by number of classes if not given.
        low: smallest cosine distance to the class centre without penalty; by number of classes if not given.
        high: largest one; by number of classes if not given.
        lr: learning rate of the student's SGD; the fidelity's if not given, 1e-6 above 64 pixels.
        weight_decay: of the student's SGD.
        kl_weight: weight of the distillation term.
        ce_weight: weight of the cross-entropy with the label the image was made for.
        temperature: of the distillation term, which carries its square.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or official.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm, images without labels, or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | class loss of the images | soft inception | squared error of one probability | as executed | what the published numbers were made with | tests/unit/test_noise_losses.py |
    | margins on ImageNet | all three parts are on | target 1, margins 0 and 2: two parts off | those of CIFAR-100 (best, paper), off (official) | the paper does not state them | tests/unit/test_intraq.py |
    | class centres | finished images | finished images, also stale ones of an earlier run | finished images of this run | nothing from outside | tests/unit/test_intraq.py |
    | crops while making images | random crops | one image at a time | one grid sample per batch | the same map | tests/unit/test_noise_pool.py |
    | activation range | EMA of minimum and maximum on images of a GDFQ generator | its bias correction applied again at every step | least error of the rounded values on the pool (best), EMA corrected once (paper), as released (official) | the student is trained on the pool | tests/unit/test_intraq.py |
    | classes of the images | not stated | drawn uniformly | balanced | few images | tests/unit/test_noise_pool.py |
    | image learning rate | 0.5 | 0.5, x 0.1 on a plateau | 0.2 along half a cosine (best), 0.5 with plateau (paper, official) | short budgets | tests/unit/test_noise_pool.py |
    | learning rate | 1e-4 (ImageNet 1e-6) | the same | 1e-5 (best; ImageNet 1e-6), as published (paper, official) | from least-error ranges 1e-4 diverges at 3 bits | tests/unit/test_intraq.py |
    | learning rate decay | epochs 20, 40, 60 (ImageNet: 100) | the same | at half, three quarters, nine tenths (best), as published (paper, official) | short budgets | tests/unit/test_intraq.py |
    | checkpoint reported | best on the test set | best on the test set | last | nothing is chosen on test data | tests/test_architecture.py |
    """  # fmt: skip
    kind, spec = size_class(teacher.classes, teacher.image), spec or QuantSpec()
    row = choose("--fidelity", fidelity, FIDELITY)
    small = kind != "imagenet"
    plan = settle(
        {"decay_at": [16 / 147, 36 / 147, 56 / 147] if small else [96 / 147]},
        noise_budget(budget, teacher.image), row,
        margins(kind, fidelity),
        {} if small else {"lr": 1e-6},
        steps=steps, warmup=warmup, batch=batch, count=count, iterations=iterations, group=group, image_lr=image_lr,
        target=target, low=low, high=high, lr=lr, weight_decay=weight_decay, kl_weight=kl_weight, ce_weight=ce_weight,
        temperature=temperature, ranges=ranges,
    )  # fmt: skip
    student, report = quantize(teacher.net, replace(spec, weight=LiveMinMax, act=RANGES[plan.ranges]))
    make = partial(source, teacher, batch=plan.batch, fidelity=fidelity, count=plan.count, iterations=plan.iterations, group=plan.group,
                   image_lr=plan.image_lr, target=plan.target, low=plan.low, high=plan.high,
                   leaf=spec.leaf)  # fmt: skip
    batches = CropSource(feed(images, make, batch=plan.batch), scale=(0.5, 1.0))

    seen: Source = batches if plan.ranges_from == "pool" else gdfq_source(teacher, batch=16, milestones=())
    calibrate(student, seen, steps=plan.warmup, run=run, observe_last=plan.observe_last)

    def student_loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        kl = teacher.outputs.kl(s.logits, t.logits, temperature=temperature, reduction="batchmean")
        return {"kl": kl_weight * kl, "ce": ce_weight * losses.cross_entropy(s.logits, batch.labels)}

    sgd = SGD(student.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    decay = lr_scheduler.MultiStepLR(sgd, milestones_at(plan.decay_at, plan.steps), gamma=0.1)
    fit(student, teacher, batches, student_loss, sgd, steps=plan.steps, run=run, schedulers=[decay],
        micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))
