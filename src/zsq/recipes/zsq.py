"""Ours: a generator's images recorded once and made harder, least-error ranges, distillation on crops.

A generator never sees the student, so its images are made once and drawn many times; its labels are added to the latent.
The student learns from the teacher's logits, in bfloat16, on images moved to where the two differ more. What did not
help is an option: inundation, learned steps, reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from zsq import losses
from zsq.adam import Adam
from zsq.descent import steps_apart
from zsq.fit import calibrate, fit
from zsq.generators import AddingGenerator
from zsq.insert import QuantSpec, codes_and_latents, quantize, quantized_weights
from zsq.inundation import GradientInundation
from zsq.presets import RANGES, Outcome, choose, feed, milestones_at, settle
from zsq.quantizer import LearnedStep, LiveMinMax, MseRange
from zsq.reconstruction import reconstruct
from zsq.run import Run
from zsq.sources.base import Batch, Source, require_image_labels
from zsq.sources.crops import CropSource
from zsq.sources.generator import GeneratorSource
from zsq.sources.harder import HarderSource
from zsq.sources.recorded import RecordedSource
from zsq.teachers import Teacher
from zsq.view import View

PAPER = "ours, 2026; from arXiv 2003.03603 (generator), 2203.17008 (KL alone) and 2303.13826 (harder images)"
PARTS = "images recorded from generators | least-error weights and activations | KL on crops made harder"
WEIGHTS: dict[str, Callable[..., Any]] = {"live": LiveMinMax, "mse": MseRange, "learned": LearnedStep}
# The cube of the error: an activation cut off costs more than one rounded (docs/findings.md).
ACTIVATIONS: dict[str, Callable[..., Any]] = RANGES | {"mse": partial(MseRange, power=3.0), "learned": LearnedStep}

FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"lr": 3e-4, "step_lr": 1e-4, "ranges": "mse", "weight_ranges": "mse", "class_weight": 0.1, "bn_weight": 1.0,
             "epsilon": 0.2}
}
SMALL: dict[str, dict[str, Any]] = {  # images up to 64 pixels
    "quick": {"generators": 1, "count": 8192, "shown": 64, "lead": 25, "warmup": 10, "steps": 200, "batch": 64},
    "standard": {"generators": 4, "count": 32_768, "shown": 64, "lead": 25, "warmup": 10, "steps": 600, "batch": 64},
    "paper": {"generators": 8, "count": 131_072, "shown": 200, "lead": 100, "warmup": 20, "steps": 79_200, "batch": 200},
}
LARGE: dict[str, dict[str, Any]] = {  # the pool is kept in memory, 300 kB an image at 224 pixels
    "quick": {"generators": 1, "count": 1024, "shown": 16, "lead": 100, "warmup": 20, "steps": 300, "batch": 16},
    "standard": {"generators": 2, "count": 2048, "shown": 16, "lead": 200, "warmup": 20, "steps": 1500, "batch": 16},
    "paper": {"generators": 4, "count": 8192, "shown": 16, "lead": 1000, "warmup": 50, "steps": 70_000, "batch": 64},
}


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...] = (), fidelity: str = "best", generators: int = 1,
    count: int = 8192, shown: int = 64, lead: int = 25, class_weight: float = 0.1, bn_weight: float = 1.0,
) -> RecordedSource:  # fmt: skip
    """Images of a generator, recorded at every step of its training.

    Args:
        teacher: needs BatchNorm layers.
        batch: images per draw.
        milestones: not used: the pool does not learn while it is read.
        fidelity: best only.
        generators: how many of them learn, one after the other, each from other numbers.
        count: images to draw from, of all generators together.
        shown: images a generator makes per step.
        lead: first steps of each generator, whose images are not kept.
        class_weight: weight of the generator's cross-entropy with the label asked for.
        bn_weight: weight of its statistics term.
    """
    choose("--fidelity", fidelity, FIDELITY)
    require_image_labels(teacher, "zsq")
    length = lead + 9 * count // (8 * max(1, generators) * max(1, shown))

    def generator_loss(t: View, made: Batch) -> dict[str, Tensor]:
        asked = class_weight * losses.cross_entropy(t.logits, made.labels)
        return {"g_ce": asked, "g_bns": bn_weight * losses.bn_gap(t.norms)}

    def build() -> GeneratorSource:
        net = AddingGenerator(teacher.classes, teacher.image)
        return GeneratorSource(teacher, net, generator_loss, name="zsq", batch=shown,
                               milestones=milestones_at((0.6, 0.85), length))  # fmt: skip

    return RecordedSource(teacher, [build] * generators, name="zsq", batch=batch, count=count, shown=shown, lead=lead)


def zsq(
    teacher: Teacher, run: Run, *, spec: QuantSpec | None = None, images: Source | None = None,
    budget: str = "quick", fidelity: str = "best", steps: int | None = None, warmup: int | None = None,
    batch: int | None = None, micro_batch: int | None = None, generators: int | None = None,
    count: int | None = None, shown: int | None = None, lead: int | None = None, class_weight: float | None = None,
    bn_weight: float | None = None, scale: float = 0.5, epsilon: float | None = None, lr: float | None = None, step_lr: float | None = None,
    temperature: float | None = None, kl_reduction: Literal["mean", "batchmean"] = "mean",
    ranges: Literal["percentile", "ema", "mse", "learned"] | None = None,
    weight_ranges: Literal["live", "mse", "learned"] | None = None, rounding: int = 0,
    flip_rate: float = 0.0, precision: Literal["bf16", "float32"] | None = None,
) -> Outcome:  # fmt: skip
    """Quantize `teacher` with our own recipe.

    Args:
        teacher: the float network.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the range rules are this recipe's.
        images: another source in place of the recorded images.
        budget: quick, standard or paper.
        fidelity: best only; there is no other program to be faithful to.
        steps: updates of the student, 0 for calibration only; the budget's if not given.
        warmup: batches the ranges are taken from; the budget's if not given.
        batch: images per update; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size, same gradient, less memory; images are made
            harder as a whole batch all the same (`--epsilon 0` avoids that).
        generators: how many learn, one after the other; the budget's if not given.
        count: images to record; the budget's if not given.
        shown: images a generator makes per step; the budget's if not given.
        lead: first steps of each generator, whose images are not kept; the budget's if not given.
        class_weight: weight of the generator's cross-entropy with the label asked for.
        bn_weight: weight of its BatchNorm-statistics term.
        scale: smallest share of an image that the random crops of the distillation keep; 1 for whole images.
        epsilon: most that a pixel is moved uphill on the loss before the student learns from the image (in the teacher's
            normalised space; an image's share of it is drawn at random); 0 for images as they are.
        lr: learning rate of the student's Adam, falls along half a cosine.
        step_lr: the same, of learned step sizes and offsets.
        temperature: of the distillation term, which carries its square; 4 up to 30 classes, 20 above, if not given.
        kl_reduction: mean (over batch and classes) or batchmean.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or learned.
        weight_ranges: rule of the weights' ranges: live (minimum and maximum, at every call), mse (fixed) or learned.
        rounding: steps of block-wise reconstruction before the distillation, per block, 0 for none; needs weight ranges
            that do not follow the weights.
        flip_rate: share of a layer's integer weights that must change per step (AIT), x 0.1 at a quarter, half and three
            quarters of the run; 0 for plain steps.
        precision: of the convolutions of both networks in the distillation; the teacher's if not given.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm (unless `images` are given), or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | label input of the generator | multiplied into the latent (GDFQ) | the same | added to it | 100 classes are learned in 50 steps instead of not in 400 | tests/unit/test_generators.py |
    | images | a new batch per student step, made while the student waits (GDFQ, AIT) | the same | recorded once, drawn with replacement, cropped | the generator does not see the student, and its step is more than half of a step of ait | tests/unit/test_recorded.py |
    | generator steps before the first image | 4 epochs of 200 | the same | 25 | early images are other images, not worse ones: docs/findings.md | tests/unit/test_zsq_recipe.py |
    | activation range | EMA of minimum and maximum | its bias correction applied again at every step | least cubed error of the rounded values | at 3 bits the largest lever found: docs/findings.md | tests/unit/test_zsq_recipe.py |
    | weight range | minimum and maximum, at every call | the same | least error, fixed | a better start, and the grid stays | tests/unit/test_zsq_recipe.py |
    | harder images | moved by one step of the same small size, learned from beside the images themselves (HAST) | the same | each moved by its own random share of a larger step, only these learned from | docs/findings.md | tests/unit/test_harder.py |
    | temperature | 20 | 20 | 4 up to 30 classes, 20 above | docs/findings.md | tests/unit/test_zsq_recipe.py |
    | student's optimizer | SGD (GDFQ, AIT, HAST) | the same | Adam | on harder images it may move weights further: docs/findings.md | tests/unit/test_zsq_recipe.py |
    | flip rate | 1e-3, x 0.1 three times (AIT) | the same | 0: plain steps of a rate that moves codes by itself; option | no gain seen: docs/findings.md | tests/unit/test_zsq_recipe.py |
    | precision | float32 | float32 | bfloat16 convolutions, float32 quantizers and losses | no loss seen in short runs, 1.5 times faster where the processor has it | tests/unit/test_fit.py |
    | learned steps (LSQ+), reconstruction (BRECQ) | each a method of its own | the same | options, off | no gain seen: docs/findings.md | tests/unit/test_zsq_recipe.py |
    """  # fmt: skip
    small = max(teacher.image[1:]) <= 64
    plan = settle(
        choose("--budget", budget, SMALL if small else LARGE), choose("--fidelity", fidelity, FIDELITY),
        {"temperature": 4.0 if teacher.classes <= 30 else 20.0},
        steps=steps, warmup=warmup, batch=batch, generators=generators, count=count, shown=shown, lead=lead,
        class_weight=class_weight, bn_weight=bn_weight, scale=scale, epsilon=epsilon, lr=lr, step_lr=step_lr, temperature=temperature,
        kl_reduction=kl_reduction, ranges=ranges, weight_ranges=weight_ranges, rounding=rounding, flip_rate=flip_rate,
        precision=precision or teacher.precision,
    )  # fmt: skip
    rules = choose("--weight-ranges", plan.weight_ranges, WEIGHTS), choose("--ranges", plan.ranges, ACTIVATIONS)
    student, report = quantize(teacher.net, replace(spec or QuantSpec(), weight=rules[0], act=rules[1]))
    make = partial(source, teacher, batch=plan.batch, fidelity=fidelity, generators=plan.generators, count=plan.count,
                   shown=plan.shown, lead=plan.lead, class_weight=plan.class_weight, bn_weight=plan.bn_weight)  # fmt: skip
    pool = feed(images, make, batch=plan.batch)
    batches = CropSource(pool, scale=(plan.scale, 1.0)) if plan.scale < 1 else pool

    calibrate(student, pool, steps=plan.warmup, run=run)
    if plan.rounding:
        reconstruct(student, teacher, pool, steps=plan.rounding, run=run, micro_batch=micro_batch)

    kl = partial(teacher.outputs.kl, temperature=plan.temperature, reduction=kl_reduction)
    if plan.epsilon:
        gap = partial(kl, through_teacher=True)
        batches = HarderSource(batches, teacher, student, gap, epsilon=plan.epsilon, precision=plan.precision)
    adam = Adam(steps_apart(student, lr=plan.lr, step_lr=plan.step_lr))
    decay = CosineAnnealingLR(adam, max(1, plan.steps))
    flood = None
    if plan.flip_rate:
        flood = GradientInundation(adam, quantized_weights(student), flip_rate=plan.flip_rate,
                                   milestones=milestones_at((0.25, 0.5, 0.75), plan.steps))  # fmt: skip
    fit(student, teacher, batches, lambda s, t, _: {"kl": kl(s.logits, t.logits)}, adam, steps=plan.steps, run=run,
        schedulers=[decay], inundation=flood, micro_batch=micro_batch, precision=plan.precision,
        history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))
