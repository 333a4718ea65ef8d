"""AIT: distil with KL alone, and enlarge each layer's step until enough integer weights move (Choi et al., CVPR 2022).

"It's All In the Teacher" (arXiv 2203.17008). The images are those of another method (`base`); what changes is the student's
loss, which ignores the labels, and its optimiser step, which gradient inundation enlarges layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from zsq.errors import BadInput
from zsq.fit import calibrate, fit
from zsq.footprint import require_student_memory
from zsq.insert import QuantSpec, codes_and_latents, quantize, quantized_weights
from zsq.inundation import GradientInundation
from zsq.presets import RANGES, Outcome, choose, feed, generator_budget, settle, student_milestones
from zsq.quantizer import LiveMinMax
from zsq.recipes.autorecon import source as autorecon_source
from zsq.recipes.gdfq import source as gdfq_source
from zsq.recipes.hast import source as hast_source
from zsq.recipes.intraq import source as intraq_source
from zsq.recipes.qimera import source as qimera_source
from zsq.recipes.zeroq import source as zeroq_source
from zsq.run import Run
from zsq.sources.base import Batch, Source
from zsq.teachers import Teacher
from zsq.view import View

PAPER = "Choi et al., CVPR 2022, arXiv 2203.17008"
PARTS = "images of --base | live min/max weights, percentile activations | KL | gradient inundation"
BASES: dict[str, Callable[..., Source]] = {
    "gdfq": gdfq_source,
    "qimera": qimera_source,
    "autorecon": autorecon_source,
    "hast": hast_source,
    "intraq": intraq_source,
    "zeroq": zeroq_source,
}
POOLS = ("hast", "intraq", "zeroq")
EPOCH = 1 / 400  # the first student epoch, in which the official search stops at 128 times the step

FIDELITY: dict[str, dict[str, Any]] = {
    "best": {"ranges": "percentile", "lr": 1e-3, "observe_last": 50, "inundation": "exact", "cap": None},
    "paper": {"ranges": "ema", "lr": 1e-4, "observe_last": None, "inundation": "exact", "cap": None},
    "official": {"ranges": "official", "lr": 1e-4, "observe_last": None, "inundation": "search", "cap": 100.0},
}


def ait(
    teacher: Teacher,
    run: Run,
    *,
    spec: QuantSpec | None = None,
    images: Source | None = None,
    base: str = "gdfq",
    budget: str = "quick",
    fidelity: str = "best",
    steps: int | None = None,
    warmup: int | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    lr: float | None = None,
    weight_decay: float = 0.0,
    temperature: float = 20.0,
    kl_reduction: Literal["mean", "batchmean"] = "mean",
    ranges: Literal["percentile", "ema", "mse", "official"] | None = None,
    inundation: Literal["exact", "search", "off"] | None = None,
    flip_rate: float | None = None,
    flip_decay: float = 0.1,
    count: int | None = None,
    iterations: int | None = None,
) -> Outcome:
    """Quantize `teacher` with AIT on the images of `base`.

    Args:
        teacher: the float network.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the ranges are this recipe's.
        images: another source in place of `base`.
        base: whose images: gdfq, qimera or autorecon (generators), hast, intraq or zeroq (a pool made first).
        budget: quick, standard or paper.
        fidelity: best, paper or official.
        steps: student updates; the budget's if not given.
        warmup: generator-only steps before them; the budget's if not given.
        batch: images per step; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size, same gradient, less memory.
        lr: learning rate of the student's SGD, the fidelity's if not given; inundated layers hardly feel it, BatchNorm
            and bias do.
        weight_decay: of the student's SGD.
        temperature: of the distillation term, which carries its square.
        kl_reduction: mean (over batch and classes, as published) or batchmean.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse or official.
        inundation: exact (order statistic), search (the released bracketing) or off (KL only); the fidelity's if not given.
        flip_rate: share of a layer's integer weights that must change per step; 1e-3 up to 64 pixels, 1e-4 above.
        flip_decay: factor on the flip rate at a quarter, half and three quarters of the run.
        count: images of a base that makes a pool first; that base's if not given.
        iterations: Adam steps per image of such a pool; that base's if not given.

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for a base whose needs the teacher does not meet, or presets that do not exist.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | student loss | KL only | 400 x KL, mean over batch and classes | the same; option batchmean | as executed, named | tests/unit/test_losses.py |
    | activation range | EMA of minimum and maximum | its bias correction applied again at every step | 99.9 % of the values (best), EMA corrected once (paper), as released (official) | at 3 bits the extremes of a batch cost most of the accuracy: docs/findings.md | tests/unit/test_quantizer.py |
    | learning rate | 1e-4 | 1e-4 | 1e-3 (best), 1e-4 (paper, official) | BatchNorm and bias follow in short budgets; docs/findings.md | tests/contracts/test_recipes.py |
    | inundation factor | at least the target share changes | last midpoint of a bisection, often below the target | exact order statistic; search on request | the guarantee of the paper, no host sync | tests/unit/test_inundation.py |
    | grid while counting | not stated | recomputed from the moved weights | frozen (exact), recomputed (search) | a moving grid counts flips that change nothing | tests/unit/test_inundation.py |
    | cap on the factor | none | 128 in the first student epoch | none; official as released | nothing diverges without it | tests/unit/test_inundation.py |
    | flip rate decay | not stated | x 0.1 three times | x 0.1 three times; option | as executed | tests/unit/test_inundation.py |
    | momentum buffer | gradients are manipulated | unscaled | unscaled | as executed | tests/unit/test_inundation.py |
    | classes per image, Qimera base | not stated | 2, 25 (100 classes), 250 or 100 (ImageNet) | those of qimera | one table; any number by --recipe qimera | tests/unit/test_qimera.py |
    | ImageNet flip rate, AutoReCon base | not stated | 1e-3 by a parser default | 1e-4 as the other bases; 1e-3 (official) | the commented code says 1e-4 | tests/unit/test_autorecon.py |
    """
    small = max(teacher.image[1:]) <= 64
    pool = _pool_options(base, count=count, iterations=iterations)
    plan = settle(
        generator_budget(budget, teacher.image),
        choose("--fidelity", fidelity, FIDELITY),
        {"flip_rate": 1e-3 if small or (base, fidelity) == ("autorecon", "official") else 1e-4},
        steps=steps, warmup=warmup, batch=batch, lr=lr, weight_decay=weight_decay, temperature=temperature,
        kl_reduction=kl_reduction, ranges=ranges, inundation=inundation, flip_rate=flip_rate, flip_decay=flip_decay, base=base,
        **pool,
    )  # fmt: skip
    later = student_milestones(plan.steps, teacher.image)
    student, report = quantize(teacher.net, replace(spec or QuantSpec(), weight=LiveMinMax, act=RANGES[plan.ranges]))
    make = partial(
        choose("--base", base, BASES), teacher, batch=plan.batch, milestones=tuple(plan.warmup + m for m in later),
        fidelity=fidelity, **pool,
    )  # fmt: skip
    batches = feed(images, make, batch=plan.batch, say=run.note)
    run.note(str(require_student_memory(teacher, batch=plan.batch, micro_batch=micro_batch, beside=batches)))

    calibrate(student, batches, steps=plan.warmup, run=run, observe_last=plan.observe_last)

    def student_loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:  # the labels are not used: that is the point
        return {"kl": teacher.outputs.kl(s.logits, t.logits, temperature=temperature, reduction=kl_reduction)}

    sgd = SGD(student.parameters(), plan.lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    decay = MultiStepLR(sgd, later, gamma=0.1)
    flood = None
    if plan.inundation != "off":
        flood = GradientInundation(
            sgd, quantized_weights(student), flip_rate=plan.flip_rate, mode=plan.inundation, milestones=later,
            decay=flip_decay, cap=plan.cap, cap_steps=round(EPOCH * (plan.warmup + plan.steps)),
        )  # fmt: skip
    fit(student, teacher, batches, student_loss, sgd, steps=plan.steps, run=run, schedulers=[decay], inundation=flood,
        micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))


def _pool_options(base: str, **given: int | None) -> dict[str, int]:
    """Options of a base that makes a pool first, as far as they were given.

    Raises:
        BadInput: for one of them with a base that makes new images for every batch.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if found and base not in POOLS:
        raise BadInput(f"--{next(iter(found))}", expected=f"--base {' or '.join(POOLS)}, which make a pool first",
                       got=f"--base {base}", fix="Leave it out: a generator makes new images for every batch.")  # fmt: skip
    return found
