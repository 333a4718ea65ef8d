"""The range of a tensor that a grid should cover: pure functions, no state, nothing read back from the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zsq.errors import BadInput
from zsq.grid import Grid, decode, encode

# A search looks at no more values than this per range: 80 candidates over a whole activation would take seconds.
_SEARCH_VALUES = 2**16


def min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, of the tensor or of every channel.

    Args:
        x: values, any shape, not empty.
        axis: None for one range, else the dimension of the channels.

    Returns:
        (lo, hi), each 0-dim or broadcastable against x along `axis`; detached, at least float32.

    Raises:
        BadInput: if x is empty or has no such dimension.

    Example:
        >>> min_max(torch.tensor([[1.0, 2.0], [-3.0, 0.0]]), axis=0)[0]
        tensor([[ 1.],
                [-3.]])
    """
    rows = _rows(x, axis)
    # One row: the reduction over everything is the faster kernel.
    lo, hi = torch.aminmax(rows) if axis is None else torch.aminmax(rows, dim=1)
    return _like(lo, x, axis), _like(hi, x, axis)


def percentile(x: Tensor, axis: int | None, *, share: float) -> tuple[Tensor, Tensor]:
    """Range that keeps the middle `share` of the values: floor(n * (1 - share) / 2) are left out at each end.

    Exact (nearest rank, no interpolation) and without a limit on the number of values, unlike `torch.quantile`.

    Args:
        x: values, any shape, not empty.
        axis: None for one range, else the dimension of the channels.
        share: share of values inside, in (0, 1]; 1 gives `min_max`.

    Returns:
        (lo, hi) as for `min_max`.

    Raises:
        BadInput: if x is empty or has no such dimension.

    Example:
        >>> percentile(torch.arange(101.0), None, share=0.9)
        (tensor(5.), tensor(95.))
    """
    rows = _rows(x, axis)
    # 1 - 0.9999 is a little less than 0.0001: without the 1e-6 a share of n values would lose one of them.
    cut = int(rows.shape[1] * (1 - share) / 2 + 1e-6)
    if cut == 0:
        return min_max(x, axis)
    # topk rather than kthvalue: torch refuses the latter on a GPU when only deterministic kernels are allowed.
    lo = torch.topk(rows, cut + 1, dim=1, largest=False, sorted=False).values.amax(dim=1)
    hi = torch.topk(rows, cut + 1, dim=1, largest=True, sorted=False).values.amin(dim=1)
    return _like(lo, x, axis), _like(hi, x, axis)


def least_error(
    x: Tensor, axis: int | None, to_grid: Callable[[Tensor, Tensor], Grid], *, power: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """Shrunken min/max range with the least mean |x - Q(x)|^power, searched for each channel by itself.

    Candidate i of N multiplies both ends by 1 - 0.8 i/N: 1.00, 0.99 ... 0.21 for N = 80. The error is taken over at
    most 65,536 values per range: every k-th one, with k free of small factors so that it does not follow image rows.

    Args:
        x: values, any shape, not empty.
        axis: None for one range, else the dimension of the channels.
        to_grid: makes the grid of a range; its arguments have shape [channels, 1].
        power: exponent of the error; 2 is the mean squared error, 2.4 weighs clipped values more.
        candidates: how many factors to try.

    Returns:
        (lo, hi) as for `min_max`; never worse than `min_max` on the values looked at.

    Raises:
        BadInput: if x is empty or has no such dimension.

    Source: shrink factors and power 2.4 as in the code of IntraQ and HAST (which never calls it).
    """
    rows = _rows(x, axis)
    lo, hi = (end.reshape(-1, 1) for end in min_max(x, axis))
    rows = rows[:, :: _stride(rows.shape[1])].to(lo.dtype)
    best_factor, best_error = torch.ones_like(lo), torch.full_like(lo, math.inf)
    for i in range(candidates):
        factor = 1 - 0.8 * i / candidates
        grid = to_grid(lo * factor, hi * factor)
        error = decode(encode(rows, grid), grid).sub_(rows).abs_().pow_(power).mean(dim=1, keepdim=True)
        best_factor = torch.where(error < best_error, factor, best_factor)
        best_error = torch.minimum(error, best_error)
    return _like(lo * best_factor, x, axis), _like(hi * best_factor, x, axis)


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """View of x as [channels, values of a channel]."""
    if x.numel() == 0 or (axis is not None and axis >= x.dim()):
        raise BadInput(
            "range of a tensor",
            expected="at least one value" if axis is None else f"at least one value and a dimension {axis} of channels",
            got=f"shape {list(x.shape)}",
            fix="Give the quantizer a non-empty tensor, or create it with another axis.",
        )
    x = x.detach()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def _like(end: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value per channel, shaped to broadcast against x."""
    end = end.to(torch.promote_types(end.dtype, torch.float32))
    return end.reshape(()) if axis is None else end.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def _stride(count: int) -> int:
    """Every how many values to look, so that at most `_SEARCH_VALUES` remain."""
    stride = -(-count // _SEARCH_VALUES)
    while stride > 1 and math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    return stride
