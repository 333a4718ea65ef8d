"""Loss terms shared by recipes. Pure functions of tensors; all arithmetic in float32 (float64 stays float64)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq.errors import BadInput
from zsq.view import Moments


def _wide(x: Tensor) -> Tensor:
    """Half precision is not enough for a logarithm of a softmax; float64 is kept for tests."""
    return x if x.dtype == torch.float64 else x.float()


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 20.0,
    reduction: Literal["mean", "batchmean"] = "mean",
) -> Tensor:
    """Distillation loss T^2 * KL(teacher || student) on temperature-softened probabilities; classes on dimension 1.

    Args:
        student_logits: shape [b, k] or [b, k, ...].
        teacher_logits: the same shape; detached here.
        temperature: T, above zero.
        reduction: ``"mean"`` averages over all entries, classes included, as the GDFQ family's code does; it is k times
            smaller than ``"batchmean"``, which sums over classes and averages over samples (and positions).

    Returns:
        0-dim tensor.

    Raises:
        BadInput: shapes differ, or temperature or reduction is unknown.

    Source: GDFQ (arXiv 2003.03603); the reduction follows the published results, not torch's advice.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> float(kl(logits, logits + 5))
        0.0
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 2:
        raise BadInput(
            "kl",
            expected="student and teacher logits of one shape [b, k, ...]",
            got=f"{list(student_logits.shape)} and {list(teacher_logits.shape)}",
            fix="Give both networks the same images and the same classes.",
        )
    if not temperature > 0:
        raise BadInput("temperature", expected="a number above 0", got=temperature, fix="The usual value is 20.")
    if reduction not in ("mean", "batchmean"):
        raise BadInput("reduction", expected="'mean' or 'batchmean'", got=repr(reduction), fix="Choose one of the two.")
    student = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_wide(teacher_logits.detach()) / temperature, dim=1)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    entries = student.numel() if reduction == "mean" else student.numel() // student.shape[1]
    return total * (temperature**2 / entries)


def cross_entropy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Cross entropy, averaged over samples (and positions); classes on dimension 1.

    Args:
        logits: shape [b, k] or [b, k, ...].
        labels: int64 class numbers of shape [b] or [b, ...], or soft targets of the logits' shape (rows sum to 1).

    Returns:
        0-dim tensor.

    Raises:
        BadInput: the shapes do not belong together, or there are no labels.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> soft = torch.full((2, 4), 0.25)
        >>> bool(torch.isclose(cross_entropy(logits, torch.tensor([0, 3])), cross_entropy(logits, soft)))
        True
    """
    if labels is None:
        raise BadInput("cross_entropy", expected="a label per image", got="a source of images without labels",
                       fix="Use a method that needs none, such as ait, or images that have them.")  # fmt: skip
    classes = logits.shape[1] if logits.dim() > 1 else 0
    hard = labels.dtype == torch.int64 and labels.shape == logits.shape[:1] + logits.shape[2:]
    soft = labels.is_floating_point() and labels.shape == logits.shape
    if not classes or not (hard or soft):
        raise BadInput(
            "cross_entropy",
            expected="logits [b, k, ...] with int64 labels [b, ...] or soft targets [b, k, ...]",
            got=f"logits {list(logits.shape)}, labels {list(labels.shape)} {labels.dtype}",
            fix="Match labels and logits.",
        )
    logits = _wide(logits)
    return F.cross_entropy(logits, labels if hard else labels.to(logits.dtype))


@lru_cache(maxsize=32)
def _layer_weights(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights 1 / (L * C_l), twice (means, then variances). Cached, because building them is a copy to the device."""
    with torch.inference_mode(mode=False):  # an inference tensor in the cache could never be used for training
        once = torch.cat([torch.full((size,), 1 / (len(sizes) * size), dtype=dtype) for size in sizes])
        return torch.cat([once, once]).to(device)


def bn_gap(norms: Sequence[Moments]) -> Tensor:
    """Distance between batch statistics and the statistics stored in the BatchNorms.

    (1/L) sum_l [ mean_c (mean - running_mean)^2 + mean_c (var - running_var)^2 ], as one weighted squared error over
    the concatenation of all layers.

    Args:
        norms: as recorded by ``look(net, x, norms=True)``.

    Returns:
        0-dim tensor.

    Raises:
        BadInput: the network has no BatchNorm with running statistics.

    Source: GDFQ (arXiv 2003.03603), with the averages over channels and layers of the released code.
    """
    if not norms:
        raise BadInput(
            "BatchNorm statistics",
            expected="a network with BatchNorm layers that keep running statistics",
            got="none",
            fix="Use a recipe that does not need them, or give the network before its BatchNorms were folded.",
        )
    seen = torch.cat([norm.mean for norm in norms] + [norm.var for norm in norms])
    stored = torch.cat([norm.running_mean for norm in norms] + [norm.running_var for norm in norms])
    weights = _layer_weights(tuple(norm.mean.numel() for norm in norms), seen.device, seen.dtype)
    return (seen - stored).square().mul(weights).sum()
