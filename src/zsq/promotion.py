"""The gradient of a step that also trains on images moved uphill, with aligned attention (HAST)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zsq import losses
from zsq.fit import Gradient
from zsq.insert import QuantSpec
from zsq.sources.base import Batch
from zsq.teachers import Teacher
from zsq.units import find_units
from zsq.view import View, look


def promoted(
    student: nn.Module, teacher: Teacher, spec: QuantSpec, *, kl_weight: float, temperature: float, alignment: float,
    epsilon: float, promotion: str,
) -> Gradient:  # fmt: skip
    """One step's gradient: on the images, and on the same images moved uphill by `epsilon` in sign.

    One backward gives the gradients of images and weights together: the released program's gradients in three
    quarters of its passes.

    Args:
        student: with quantizers.
        teacher: the float network.
        spec: whose ``leaf`` patterns also apply to the search for units.
        kl_weight: weight of the distillation term.
        temperature: of the distillation term.
        alignment: weight of the attention term; 0 leaves it out.
        epsilon: length of the step in every pixel.
        promotion: uphill on ``loss`` (then both images train), on ``difficulty`` (then only the moved ones), or
            ``off``.

    Returns:
        What `fit` takes as ``gradient``.
    """
    units = find_units(teacher.net, leaf=spec.leaf) if alignment else []
    theirs, ours = [unit.output for unit in units], [unit.within(student) for unit in units]
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def loss(s: View, t: View) -> dict[str, Tensor]:
        kl = teacher.outputs.kl(
            s.logits, t.logits, temperature=temperature, reduction="batchmean", through_teacher=True
        )
        if not units:
            return {"kl": kl_weight * kl}
        gap = losses.attention_gap([s.features[name] for name in ours], [t.features[name] for name in theirs])
        return {"kl": kl_weight * kl, "attention": alignment * gap}

    def learn(images: Tensor, share: float, wanted: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(images.requires_grad):
            t = look(teacher.net, images, features=theirs)
        terms = loss(look(student, images, features=ours), t)
        (share * torch.stack(list(terms.values())).sum()).backward(inputs=wanted)
        return {name: term.detach() for name, term in terms.items()}

    def gradient(part: Batch, share: float) -> dict[str, Tensor]:
        with torch.enable_grad():
            if promotion == "off":
                return learn(part.images, share, weights)
            x = part.images.detach().clone().requires_grad_()
            terms: dict[str, Tensor] = {}
            if promotion == "loss":
                terms = learn(x, share, [x, *weights])
            else:
                losses.difficulty(student(x), part.labels).backward(inputs=[x])
            harder = (x if x.grad is None else x + epsilon * x.grad.sign()).detach()
            return terms | {f"hard_{name}": term for name, term in learn(harder, share, weights).items()}

    return gradient
