"""What a generator step and a student step will cost, known before either is taken: arithmetic and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from zsq.errors import BadInput
from zsq.sources.generator import autocast, learning
from zsq.view import frozen

if TYPE_CHECKING:
    from zsq.sources.generator import LatentSampler
    from zsq.teachers import Teacher

# Bytes per parameter. Held between steps, and added at the end of a backward pass, when the maps are gone again. All of
# it, and the factors below, were set by bench/generator_memory.py.
_GENERATOR = (14, 4)  # float32 weight, two moments of Adam, bfloat16 copy; gradient
_STUDENT = (24, 4)  # weight, rounded weight, momentum, copies for inundation and history; gradient
_STUDENT_MAPS = 1.6  # bytes of maps a student keeps for each byte its float network keeps
_GRADIENTS = 1.25  # of maps, on their way back, for each byte kept
_WORK = 170 * 2**20  # work space of the kernels


class StepCost(NamedTuple):
    """What a training step costs.

    Attributes:
        what: "generator" or "student".
        macs: multiply-accumulates of one forward, per image.
        parameters: number of parameters.
        fixed: bytes whatever the batch: parameters, what the optimizer keeps, gradients.
        gradients: those of them that come when the maps are gone.
        each: bytes per image.
        images: per step, or per part of a step.
    """

    what: str
    macs: int
    parameters: int
    fixed: int
    gradients: int
    each: int
    images: int

    @property
    def needed(self) -> int:
        """Bytes that a step takes."""
        return _WORK + self.fixed + max(0, self.each * self.images - self.gradients)

    def fitting(self, free: int) -> int:
        """Images of a step that takes at most so many bytes."""
        return math.floor((free - _WORK - self.fixed + self.gradients) / max(self.each, 1)) if free >= self.least else 0

    @property
    def least(self) -> int:
        """Bytes that a step takes whatever the batch."""
        return _WORK + self.fixed

    @property
    def subject(self) -> str:
        """What it is the cost of, in words."""
        return f"a {self.what} of {self.parameters / 1e6:.1f} M parameters, {self.macs / 1e9:.2f} GMAC per image"

    def __str__(self) -> str:
        return f"{self.subject}; a step on {self.images} images takes about {self.needed / 2**30:.1f} GiB"


class Footprint(NamedTuple):
    """Cost of one forward with gradients.

    Attributes:
        macs: multiply-accumulates per image.
        parameters: number of parameters.
        kept: bytes kept for the backward pass, per image.
    """

    macs: int
    parameters: int
    kept: int


def footprint(net: nn.Module, *inputs: Tensor) -> Footprint:
    """Run a network once and count. On the meta device nothing is computed, and no memory is taken.

    Args:
        net: the network.
        inputs: its inputs, with the images on dimension 0 of the first.

    Returns:
        Counts per image; parameters and buffers that the backward pass reads are not among what it keeps.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*net.parameters(), *net.buffers()]}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor stays referenced: another one cannot take its place in memory.
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with FlopCounterMode(display=False) as flops, saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*inputs)
    count = len(inputs[0])
    total = sum(size for _, size in kept.values())
    return Footprint(flops.get_total_flops() // (2 * count), sum(p.numel() for p in net.parameters()), total // count)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_generator_memory(
    teacher: Teacher, build: Callable[[], nn.Module], latents: LatentSampler, *, batch: int, instead: str = ""
) -> StepCost:
    """Refuse a generator step that will not fit.

    Args:
        teacher: what the images go through.
        build: makes the generator; called on the meta device, where it takes no memory.
        latents: what it is fed with.
        batch: images per step.
        instead: what makes the generator itself smaller, for the message; empty if nothing does.

    Returns:
        What a step costs.

    Raises:
        BadInput: naming ``--batch`` or `instead`, if less memory is available than the step needs.
    """
    inputs, _ = latents(2, torch.Generator())
    kind = torch.bfloat16 if teacher.precision == "bf16" else torch.float32
    given = [(x.to(kind) if x.is_floating_point() else x).to("meta") for x in inputs]
    with torch.device("meta"):
        generator = build().to(kind)  # as the step runs it
    made = footprint(generator, *given)
    each = made.kept + _teacher(teacher, precision=teacher.precision).kept
    cost = _cost("generator", made, _GENERATOR, _GRADIENTS * each, batch)
    return _require(teacher, cost, option="--batch", least=2, instead=instead)  # it normalises over its batch


def require_student_memory(
    teacher: Teacher, *, batch: int, micro_batch: int | None, beside: object = None
) -> StepCost:
    """Refuse a student step that will not fit.

    Args:
        teacher: what the student is a copy of.
        batch: images per step.
        micro_batch: images per part of a step, if it is split.
        beside: the source of the images; what its own steps keep counts too, if it knows (`cost`).

    Returns:
        What a step costs.

    Raises:
        BadInput: naming ``--micro-batch``, if less memory is available than the step needs.
    """
    net = _teacher(teacher, precision="float32")
    made: StepCost | None = getattr(beside, "cost", None)
    # Its weights are there already; moments come with its first step, and gradients are dropped between steps.
    kept = 0 if made is None else made.fixed - made.gradients - 4 * made.parameters
    cost = _cost("student", net, _STUDENT, _STUDENT_MAPS * net.kept, min(batch, micro_batch or batch))
    return _require(teacher, cost, option="--micro-batch", least=1, kept=kept)


def _cost(what: str, net: Footprint, bytes_each: tuple[int, int], each: float, images: int) -> StepCost:
    held, gradients = (count * net.parameters for count in bytes_each)
    return StepCost(what, net.macs, net.parameters, held + gradients, gradients, round(each), images)


def _teacher(teacher: Teacher, *, precision: str) -> Footprint:
    """Measured on two images: networks of others need not run on the meta device."""
    images = torch.zeros(2, *teacher.image, device=teacher.device, requires_grad=True)
    with learning(), frozen(teacher.net), autocast(teacher.device, precision):
        return footprint(teacher.net, images)


def _require(
    teacher: Teacher, cost: StepCost, *, option: str, least: int, instead: str = "", kept: int = 0
) -> StepCost:
    """The cost, if there is memory for it."""
    free = available_memory(teacher.device)
    if free is None or cost.needed + kept <= free:
        return cost
    room = cost.fitting(free - kept)
    none = f"{instead}, free memory" if instead else "Free memory"
    raise BadInput(
        f"{option} {cost.images}",
        expected=f"a step that fits into {free / 2**30:.1f} GiB, what {teacher.device} has left",
        got=f"about {(cost.needed + kept) / 2**30:.1f} GiB for {cost.subject}",
        fix=f"Use {option} {room} or less." if room >= least else f"{none}, or use another device: no batch fits.",
    )
