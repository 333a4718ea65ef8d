"""Qimera: a generator whose images may lie between classes, near the teacher's boundaries (Choi et al., NeurIPS 2021).

"Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples" (arXiv 2111.02625). GDFQ with three changes: a
share of the batches superposes the embeddings of several classes, embeddings start as the rows of the teacher's classifier,
and a linear map may disentangle them. Generator and student see the mixture's weights as soft labels.
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
from zsq.generators_superposed import SuperposedGenerator
from zsq.insert import QuantSpec, codes_and_latents, quantize
from zsq.presets import RANGES, Outcome, choose, feed, generator_budget, settle, student_milestones
from zsq.quantizer import LiveMinMax
from zsq.run import Run
from zsq.sources.base import Batch, Source, require_image_labels
from zsq.sources.generator import GeneratorSource
from zsq.sources.superposed import first_embedding, published, superposed_latents
from zsq.teachers import Teacher
from zsq.view import View

PAPER = "Choi et al., NeurIPS 2021, arXiv 2111.02625"
PARTS = "superposed embeddings | live min/max weights, percentile activations | KL + soft cross-entropy"

FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"ranges": "percentile", "lr": 1e-3, "observe_last": 50, "embedding": "extracted", "statistics": "sample",
             "mixing": "sum"},
    "paper": {"ranges": "ema", "lr": 1e-4, "observe_last": None, "embedding": "extracted", "statistics": "sample",
              "mixing": "sum", "disentangle": True},
    "official": {"ranges": "official", "lr": 1e-4, "observe_last": None, "statistics": "slot", "mixing": "mean",
                 "disentangle": False},
}  # fmt: skip


def source(
    teacher: Teacher, *, batch: int, milestones: tuple[int, ...], fidelity: str = "best", weight_bits: int = 4,
    superposed: float | None = None, slots: int | None = None, embedding: str | None = None,
    disentangle: bool | None = None, bn_weight: float = 0.1, lr: float = 1e-3,
) -> GeneratorSource:  # fmt: skip
    """The Qimera generator: soft cross-entropy plus 0.1 times the BatchNorm-statistics gap.

    Args:
        teacher: needs BatchNorm layers, and a classifier for the extracted embedding.
        batch: images per step.
        milestones: steps at which the learning rate decays by 0.1.
        fidelity: best, paper or official: embedding stage and mixing of the BatchNorms' class tables.
        weight_bits: of the student; published numbers of slots depend on it.
        superposed: probability that a batch is superposed; the published one if not given.
        slots: classes per superposed image; the published number if not given.
        embedding: extracted or random; the fidelity's if not given.
        disentangle: whether a linear map to 100 numbers comes before the first layer; the fidelity's if not given.
        bn_weight: weight of the statistics term.
        lr: of Adam, betas (0.5, 0.999).
    """
    require_image_labels(teacher, "qimera")
    net = settle(
        published(teacher, weight_bits), choose("--fidelity", fidelity, FIDELITY),
        superposed=superposed, slots=slots, embedding=embedding, disentangle=disentangle,
    )  # fmt: skip
    features, start = first_embedding(teacher, net.embedding)
    build = partial(
        SuperposedGenerator, teacher.classes, teacher.image, features,
        disentangle=net.disentangle, statistics=net.statistics, mixing=net.mixing,
    )  # fmt: skip
    latents = superposed_latents(features, teacher.classes, superposed=net.superposed, slots=net.slots)
    smaller = "" if net.disentangle else "Use --disentangle"
    cost = require_generator_memory(teacher, build, latents, batch=batch, instead=smaller)

    def generator_loss(t: View, batch: Batch) -> dict[str, Tensor]:
        return {"g_ce": losses.cross_entropy(t.logits, batch.labels), "g_bns": bn_weight * losses.bn_gap(t.norms)}

    return GeneratorSource(teacher, build(embedding=start), generator_loss, name="qimera", batch=batch, lr=lr,
                           milestones=milestones, latents=latents, cost=cost)  # fmt: skip


def qimera(
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
    superposed: float | None = None,
    slots: int | None = None,
    embedding: Literal["extracted", "random"] | None = None,
    disentangle: bool | None = None,
) -> Outcome:
    """Quantize `teacher` with Qimera.

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
        ce_weight: weight of the cross-entropy with the soft labels asked for.
        kl_weight: weight of the distillation term.
        temperature: of the distillation term, which carries its square.
        kl_reduction: mean (over batch and classes, as published) or batchmean.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or official.
        superposed: probability that a batch is superposed; the published one for this size of data if not given.
        slots: classes per superposed image, drawn with repeats; the published number for this size of data if not given.
        embedding: extracted (the rows of the teacher's classifier) or random; the fidelity's if not given.
        disentangle: put a linear map to 100 numbers before the first layer; the fidelity's if not given.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a teacher without BatchNorm or classifier, or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | mixing of the BatchNorms' class tables (above 64 pixels) | weighted sum | weighted sum divided by K: superposed images start blank | weighted sum (best, paper), divided (official) | the released form multiplies the signal by 1/K three times | tests/unit/test_qimera.py |
    | statistics of an embedding in superposed batches | not stated | per slot, over batch and features | per sample as for single classes (best, paper), per slot (official) | one rule for both kinds of batch | tests/unit/test_qimera.py |
    | disentanglement | on | off: the flag is inverted and no script passes it | above 64 pixels (best), on (paper), off (official); option | linear before linear: only the rank and the memory differ | tests/unit/test_qimera.py |
    | first embedding | teacher's classifier | teacher's classifier, or random for CIFAR-10, ResNet-18, MobileNetV2 | teacher's classifier (best, paper), as released (official); option | the paper's method | tests/unit/test_qimera.py |
    | probability and number of classes | by ablation | one pair per script | the released pair for data of that size, 4 or 5 bits; options | as executed | tests/unit/test_qimera.py |
    | learning rate | not stated | 1e-4 (CIFAR), 1e-6 (ImageNet) | 1e-3 (best), 1e-4 or above 64 pixels 1e-6 (paper, official) | short budgets, as for GDFQ | tests/contracts/test_recipes.py |
    | activation range | EMA of minimum and maximum | its bias correction applied again at every step | 99.9 % of the values (best), EMA corrected once (paper), as released (official) | at 3 bits the extremes of a batch cost most of the accuracy | tests/unit/test_quantizer.py |
    """
    spec = spec or QuantSpec()
    plan = settle(
        generator_budget(budget, teacher.image),
        published(teacher, spec.weight_bits),
        choose("--fidelity", fidelity, FIDELITY),
        {"lr": 1e-6} if max(teacher.image[1:]) > 64 and fidelity != "best" else {},
        steps=steps, warmup=warmup, batch=batch, lr=lr, weight_decay=weight_decay, ce_weight=ce_weight,
        kl_weight=kl_weight, temperature=temperature, kl_reduction=kl_reduction, ranges=ranges, superposed=superposed,
        slots=slots, embedding=embedding, disentangle=disentangle,
    )  # fmt: skip
    later = student_milestones(plan.steps, teacher.image)
    student, report = quantize(teacher.net, replace(spec, weight=LiveMinMax, act=RANGES[plan.ranges]))
    make = partial(
        source, teacher, batch=plan.batch, milestones=tuple(plan.warmup + m for m in later), fidelity=fidelity,
        superposed=plan.superposed, slots=plan.slots, embedding=plan.embedding, disentangle=plan.disentangle,
    )  # fmt: skip
    batches = feed(images, make, batch=plan.batch, say=run.note)
    run.note(str(require_student_memory(teacher, batch=plan.batch, micro_batch=micro_batch, beside=batches)))

    calibrate(student, batches, steps=plan.warmup, run=run, observe_last=plan.observe_last)

    def student_loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:  # soft labels: rows of the mixture
        return {
            "kl": kl_weight * teacher.outputs.kl(s.logits, t.logits, temperature=temperature, reduction=kl_reduction),
            "ce": ce_weight * losses.cross_entropy(s.logits, batch.labels),
        }

    sgd = SGD(student.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    decay = MultiStepLR(sgd, later, gamma=0.1)
    fit(student, teacher, batches, student_loss, sgd, steps=plan.steps, run=run, schedulers=[decay],
        micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))
