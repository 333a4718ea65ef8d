"""ZAQ: a generator looks for images on which teacher and student differ, the student learns from them (Liu et al., CVPR 2021).

"Zero-shot Adversarial Quantization" (arXiv 2103.15263). The difference is that of the outputs plus that of the channels'
relations at the end of every stage. It needs neither labels nor BatchNorm statistics: any network, any task with raw
outputs. Corrected: drawn images give the ranges, and keep the student where real images are while the generator attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from zsq.correction import correct_moments
from zsq.descent import bounded_descent
from zsq.discrepancy import stage_gap, task_gap
from zsq.fit import calibrate, fit
from zsq.generators_adversarial import AdversaryGenerator, input_space
from zsq.health import Health
from zsq.insert import QuantSpec, codes_and_latents, quantize
from zsq.presets import RANGES, Outcome, adversary_budget, adversary_by_subject, choose, feed, image_size, settle
from zsq.quantizer import LiveMinMax
from zsq.run import Run
from zsq.sources.adversary import AdversarySource
from zsq.sources.base import Source
from zsq.sources.crops import CropSource
from zsq.sources.leaves import LeavesSource
from zsq.sources.mixed import mix
from zsq.teachers import Teacher
from zsq.two_level import adversary_loss, transfer_gradient
from zsq.units import find_stages

PAPER = "Liu et al., CVPR 2021, arXiv 2103.15263"
PARTS = "drawn images and an adversarial generator | live min/max weights, moments corrected | output L1 + channel relations"
Switch = Literal["on", "off"]
RELEASED: dict[str, Any] = {
    "loss": "l1", "features": "feature_l1", "stage_weights": "uniform", "alpha": 1.0, "beta": 0.1, "damping": "off", "frozen": "off",
    "optimizer": "sgd", "lr": 0.1, "decay": "steps", "clip": 0.0, "ranges": "widening", "symmetric": "off", "correction": "off",
    "leaves": 0, "share": 1.0, "turns": 5, "replay": 0.0, "restart": "off", "width": 64, "generator_lr": 1e-3,
    "betas": [0.9, 0.999], "bns_weight": 0.0,
}  # fmt: skip
BEST: dict[str, Any] = {
    "loss": "l1", "features": "crm", "stage_weights": "adaptive", "alpha": 1.0, "beta": 0.05, "damping": "on", "frozen": "on",
    "optimizer": "adam", "lr": 1e-4, "decay": "cosine", "clip": 0.0, "ranges": None, "symmetric": "off", "correction": "moments",
    "leaves": None, "share": 0.25, "turns": 5, "replay": 0.5, "restart": "on", "width": 32, "generator_lr": 1e-3,
    "betas": [0.5, 0.999], "bns_weight": 0.0,
}  # fmt: skip
STATED = {"symmetric": "on", "features": "crm", "stage_weights": "adaptive", "alpha": 0.1, "beta": 0.05}
FIDELITY = {"best": BEST, "paper": {**RELEASED, **STATED}, "official": RELEASED}
CROPS = (0.4, 1.0)  # share of a drawn image that the student is shown


def source(
    teacher: Teacher, *, student: nn.Module, batch: int, milestones: tuple[int, ...] = (), fidelity: str = "best",
    image: tuple[int, int, int] | None = None, say: Callable[[str], None] | None = None, **options: Any,
) -> AdversarySource:  # fmt: skip
    """The adversary (zaq.md, sections 2 to 5): minimises -D_o - alpha D_f + beta L_a, damped by a logarithm if asked to.

    Args:
        teacher: any network.
        student: whose gap to the teacher the images widen.
        batch: images per draw.
        milestones: draws at which the generator's learning rate decays by 0.1.
        fidelity: best, paper or official.
        image: (c, h, w) of the images; the teacher's if not given.
        say: is told about a restart.
        options: in place of what the row of `FIDELITY` says.
    """
    row, size = settle(choose("--fidelity", fidelity, FIDELITY), **options), image or teacher.image
    loss = adversary_loss(teacher.outputs, alpha=row.alpha, beta=row.beta, damped=row.damping == "on", anchor=row.bns_weight,
                          features=partial(stage_gap, form=row.features, weighting=row.stage_weights))  # fmt: skip
    build = partial(AdversaryGenerator, size, input_space(size, teacher.mean, teacher.std, teacher.device), width=row.width)
    return AdversarySource(
        teacher, student, lambda rng: build(rng=rng), loss, name="zaq+bns" if row.bns_weight else "zaq", batch=batch,
        stages=[] if row.features == "off" else find_stages(teacher.net, size), norms=row.bns_weight > 0,
        betas=tuple(row.betas), lr=row.generator_lr, milestones=milestones, turns=row.turns, replay=row.replay,
        watch=20 if row.restart == "on" else 0, say=say,
    )  # fmt: skip


def zaq(
    teacher: Teacher, run: Run, *, spec: QuantSpec | None = None, images: Source | None = None, budget: str = "quick",
    fidelity: str = "best", steps: int | None = None, warmup: int | None = None, batch: int | None = None,
    micro_batch: int | None = None, size: str | None = None, width: int | None = None, turns: int | None = None,
    generator_lr: float | None = None, optimizer: Literal["sgd", "adam"] | None = None, lr: float | None = None,
    weight_decay: float = 5e-4, decay: Literal["cosine", "steps"] | None = None, clip: float | None = None,
    alpha: float | None = None, beta: float | None = None, features: Literal["crm", "feature_l1", "off"] | None = None,
    stage_weights: Literal["adaptive", "uniform", "softmax"] | None = None, damping: Switch | None = None,
    leaves: int | None = None, share: float | None = None, replay: float | None = None, restart: Switch | None = None,
    frozen: Switch | None = None, bns_weight: float | None = None, symmetric: Switch | None = None,
    ranges: Literal["percentile", "ema", "mse", "cubed", "widening"] | None = None, loss: Literal["l1", "kl"] | None = None,
    correction: Literal["moments", "means", "off"] | None = None,
) -> Outcome:  # fmt: skip
    """Quantize `teacher` with ZAQ.

    Args:
        teacher: the float network; it needs neither BatchNorm nor classes.
        run: where progress, checkpoints and results go.
        spec: bits, placement, patterns; the ranges are this recipe's.
        images: another source in place of the adversary.
        budget: quick, standard or paper.
        fidelity: best, paper or official (the released behaviour without its ranges from the test set).
        steps: student updates; the budget's if not given.
        warmup: batches the activation ranges are taken from; the budget's if not given.
        batch: images per step; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size, same gradient, less memory.
        size: HxW of the generated images, for networks that take any size; the teacher's if not given.
        width: channels of the generator's last layers; the fidelity's if not given, half of it above 64 pixels.
        turns: student updates per step of the generator.
        generator_lr: of the generator's Adam.
        optimizer: of the student: adam (the corrected value) or sgd, as published.
        lr: of the student; the fidelity's if not given.
        weight_decay: of the student's SGD; with frozen statistics, of weights only.
        decay: of the student's learning rate: along half a cosine, or by 0.1 after each third of the run.
        clip: largest norm of the student's gradient, 0 for none.
        alpha: weight of the stages' discrepancy.
        beta: weight of the activation regularisation.
        features: compared at each stage: channel relations (crm), normalised features as the released code (feature_l1), off.
        stage_weights: of the stages' discrepancies: adaptive (the widest count most), uniform or softmax.
        damping: on makes the generator maximise log(1 + D) instead of D.
        leaves: images to draw by chance (dead leaves), which give the ranges and all of a batch but the adversary's
            share; 0 for none: then the generator gives everything.
        share: of a batch that the adversary makes; 0 for none.
        replay: share of the adversary's images that are from its earlier batches.
        restart: on restarts the generator when it collapses.
        frozen: on keeps the student's ranges and BatchNorm statistics as they are after the warm-up.
        bns_weight: weight of the BatchNorm statistics in the generator's loss; above 0 the images are called zaq+bns.
        symmetric: on gives weights and activations symmetric ranges, as the paper.
        ranges: rule of the activation ranges: percentile, ema (of minimum and maximum), mse (least squared error: the
            value below 6 bits, above 64 pixels), cubed (least cubed error: up to 64 pixels) or widening (extremes so
            far, the value from 6 bits on).
        loss: of the student's outputs: l1 as published, or kl, the distillation loss of the other recipes.
        correction: after the warm-up gives every channel the teacher's mean (means), or its mean and spread (moments).

    Returns:
        Student, report, source and the numbers the presets settled on.

    Raises:
        BadInput: for presets that do not exist, or an image size that cannot be meant.

    | what | paper | official code | here | why | test |
    |---|---|---|---|---|---|
    | stages' discrepancy | L1 of channel relation maps | attention on normalised features, within 2 % of twice their L1; maps of (hw)^2 | relation maps (best, paper), L1 of normalised features (official) | c x c per image instead of hw x hw | tests/unit/test_discrepancy.py |
    | dead channels | not stated | 0/0 in the unused relation map | relation 0 | half of the channels may be dead | tests/unit/test_discrepancy.py |
    | stage weights | adaptive, formula not known to us | ones | L d_l / sum d per image (best, paper), ones (official) | the widest gap counts most | tests/unit/test_discrepancy.py |
    | alpha, beta | 0.1, 0.05 | 1, 0.1 | 1, 0.05 (best), as stated, as released | a first value, not a searched one | tests/unit/test_zaq.py |
    | generator's loss | -D + beta L_a | the same, unbounded below | -log(1 + D) + beta L_a (best), as published | cannot run away | tests/unit/test_zaq.py |
    | quantizer | symmetric | affine, weights per channel | affine (best, official), symmetric (paper) | symmetric wastes half the codes behind a ReLU | tests/unit/test_zaq.py |
    | images for the ranges | not stated | the test set's too | drawn by chance (best), the generator's (paper, official) | nearer to real ones than a young generator's: docs/findings.md | tests/unit/test_leaves.py |
    | activation ranges | not stated | extremes so far, of every forward, the test set's included | fixed after the warm-up, extremes (best, from 6 bits) or least error (below); extremes so far, of training batches (paper, official) | the test set selects nothing; one outlier stays for good | tests/unit/test_zaq.py |
    | BatchNorm of the student | not stated | batch statistics, also while the generator learns | the teacher's statistics (best), batch statistics in its own updates (paper, official) | they drift to the generator's images; a source changes no student | tests/unit/test_zaq.py |
    | student's optimizer | not stated | SGD 0.1, decay 5e-4 on everything | Adam 1e-4 (3e-5 above 64 pixels), halved for each bit of the weights above 4, cosine (best), as released | a copy of the teacher needs small steps | tests/unit/test_zaq.py |
    | the student's images | the generator's | the same | drawn ones in crops, and the generator's as a share of each batch (best), the generator's | on the generator's alone it forgets what real ones need: docs/findings.md | tests/unit/test_mixed.py |
    | moments after the warm-up | not stated | as they come | means and spreads corrected in BatchNorms and biases (best) | rounding shifts them: docs/findings.md | tests/unit/test_correction.py |
    | large images | not stated | CIFAR only; its ancestor: tanh as it is | natural mean and contrast per channel, between black and white | grey images give ranges of half the size | tests/unit/test_generators_adversarial.py |
    | past images, restarts | none | none | half of its share; on collapse (best), none | the student forgets what the generator left | tests/unit/test_adversary.py |
    | checkpoint reported | not stated | best on the test set | last | nothing is chosen on test data | tests/test_architecture.py |
    """  # fmt: skip
    spec, image = spec or QuantSpec(), (teacher.image[0], *image_size(size)) if size else teacher.image
    subject = adversary_by_subject(image, (spec.weight_bits, spec.act_bits)) if fidelity == "best" else {}
    plan = settle(
        adversary_budget(budget, image), choose("--fidelity", fidelity, FIDELITY), subject, steps=steps, warmup=warmup,
        batch=batch, width=width, turns=turns, generator_lr=generator_lr, optimizer=optimizer, lr=lr,
        weight_decay=weight_decay, decay=decay, clip=clip, alpha=alpha, beta=beta, features=features,
        stage_weights=stage_weights, damping=damping, leaves=leaves, share=share, replay=replay, restart=restart,
        frozen=frozen, bns_weight=bns_weight, symmetric=symmetric, ranges=ranges, size=size, loss=loss, correction=correction,
    )  # fmt: skip
    weight, act = (partial(rule, symmetric=plan.symmetric == "on") for rule in (LiveMinMax, RANGES[plan.ranges]))
    student, report = quantize(teacher.net, replace(spec, weight=weight, act=act))
    later = tuple(max(1, round(plan.steps * third / 3)) for third in (1, 2))
    drawn = LeavesSource(teacher, image=image, batch=plan.batch, count=plan.leaves) if plan.leaves and not images else None
    make = partial(source, teacher, student=student, batch=plan.batch, image=image, say=run.note,
                   milestones=tuple(m if drawn else plan.warmup + m for m in later),
                   **{name: getattr(plan, name) for name in BEST})  # fmt: skip
    beside = partial(mix, CropSource(drawn, scale=CROPS), make, share=plan.share, batch=plan.batch) if drawn else make
    batches = feed(images, beside, batch=plan.batch)
    still = drawn or batches

    calibrate(student, still, steps=plan.warmup, run=run, observe_last=50)
    for step in run.steps("correct", int(plan.correction != "off"), student=student):
        seen = still.sample(8 * plan.batch, run.rng("correct", step)).images
        correct_moments(student, teacher.net, seen, spreads=plan.correction == "moments")

    d_o, d_f = partial(task_gap, task=teacher.outputs), partial(stage_gap, form=plan.features, weighting=plan.stage_weights)
    gradient = transfer_gradient(
        student, teacher.net, [] if plan.features == "off" else find_stages(teacher.net, image), alpha=plan.alpha,
        outputs={plan.loss: d_o if plan.loss == "l1" else teacher.outputs.kl}, features=d_f, still=plan.frozen == "on",
    )  # fmt: skip
    descent, slower = bounded_descent(
        student, optimizer=plan.optimizer, lr=plan.lr, weight_decay=weight_decay, decay_all=plan.frozen == "off",
        clip=plan.clip, steps=plan.steps, decay=plan.decay, milestones=later,
    )  # fmt: skip
    noise = input_space(image, teacher.mean, teacher.std, teacher.device).noise(32, image, run.rng("noise", 0))
    health = Health(student, teacher.net, batches, run, gap=d_o, noise=noise.to(teacher.device))
    fit(student, teacher, batches, None, descent, steps=plan.steps, run=run, schedulers=[slower, health],
        gradient=gradient, micro_batch=micro_batch, history_of=partial(codes_and_latents, student))  # fmt: skip
    return Outcome(student, report, batches, vars(plan))
