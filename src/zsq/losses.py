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
    through_teacher: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """Distillation loss T^2 * KL(teacher || student) on temperature-softened probabilities; classes on dimension 1.

    Args:
        student_logits: shape [b, k] or [b, k, ...].
        teacher_logits: the same shape; detached here unless `through_teacher`.
        temperature: T, above zero.
        reduction: ``"mean"`` averages over all entries, classes included, as the GDFQ family's code does; it is k times
            smaller than ``"batchmean"``, which sums over classes and averages over samples (and positions).
        through_teacher: let the gradient flow into the teacher's logits too (to the image they were computed from).
        weight: of each sample and position, shape [b, ...] with mean 1; None counts all the same.

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
    teacher = F.log_softmax(_wide(teacher_logits if through_teacher else teacher_logits.detach()) / temperature, dim=1)
    if weight is None:
        total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    else:
        total = (F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * weight).sum()
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
            fix="Give the network before its BatchNorms were folded, or images that need no BatchNorm: --images FILE.",
        )
    seen = torch.cat([norm.mean for norm in norms] + [norm.var for norm in norms])
    stored = torch.cat([norm.running_mean for norm in norms] + [norm.running_var for norm in norms])
    weights = _layer_weights(tuple(norm.mean.numel() for norm in norms), seen.device, seen.dtype)
    return (seen - stored).square().mul(weights).sum()


def statistics_gap(layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Distance between the statistics of every single image and given ones, summed over layers and channels.

    (1/N) sum_n sum_l [ ||mean - mean_nl||^2 + ||std - std_nl||^2 ], std_nl = sqrt(unbiased variance + 1e-6).

    Args:
        layers: (values [n, c, ...], mean [c], std [c]) per layer; layers of one position are left out.

    Returns:
        0-dim tensor.

    Raises:
        BadInput: no layer has positions.

    Source: ZeroQ (arXiv 2001.00281), the released code; the paper speaks of the statistics of all images.
    """
    gaps = []
    for values, mean, std in layers:
        if values.dim() < 3 or values[0, 0].numel() < 2:
            continue
        var, seen = torch.var_mean(_wide(values).flatten(2), 2)
        gaps.append((mean - seen).square().sum(1) + (std - (var + 1e-6).sqrt()).square().sum(1))
    if not gaps:
        raise BadInput("BatchNorm statistics", expected="a network with BatchNorm layers behind convolutions",
                       got="none", fix="Use a recipe that does not need them.")  # fmt: skip
    return torch.stack(gaps).sum(0).mean()


def hard_sample(logits: Tensor, labels: Tensor | None, *, gamma: float) -> Tensor:
    """Cross entropy that hard images dominate: mean of (1 - p)^gamma * (-log p), p the probability of the label.

    Args:
        logits: shape [b, k].
        labels: int64 [b].
        gamma: from 0 (plain cross entropy); gradients are finite below 1 too, also where p rounds to 1.

    Returns:
        0-dim tensor.

    Raises:
        BadInput: there are no labels.

    Source: HAST (arXiv 2303.13826), hard-sample synthesis; the form of the released code, without its factor.

    Example:
        >>> float(hard_sample(torch.tensor([[100.0, 0.0]]), torch.tensor([0]), gamma=0.5))
        0.0
    """
    log_p = _label_log_probability(logits, labels)
    # The power's slope is infinite at p = 1 for gamma < 1: below the bound the clamp passes no gradient.
    return ((-torch.expm1(log_p)).clamp_min(1e-6) ** gamma * -log_p).mean()


def difficulty(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Mean of 1 - p, p the probability of the label (HAST, arXiv 2303.13826).

    Args:
        logits: shape [b, k].
        labels: int64 [b].

    Raises:
        BadInput: there are no labels.
    """
    return -torch.expm1(_label_log_probability(logits, labels)).mean()


def inception(logits: Tensor, labels: Tensor | None, targets: Tensor) -> Tensor:
    """Mean of (p - t)^2, p the probability of the label: as sure as asked for, not surer.

    Args:
        logits: shape [b, k].
        labels: int64 [b].
        targets: the t of each image, shape [b].

    Raises:
        BadInput: there are no labels.

    Source: IntraQ (arXiv 2111.09136), soft inception loss as released.
    """
    return (_label_log_probability(logits, labels).exp() - targets).square().mean()


def marginal_distance(
    features: Tensor, labels: Tensor, centres: Tensor, known: Tensor, *, low: float, high: float
) -> Tensor:
    """Keep the cosine distance of each image to its class centre between two margins.

    Args:
        features: shape [b, f].
        labels: int64 [b].
        centres: mean feature of each class, shape [k, f].
        known: whether a class has a centre, bool [k]; images of the others count nothing.
        low: smallest distance without penalty.
        high: largest distance without penalty.

    Returns:
        0-dim tensor; 0 without any centre.

    Source: IntraQ (arXiv 2111.09136), marginal distance constraint.
    """
    distance = 1 - F.cosine_similarity(_wide(features), centres[labels], dim=1)
    weight = known[labels].to(distance.dtype)
    gap = (low - distance).clamp_min(0) + (distance - high).clamp_min(0)
    return (weight * gap).sum() / (weight.sum() + 1e-6)


def attention_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Distance of channel attention, summed over units; gradients flow into both networks.

    Channel attention of an image: e_c = mean over positions of z_c^2, a = e / ||e||_2. Per unit the mean of (a - a')^2.

    Args:
        student: outputs of the units, each [b, c, ...].
        teacher: the same units of the teacher, in the same order.

    Returns:
        0-dim tensor.

    Source: HAST (arXiv 2303.13826), feature alignment as released (channels, not positions).

    Example:
        >>> z = torch.rand(2, 3, 4, 4)
        >>> float(attention_gap([z], [3 * z])) < 1e-12
        True
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(_attention(s) - _attention(t)).square().mean() for s, t in pairs]).sum()


def _attention(z: Tensor) -> Tensor:
    energy = _wide(z).square()
    return F.normalize(energy.flatten(2).mean(2) if z.dim() > 2 else energy, dim=1)


def _label_log_probability(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise BadInput("class of an image", expected="a label per image", got="a source of images without labels",
                       fix="Use images that have labels, or a method that needs none.")  # fmt: skip
    return F.log_softmax(_wide(logits), dim=1).gather(1, labels[:, None]).squeeze(1)
