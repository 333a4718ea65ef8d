"""AutoReCon: GDFQ with a generator found by architecture search for reconstruction (Zhu et al., IJCAI 2021).

"AutoReCon: Neural Architecture Search-based Reconstruction for Data-free Compression" (arXiv 2105.12151). The search itself was
not released, only what it found: five generators, of which the one found for the most similar teacher is used.
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
from zsq.footprint import require_generator_memory, require_student_memory
from zsq.generators_searched import SearchedGenerator, choose_architecture
from zsq.insert import QuantSpec, codes_and_latents, quantize
from zsq.presets import RANGES, Outcome, choose, feed, generator_budget, settle, student_milestones
from zsq.quantizer import LiveMinMax
from zsq.run import Run
from zsq.sources.base import Batch, Source, require_image_labels
from zsq.sources.generator import GeneratorSource, gaussian_latents
from zsq.teachers import Teacher
from zsq.view import View

PAPER = "Zhu et al., IJCAI 2021, arXiv 2105.12151"
PARTS = "searched generator | live min/max weights, percentile activations | KL + cross-entropy"

FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"ranges": "percentile", "lr": 1e-3, "observe_last": 50},
    "paper": {"ranges": "ema", "lr": 1e-4, "observe_last": None},
    "official": {"ranges": "official", "lr": 1e-4, "observe_last": None},
}


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...], fidelity: str = "best", architecture: str | None = None,
    bn_weight: float = 0.1, lr: float = 1e-3,
) -> GeneratorSource:  # fmt: skip
    """The AutoReCon generator: cross-entropy plus 0.1 times the BatchNorm-statistics gap.

    Args:
        teacher: needs BatchNorm layers.
        batch: images per step.
        milestones: steps at which the learning rate decays by 0.1.
        fidelity: of other generators of the family; this one is the same in all three.
        architecture: key of `zsq.generators_searched.ARCHITECTURES`; that of the most similar teacher if not given.
        bn_weight: weight of the statistics term.
        lr: of Adam, betas (0.5, 0.999).
    """
    require_image_labels(teacher, "autorecon")
    chosen = architecture or choose_architecture(teacher.name, teacher.classes, teacher.image)
    build = partial(SearchedGenerator, chosen, teacher.classes, teacher.image)
    latents = gaussian_latents(SearchedGenerator.latent, teacher.classes)
    cost = require_generator_memory(teacher, build, latents, batch=batch)

    def generator_loss(t: View, batch: Batch) -> dict[str, Tensor]:
        return {"g_ce": losses.cross_entropy(t.logits, batch.labels), "g_bns": bn_weight * losses.bn_gap(t.norms)}

    return GeneratorSource(teacher, build(), generator_loss, name="autorecon", batch=batch, lr=lr, milestones=milestones,
                           latents=latents, cost=cost)  # fmt: skip


def autorecon(
    teacher: Teacher,
    run: Run,
    *,
    spec: QuantSpec | None = None,
    images: Source | None = None,
    budget: str = "quick",
    fidelity: str = "best",
    steps: int | None = None,
    warmup: int | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    lr: float | None = None,
    weight_decay: float = 1e-4,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 20.0,
    kl_reduction: Literal["mean", "batchmean"] = "mean",
    ranges: Literal["percentile", "ema", "mse", "official"] | None = None,
    architecture: str | None = None,
) -> Outcome:
    """Quantize `teacher` with AutoReCon.

    Args:
        teacher: the float network.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the ranges are this recipe's.
        images: another source in place of the generator.
        budget: quick, standard or paper.
        fidelity: best, paper or official.
        steps: student updates; the budget's if not given.
        warmup: generator-only steps before them; the budget's if not given.
        batch: images per step; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size, same gradient, less memory.
        lr: learning rate of the student's SGD; the fidelity's if not given.
        weight_decay: of the student's SGD.
        ce_weight: weight of the cross-entropy with the label asked for.
        kl_weight: weight of the distillation term.
        temperature: of the distillation term, which carries its square.
        kl_reduction: mean (over batch and classes, as published) or batchmean.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or official.
        architecture: cifar10-resnet20, cifar100-resnet20, imagenet-resnet18, imagenet-resnet50 or imagenet-mobilenetv2;
            that of the most similar teacher, by image size, classes and name, if not given.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm, presets that do not exist, or too little memory.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | generator | searched per teacher | five results of the search | the same five; the nearest for other teachers, option | the search was not released | tests/unit/test_autorecon.py |
    | unused branches | not stated | computed and multiplied by zero | left out | adds exactly nothing, and neither does its gradient | tests/unit/test_autorecon.py |
    | normalisation before each operation | not stated | once per operation | once per tensor | the same numbers | tests/unit/test_autorecon.py |
    | nearest up-sampling | not stated | before what reads it | after it, dilated convolutions included | the same numbers with a quarter of the work | tests/unit/test_autorecon.py |
    | class tables | not stated | 1000 rows everywhere | one row per class | the others are never read | tests/unit/test_autorecon.py |
    | losses, schedule, student | not stated | those of AIT only | those of GDFQ | the trainer is GDFQ's line for line; the baseline's own numbers were not released | tests/contracts/test_recipes.py |
    | activation range | EMA of minimum and maximum | its bias correction applied again at every step | 99.9 % of the values (best), EMA corrected once (paper), as released (official) | at 3 bits the extremes of a batch cost most of the accuracy | tests/unit/test_quantizer.py |
    """
    plan = settle(
        generator_budget(budget, teacher.image),
        choose("--fidelity", fidelity, FIDELITY),
        steps=steps, warmup=warmup, batch=batch, lr=lr, weight_decay=weight_decay, ce_weight=ce_weight,
        kl_weight=kl_weight, temperature=temperature, kl_reduction=kl_reduction, ranges=ranges,
        architecture=architecture or choose_architecture(teacher.name, teacher.classes, teacher.image),
    )  # fmt: skip
    later = student_milestones(plan.steps, teacher.image)
    student, report = quantize(teacher.net, replace(spec or QuantSpec(), weight=LiveMinMax, act=RANGES[plan.ranges]))
    make = partial(
        source,
        teacher,
        batch=plan.batch,
        milestones=tuple(plan.warmup + m for m in later),
        architecture=plan.architecture,
    )
    batches = feed(images, make, batch=plan.batch, say=run.note)
    run.note(str(require_student_memory(teacher, batch=plan.batch, micro_batch=micro_batch, beside=batches)))

    calibrate(student, batches, steps=plan.warmup, run=run, observe_last=plan.observe_last)

    def student_loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        return {
            "kl": kl_weight * teacher.outputs.kl(s.logits, t.logits, temperature=temperature, reduction=kl_reduction),
            "ce": ce_weight * losses.cross_entropy(s.logits, batch.labels),
        }

    sgd = SGD(student.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    decay = MultiStepLR(sgd, later, gamma=0.1)
    fit(student, teacher, batches, student_loss, sgd, steps=plan.steps, run=run, schedulers=[decay],
        micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))
