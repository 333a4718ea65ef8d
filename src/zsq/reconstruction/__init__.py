"""Block-wise reconstruction: every block of the student learns to give what the float network gives there.

BRECQ (Li et al., ICLR 2021) with learned rounding (AdaRound, Nagel et al., ICML 2020), a learned step beside it
(GENIE-M, Jeon et al., CVPR 2023) and activations that are left unrounded at random (QDrop, Wei et al., ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, fx, nn

from zsq.errors import BadInput
from zsq.reconstruction.blocks import Block, describe, find_blocks
from zsq.reconstruction.work import Reconstruction, Settings
from zsq.run import Run
from zsq.sources.base import Source, distinct_images, prepare

if TYPE_CHECKING:
    from zsq.teachers import Teacher

__all__ = ["Block", "find_blocks", "reconstruct"]


def reconstruct(
    student: nn.Module,
    teacher: Teacher,
    images: Source | Tensor,
    *,
    steps: int,
    run: Run,
    count: int = 1024,
    batch: int = 32,
    micro_batch: int | None = None,
    lr: float = 1e-2,
    step_lr: float = 1e-3,
    regularisation: float = 0.01,
    drop: float = 0.5,
    objective: Literal["mse", "fisher"] = "mse",
    run_length: int = 3,
    stage: str = "reconstruct",
    history_of: Callable[[], Mapping[str, Any]] | None = None,
) -> list[Block]:
    """Learn rounding and steps of a calibrated student, block after block, so that it gives what the teacher gives.

    A block is a stretch of the network with one tensor in and one out: a residual block with its shortcut, or a few
    layers in a straight line (see `find_blocks`). It is given what the finished blocks of the student make of the
    images, and learns the teacher's output at the same place: of every weight, which of its two neighbours on the grid
    it takes; of every `LearnedStep` in it, weights and activations alike, the step. The first fifth of a block's steps
    has no rounding regulariser; then its exponent falls from 20 to 2. At the end every weight is rounded for good: the
    latent weight becomes the value of its code and the quantizer keeps its range, so that codes, history and export
    are what they always are. A block that would end with a larger error than the nearest rounding is put back.

    No labels are used. Four tensors per image (input of the block from student and teacher, output of the teacher, and
    the weights of the Fisher objective) stay in host memory; a batch at a time goes to the device. Nothing is read from
    the device within a step, except once at the end of each block.

    Args:
        student: with quantizers; its ranges are fixed, and those of its weights do not follow the weights
            (``weight=LearnedStep`` or ``MseRange`` in the spec). Put into eval mode.
        teacher: the float network that the student was made from.
        images: a source, or images [n, c, h, w] in the teacher's normalised space.
        steps: Adam steps per block.
        run: logs (``mse``, ``round``; at the end of a block its error ``before`` and ``after``), saves and resumes.
        count: images to take from the source.
        batch: images per step.
        micro_batch: pass at most this many images at a time through the block; the gradient is the same.
        lr: Adam's learning rate of the rounding variables (a weight halfway between its neighbours is about 2.4 from
            either end); constant. 0 keeps the nearest rounding.
        step_lr: Adam's learning rate of all steps and offsets, as a share of the step; falls along half a cosine.
        regularisation: weight of the rounding regulariser.
        drop: probability that a single value of the block's input is the teacher's, and that a single activation in
            the block stays unrounded.
        objective: squared error, or ``fisher``: weighted by the squared gradient of KL(teacher || student).
        run_length: most layers of a straight run in one block.
        stage: name of the stage.
        history_of: gives the tensors of one history snapshot.

    Returns:
        The blocks, in order.

    Raises:
        BadInput: if a weight's range is not fixed, the network does not take and return one tensor, or an argument is
            out of range.
        RunFailed: if an error is not finite.
        Interrupted: if a signal stopped the run.
    """
    _check(steps=steps, count=count, batch=batch, micro_batch=micro_batch, drop=drop, objective=objective)
    if not isinstance(student, fx.GraphModule):
        raise BadInput("student", expected="a network with quantizers", got=type(student).__name__,
                       fix="Give what zsq.quantize returned first.")  # fmt: skip
    student.eval()
    blocks = find_blocks(student, run=run_length)
    if isinstance(images, Tensor):
        pixels = images[:count]
    else:
        prepare(images, run)
        pixels = distinct_images(images, count, run.rng(f"{stage}.images", 0))
    settings = Settings(steps, batch, micro_batch, lr, step_lr, regularisation, drop, objective, stage)
    work = Reconstruction(student, teacher.net.state_dict(), blocks, pixels, settings)
    left = {place for block in blocks for place in block.layers} - {place for part in work.rounded() for place in part}
    run.note(f"{stage}: {describe(blocks)}" + f"; nearest rounding for {', '.join(sorted(left))}" * bool(left))
    for number in run.steps(stage, work.total, history_of=history_of, student=student, work=work):
        run.log(**work.step(number, run))
    return blocks


def _check(*, steps: int, count: int, batch: int, micro_batch: int | None, drop: float, objective: str) -> None:
    """Refuse numbers that cannot be meant."""
    least = {"steps of a block": steps, "--count": count, "--batch": batch}
    least |= {} if micro_batch is None else {"--micro-batch": micro_batch}
    for name, value in least.items():
        if value < 1:
            raise BadInput(name, expected="a whole number from 1", got=value, fix="Choose a larger one.")
    if not 0 <= drop <= 1:
        raise BadInput("--drop", expected="a probability", got=drop, fix="0.5 is the published one, 0 drops nothing.")
    if objective not in ("mse", "fisher"):
        raise BadInput("--objective", expected="mse or fisher", got=repr(objective), fix="Choose one of them.")
