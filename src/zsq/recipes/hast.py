"""HAST: make hard images, make them harder while training, and align what both networks attend to (Li et al., CVPR 2023).

"Hard Sample Matters a Lot in Zero-Shot Quantization" (arXiv 2303.13826). Images are optimised from noise with a class loss
that hard ones dominate; in training, every batch is also moved by one sign step uphill; channel attention is compared.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from zsq import losses
from zsq.fit import calibrate, fit
from zsq.insert import QuantSpec, codes_and_latents, quantize
from zsq.presets import RANGES, Outcome, choose, feed, milestones_at, noise_budget, settle, size_class
from zsq.promotion import promoted
from zsq.quantizer import LiveMinMax
from zsq.recipes.gdfq import source as gdfq_source
from zsq.run import Run
from zsq.sources.base import Batch, Source, require_image_labels
from zsq.sources.crops import CropSource, reinforce
from zsq.sources.noise_pool import NoiseSource
from zsq.sources.priors import pixel_priors
from zsq.teachers import Teacher
from zsq.view import View

PAPER = "Li et al., CVPR 2023, arXiv 2303.13826"
PARTS = "hard images from noise | live min/max weights, least-error activations | KL + attention, also on harder images"

PUBLISHED = {"image_lr": 0.5, "schedule": "plateau", "lr": 1e-5, "ranges_from": "generator", "observe_last": None}
FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"image_lr": 0.2, "schedule": "cosine", "lr": 1e-5, "ranges_from": "pool", "observe_last": 50,
             "ranges": "mse", "promotion": "loss", "decay_at": [0.5, 0.75, 0.9]},
    "paper": {**PUBLISHED, "ranges": "ema", "promotion": "difficulty"},
    "official": {**PUBLISHED, "ranges": "official", "promotion": "loss"},
}  # fmt: skip
STATED: dict[str, dict[str, Any]] = {  # the configuration files; the released program never reads these two
    "cifar10": {"alignment": 1000.0, "epsilon": 0.01},
    "cifar100": {"alignment": 2000.0, "epsilon": 0.02},
    "imagenet": {"alignment": 4000.0, "epsilon": 0.01},
}


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...] = (), fidelity: str = "best",
    count: int = 512, iterations: int = 150, group: int = 256, image_lr: float | None = None,
    beta: float | None = None, gamma: float | None = None, smooth: float = 0.0, norm: float = 0.0, slow: float = 0.0,
) -> NoiseSource:  # fmt: skip
    """Hard images: BatchNorm statistics plus `beta` times the class loss that hard images dominate (hast.md, section 3).

    Args:
        teacher: needs BatchNorm layers.
        batch: images per draw.
        milestones: not used: the pool does not learn while it is read.
        fidelity: best, paper or official: start and learning rate of the images.
        count: images to draw from.
        iterations: Adam steps per image.
        group: images optimised together.
        image_lr: of Adam on the pixels; the fidelity's if not given.
        beta: weight of the class loss; 10 up to 64 pixels, 0.1 above.
        gamma: exponent of the difficulty; 2 up to 64 pixels, 0.5 above.
        smooth: weight of the images' total variation.
        norm: weight of their squared norm.
        slow: weight of what a Gaussian low-pass filter takes away from them.
    """
    require_image_labels(teacher, "hast")
    row = settle(choose("--fidelity", fidelity, FIDELITY), image_lr=image_lr)
    small = max(teacher.image[1:]) <= 64
    weight, power = (10.0, 2.0) if small else (0.1, 0.5)
    weight, power = weight if beta is None else beta, power if gamma is None else gamma

    def image_loss(t: View, images: Batch) -> dict[str, Tensor]:
        hard = weight * losses.hard_sample(t.logits, images.labels, gamma=power)
        priors = pixel_priors(images.images, smooth=smooth, norm=norm, slow=slow)
        return {"i_bns": losses.bn_gap(t.norms), "i_hard": hard, **priors}

    return NoiseSource(teacher, lambda _: image_loss, name="hast", batch=batch, count=count, iterations=iterations,
                       group=group, lr=row.image_lr, schedule=row.schedule,
                       augment=None if small else partial(reinforce, scale=(0.4, 1.0)))  # fmt: skip


def hast(
    teacher: Teacher, run: Run, *, spec: QuantSpec | None = None, images: Source | None = None,
    budget: str = "quick", fidelity: str = "best", steps: int | None = None, warmup: int | None = None,
    batch: int | None = None, micro_batch: int | None = None, count: int | None = None,
    iterations: int | None = None, group: int | None = None, image_lr: float | None = None,
    beta: float | None = None, gamma: float | None = None, smooth: float = 0.0, norm: float = 0.0, slow: float = 0.0,
    lr: float | None = None, weight_decay: float = 1e-4,
    kl_weight: float = 20.0, temperature: float = 20.0, alignment: float | None = None,
    epsilon: float | None = None, promotion: Literal["loss", "difficulty", "off"] | None = None,
    ranges: Literal["percentile", "ema", "mse", "official"] | None = None,
) -> Outcome:  # fmt: skip
    """Quantize `teacher` with HAST.

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
        beta: weight of the images' class loss; 10 up to 64 pixels, 0.1 above.
        gamma: exponent of the difficulty in it, 0 for plain cross-entropy; 2 up to 64 pixels, 0.5 above.
        smooth: weight of the images' total variation; not published for this method, 0 leaves it out.
        norm: weight of the images' squared norm; the same.
        slow: weight of what a Gaussian low-pass filter takes away from the images (SynQ, ICLR 2025); the same.
        lr: learning rate of the student's SGD; the fidelity's if not given, a tenth of it above 64 pixels.
        weight_decay: of the student's SGD.
        kl_weight: weight of the distillation term.
        temperature: of the distillation term, which carries its square.
        alignment: weight of the attention term, 0 for none; the fidelity's if not given.
        epsilon: how far a pixel moves when images are made harder; the fidelity's if not given.
        promotion: uphill on the loss, on the difficulty, or off; the fidelity's if not given.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or official.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm, or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | harder images | uphill on the student's difficulty | uphill on the whole loss, labels unused | the loss (best, official), the difficulty (paper) | as executed | tests/unit/test_hast.py |
    | images trained on | the harder ones | both, 1 to 1 | both (best, official), the harder (paper) | as executed | tests/unit/test_hast.py |
    | weight of the attention term | 1000, 2000, 4000 (CIFAR-10, CIFAR-100, ImageNet) | 1000, hard-coded | 1000 (best, official), as stated (paper) | the configuration is never read | tests/unit/test_hast.py |
    | epsilon | 0.01, 0.02, 0.01 | 0.01, hard-coded | 0.01 (best, official), as stated (paper) | the configuration is never read | tests/unit/test_hast.py |
    | hard-sample loss | no factor | factor beta, exponent gamma | as executed | the paper's formula is ambiguous | tests/unit/test_noise_losses.py |
    | 1 - p in it | not stated | NaN gradient at p = 1 for gamma below 1 | -expm1(log p), bounded below | finite everywhere | tests/unit/test_noise_losses.py |
    | attention | not stated | channels | channels | as executed | tests/unit/test_noise_losses.py |
    | passes per step | not stated | 12 | 9, identical gradients | one backward for images and weights | tests/unit/test_hast.py |
    | activation range | EMA of minimum and maximum on images of a GDFQ generator | its bias correction applied again at every step | least error of the rounded values on the pool (best), EMA corrected once (paper), as released (official) | the student is trained on the pool | tests/unit/test_hast.py |
    | classes of the images | not stated | drawn uniformly | balanced | few images | tests/unit/test_noise_pool.py |
    | image learning rate | not stated | 0.5, x 0.1 on a plateau | 0.2 along half a cosine (best), 0.5 with plateau (paper, official) | short budgets | tests/unit/test_noise_pool.py |
    | learning rate decay | epochs 20, 40, 60 (ImageNet: 100) | the same | at half, three quarters, nine tenths (best), as published (paper, official) | short budgets | tests/unit/test_hast.py |
    | batch | 256 (ImageNet 16) | 64 (4) per GPU | 256 (16) in budget paper, 64 (4) if also official | as stated, as configured | tests/unit/test_hast.py |
    | checkpoint reported | best on the test set | best on the test set | last | nothing is chosen on test data | tests/test_architecture.py |
    """  # fmt: skip
    kind, spec = size_class(teacher.classes, teacher.image), spec or QuantSpec()
    row = choose("--fidelity", fidelity, FIDELITY)
    small = kind != "imagenet"
    configured = {"batch": 64 if small else 4} if (budget, fidelity) == ("paper", "official") else {}
    plan = settle(
        {"decay_at": [16 / 147, 36 / 147, 56 / 147] if small else [96 / 147]},
        noise_budget(budget, teacher.image), configured, row, STATED[kind] if fidelity == "paper" else STATED["cifar10"],
        {} if small else {"lr": row["lr"] / 10},
        steps=steps, warmup=warmup, batch=batch, count=count, iterations=iterations, group=group, image_lr=image_lr,
        beta=beta, gamma=gamma, smooth=smooth, norm=norm, slow=slow, lr=lr, weight_decay=weight_decay, kl_weight=kl_weight, temperature=temperature,
        alignment=alignment, epsilon=epsilon, promotion=promotion, ranges=ranges,
    )  # fmt: skip
    choose("--promotion", plan.promotion, dict.fromkeys(("loss", "difficulty", "off")))
    student, report = quantize(teacher.net, replace(spec, weight=LiveMinMax, act=RANGES[plan.ranges]))
    make = partial(source, teacher, batch=plan.batch, fidelity=fidelity, count=plan.count, iterations=plan.iterations, group=plan.group,
                   image_lr=plan.image_lr, beta=beta, gamma=gamma, smooth=smooth, norm=norm, slow=slow)  # fmt: skip
    batches = CropSource(feed(images, make, batch=plan.batch), scale=(0.5, 1.0))

    seen: Source = batches if plan.ranges_from == "pool" else gdfq_source(teacher, batch=16, milestones=())
    calibrate(student, seen, steps=plan.warmup, run=run, observe_last=plan.observe_last)

    step = promoted(student, teacher, spec, kl_weight=kl_weight, temperature=temperature, alignment=plan.alignment,
                    epsilon=plan.epsilon, promotion=plan.promotion)  # fmt: skip
    sgd = SGD(student.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    decay = MultiStepLR(sgd, milestones_at(plan.decay_at, plan.steps), gamma=0.1)
    fit(student, teacher, batches, None, sgd, steps=plan.steps, run=run, schedulers=[decay], gradient=step,
        micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))
