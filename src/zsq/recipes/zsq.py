"""Ours: hard images from noise, then distillation with learned steps; learned rounding on request.

Images as HAST makes them, learned step sizes as in LSQ+, block-wise reconstruction as in BRECQ (off by default: it showed
no gain in short runs), and a distillation on crops of the images. Its scores are not measured as a table yet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from zsq import losses
from zsq.fit import calibrate, fit
from zsq.insert import QuantSpec, codes_and_latents, quantize
from zsq.presets import Outcome, choose, feed, settle
from zsq.quantizer import LearnedStep
from zsq.recipes.hast import source as hast_source
from zsq.reconstruction import reconstruct
from zsq.run import Run
from zsq.sources.base import Batch, Source
from zsq.sources.crops import CropSource
from zsq.sources.noise_pool import NoiseSource
from zsq.teachers import Teacher
from zsq.view import View

PAPER = "ours, 2026; images arXiv 2303.13826, blocks arXiv 2102.05426, steps arXiv 1902.08153"
PARTS = "hard images from noise | learned steps for weights and activations | reconstruction of blocks, then KL"

FIDELITY: dict[str, dict[str, Any]] = {"best": {"lr": 5e-4, "step_lr": 1e-4}}
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {"count": 512, "iterations": 150, "group": 288, "warmup": 10, "rounding": 0, "steps": 400, "batch": 64},
    "standard": {"count": 1024, "iterations": 150, "group": 288, "warmup": 20, "rounding": 0, "steps": 1000, "batch": 64},
    "paper": {"count": 5120, "iterations": 1000, "group": 256, "warmup": 50, "rounding": 0, "steps": 29_400, "batch": 256},
}  # fmt: skip


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...] = (), fidelity: str = "best",
    count: int = 512, iterations: int = 150, group: int = 288, image_lr: float | None = None,
    beta: float | None = None, gamma: float | None = None,
) -> NoiseSource:  # fmt: skip
    """Hard images from noise, those of `hast`.

    Args:
        teacher: needs BatchNorm layers.
        batch: images per draw.
        milestones: not used: the pool does not learn while it is read.
        fidelity: best only.
        count: images to draw from.
        iterations: Adam steps per image.
        group: images optimised together.
        image_lr: of Adam on the pixels; 0.2 if not given.
        beta: weight of the class loss; 10 up to 64 pixels, 0.1 above.
        gamma: exponent of the difficulty; 2 up to 64 pixels, 0.5 above.
    """
    choose("--fidelity", fidelity, FIDELITY)
    return hast_source(teacher, batch=batch, count=count, iterations=iterations, group=group, image_lr=image_lr,
                       beta=beta, gamma=gamma)  # fmt: skip


def zsq(
    teacher: Teacher, run: Run, *, spec: QuantSpec | None = None, images: Source | None = None,
    budget: str = "quick", fidelity: str = "best", steps: int | None = None, warmup: int | None = None,
    batch: int | None = None, micro_batch: int | None = None, count: int | None = None,
    iterations: int | None = None, group: int | None = None, image_lr: float | None = None,
    beta: float | None = None, gamma: float | None = None, scale: float = 0.5, rounding: int | None = None,
    lr: float | None = None, step_lr: float | None = None, temperature: float = 4.0,
    kl_reduction: Literal["mean", "batchmean"] = "batchmean",
) -> Outcome:  # fmt: skip
    """Quantize `teacher` with our own recipe.

    Args:
        teacher: the float network.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the range rules are this recipe's.
        images: another source in place of the images from noise.
        budget: quick, standard or paper.
        fidelity: best only; there is no other program to be faithful to.
        steps: updates of the distillation, 0 for none; the budget's if not given.
        warmup: batches the first ranges are taken from; the budget's if not given.
        batch: images per step; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size, same gradient, less memory.
        count: images to make; the budget's if not given.
        iterations: Adam steps per image; the budget's if not given.
        group: images optimised together, whose statistics are compared.
        image_lr: learning rate on the pixels; 0.2 if not given.
        beta: weight of the images' class loss; 10 up to 64 pixels, 0.1 above.
        gamma: exponent of the difficulty in it, 0 for plain cross-entropy; 2 up to 64 pixels, 0.5 above.
        scale: smallest share of an image that the random crops of the distillation keep; 1 for whole images.
        rounding: steps of the reconstruction per block, 0 for none, which all budgets take.
        lr: Adam's learning rate of weights, BatchNorm factors and biases; falls along half a cosine.
        step_lr: the same, of step sizes and offsets.
        temperature: of the distillation term, which carries its square.
        kl_reduction: batchmean (over images) or mean (over images and classes).

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm (unless `images` are given), or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | ranges | min/max (HAST); least error, then learned (LSQ+) | min/max | least error, then learned, weights and activations | min/max wastes most of a 3-bit grid | tests/unit/test_zsq_recipe.py |
    | reconstruction | first and last layer at 8 bits (BRECQ) | the same | all layers at the asked bits | the protocol of all-layer methods | tests/unit/test_reconstruction.py |
    | distillation after reconstruction | none (BRECQ), KL without it (HAST) | the same | KL on crops of the images; reconstruction on request | no gain of it seen in short runs | tests/unit/test_zsq_recipe.py |
    """  # fmt: skip
    plan = settle(
        choose("--budget", budget, BUDGETS), choose("--fidelity", fidelity, FIDELITY),
        steps=steps, warmup=warmup, batch=batch, count=count, iterations=iterations, group=group, image_lr=image_lr,
        beta=beta, gamma=gamma, scale=scale, rounding=rounding, lr=lr, step_lr=step_lr, temperature=temperature,
        kl_reduction=kl_reduction,
    )  # fmt: skip
    student, report = quantize(teacher.net, replace(spec or QuantSpec(), weight=LearnedStep, act=LearnedStep))
    make = partial(source, teacher, batch=plan.batch, fidelity=fidelity, count=plan.count, iterations=plan.iterations,
                   group=plan.group, image_lr=image_lr, beta=beta, gamma=gamma)  # fmt: skip
    pool = feed(images, make, batch=plan.batch)
    batches = CropSource(pool, scale=(plan.scale, 1.0)) if plan.scale < 1 else pool

    calibrate(student, pool, steps=plan.warmup, run=run)
    if plan.rounding:
        reconstruct(student, teacher, pool, steps=plan.rounding, run=run, count=plan.count, micro_batch=micro_batch)

    def student_loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        return {"kl": losses.kl(s.logits, t.logits, temperature=temperature, reduction=kl_reduction)}

    adam = Adam(_groups(student, plan.lr, plan.step_lr))
    decay = CosineAnnealingLR(adam, max(1, plan.steps))
    fit(student, teacher, batches, student_loss, adam, steps=plan.steps, run=run, schedulers=[decay],
        micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))


def _groups(student: nn.Module, lr: float, step_lr: float) -> list[dict[str, Any]]:
    """Parameters of the quantizers, and all others, each with its learning rate."""
    quantizers = [m for m in student.modules() if isinstance(m, LearnedStep)]
    own = {id(p): p for m in quantizers for p in m.parameters()}
    others = [p for p in student.parameters() if id(p) not in own]
    return [{"params": others, "lr": lr}, {"params": list(own.values()), "lr": step_lr}]
