"""Gradient inundation: enlarge each layer's update until a set number of its integer weights change.

With a small learning rate most updates are lost in rounding: the latent weight moves, its integer code does not. Here
the update of every quantized weight tensor is multiplied by the smallest factor >= 1 that changes a set share of its
codes. It is two hooks on an ordinary optimizer, so schedulers, momentum, checkpoints and gradient scalers stay as is.

Source: Choi et al., "It's All In the Teacher: Zero-Shot Quantization Brought Closer to the Teacher" (AIT), CVPR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from zsq.errors import BadInput

_OVERSHOOT = 1e-3  # relative; far below the 1/64 tolerance of the published search
_MAX_FACTOR = 2.0**64  # of the search; the published one has no bound and does not end on an all-zero gradient

# These read a parameter only to decay it, so the step they take from a parameter parked at zero is their displacement.
# Exact types: a subclass may do more.
_NAMES = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop")
_PARKABLE = frozenset(getattr(torch.optim, name) for name in _NAMES)

# inv_step, zero, qmin, qmax: code = clamp(round(x * inv_step - zero), qmin, qmax). `zsq.grid.Grid` is one.
WeightGrid: TypeAlias = tuple[Tensor, Tensor, int, int]


class InundatedWeight(Protocol):
    """A latent weight and the grid it is rounded to."""

    @property
    def parameter(self) -> nn.Parameter:
        """The latent weight the optimizer updates."""

    def grid(self, values: Tensor | None = None) -> WeightGrid:
        """Grid fitted to the parameter, or (search mode) to candidate `values` of it."""


def crossing_times(position: Tensor, rate: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Factor at which each weight leaves its code, when ``position + factor * rate`` is rounded and clamped.

        a_i = (1/2 + sign(r_i) * (c_i - x_i)) / |r_i|,     c_i = clamp(round(x_i), low, high)

    Infinite for a weight that does not move, or moves outwards from an end code. The m-th smallest is the smallest
    factor that changes m codes (of the grid before the step).

    Args:
        position: weights x_i in code units, any shape.
        rate: displacement r_i in code units per unit of factor, same shape.
        low: smallest code, a number or (like `high`) a tensor of that shape.
        high: largest code.

    Returns:
        Non-negative factors, same shape. Source: own derivation.

    Example:
        >>> crossing_times(torch.tensor([0.25, 0.25, 3.0]), torch.tensor([0.5, -0.5, 1.0]), -4, 3)
        tensor([0.5000, 1.5000,    inf])
    """
    code = position.round().clamp_(low, high)  # type: ignore[arg-type]  # two numbers or two tensors
    # A few units in the last place of a code, so that the update, once rounded, is beyond the boundary.
    half = 0.5 + 2 * torch.finfo(position.dtype).eps * (high - low + 1)
    move = rate.new_ones(()).copysign(rate).add_(code).clamp_(low, high).sub_(code)  # type: ignore[arg-type]
    return code.sub_(position).mul_(move).add_(half).div_(move.mul_(rate).abs_())  # outwards: move is 0


class GradientInundation:
    """Scale an optimizer's step of each quantized weight tensor until enough of its integer codes change.

    ``w <- w + factor * step``: `step` is what the optimizer would have done, weight decay included, and exact however
    small for torch's usual optimizers (for others, and subclasses, the difference after and before). Optimizer state
    never sees the factor; other parameters take their plain step. The factor is 1 where the step is zero or not finite;
    where too few weights can move it is `cap`, or 1 without one.

    Args:
        optimizer: the optimizer that owns the weights; hooks are installed on it.
        weights: the quantized weights, float32 or float64, all alike and on one device.
        flip_rate: share of codes per tensor and step that must change, above 0, at most 1; at least one code.
        mode: ``"exact"`` selects the factor as an order statistic on the grid before the step and never waits for the
            device; ``"search"`` is the published doubling and bisection, with ranges re-fitted to every candidate: it
            waits for the device and, returning its last midpoint, may miss the target.
        cap: largest factor, or None. In ``"search"``, as published, doubling stops once the factor exceeds `cap`: up
            to 1.97 times `cap` (126 for the published 100).
        cap_steps: `cap` holds for this many first optimizer steps; None: for all.
        milestones: optimizer steps at which `flip_rate` is multiplied by `decay`.
        decay: see `milestones`; above 0, at most 1.
        search_steps: bisections in ``"search"``.

    Raises:
        BadInput: if a number is out of range, or a weight is given twice or not in the optimizer.

    Source: AIT (CVPR 2022), gradient inundation; the published code supports SGD only.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Sequence[InundatedWeight],
        *,
        flip_rate: float = 1e-3,
        mode: Literal["exact", "search"] = "exact",
        cap: float | None = None,
        cap_steps: int | None = None,
        milestones: Sequence[int] = (),
        decay: float = 0.1,
        search_steps: int = 5,
    ) -> None:
        _require("flip_rate", 0 < flip_rate <= 1, "a share above 0, at most 1", flip_rate, "The paper uses 1e-3.")
        _require("mode", mode in ("exact", "search"), "'exact' or 'search'", mode, "'search' is the published one.")
        _require("cap", cap is None or 1 <= cap < math.inf, "a finite factor from 1", cap, "None is no cap.")
        _require("cap_steps", cap_steps is None or cap_steps >= 0, "a step count", cap_steps, "None caps every step.")
        _require("milestones", all(m >= 0 for m in milestones), "step counts", milestones, "Give numbers from 0.")
        _require("decay", 0 < decay <= 1, "a factor above 0, at most 1", decay, "The paper uses 0.1.")
        _require("search_steps", search_steps >= 1, "a whole number from 1", search_steps, "The paper uses 5.")
        self._weights, self._parameters = list(weights), [weight.parameter for weight in weights]
        _check_parameters(self._parameters, optimizer)
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._initial_rate, self._milestones, self._decay = flip_rate, tuple(milestones), decay
        self._mode, self._cap, self._cap_steps, self._search_steps = mode, cap, cap_steps, search_steps
        self._steps, self._optimizer = 0, optimizer
        self._factors = self._parameters[0].detach().new_ones(len(self._sizes))
        # Only during a step: the displacement of all weights in one buffer, and per weight a view of it
        self._step, self._step_of = self._factors, list[Tensor]()
        self._before, self._grids = list[Tensor](), list[WeightGrid]()
        self._parked = list[tuple[nn.Parameter, nn.Parameter, dict[str, Any], int]]()
        pre, post = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._handles = pre(self._pre_hook), post(self._post_hook)

    @property
    def factors(self) -> Tensor:
        """Factors of the last step, in the order of the weights, on their device; ones before the first step."""
        return self._factors

    @property
    def flip_rate(self) -> float:
        """Share of codes the next step must change."""
        return self._initial_rate * self._decay ** sum(milestone <= self._steps for milestone in self._milestones)

    def state_dict(self) -> dict[str, int]:
        """The number of optimizer steps taken; flip rate and cap follow from it."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a `state_dict` was taken; BadInput if `state` is not one."""
        steps = state.get("steps", -1)
        _require("state", isinstance(steps, int) and steps >= 0, "a count 'steps'", dict(state), "Pass a state_dict().")
        self._steps = steps

    def remove(self) -> None:
        """Uninstall the hooks; may be called twice."""
        self._unpark()
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _pre_hook(self, _: object, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        self._unpark()  # a step that raised half-way left its stand-ins behind
        parks = type(self._optimizer) in _PARKABLE
        closure = args[1] if len(args) > 1 else named.get("closure")
        if parks and closure is not None:  # now, while the weights are in their places
            loss = torch.enable_grad()(closure)()
            args, named = args[:1], {**named, "closure": lambda: loss}
        self._step = self._parameters[0].new_zeros(sum(self._sizes))
        self._step_of = self._views(self._step)
        if self._mode == "exact":  # before the step: a folded BatchNorm may be updated by the same optimizer
            self._grids = [weight.grid() for weight in self._weights]
        if parks:
            self._park()
        else:
            self._before = [parameter.detach().clone() for parameter in self._parameters]
        return args, named

    @torch.no_grad()
    def _post_hook(self, *_: object) -> None:
        self._unpark()
        for parameter, before, step in zip(self._parameters, self._before, self._step_of, strict=False):
            torch.sub(parameter, before, out=step)
            parameter.copy_(before)
        cap = self._cap if self._cap_steps is None or self._steps < self._cap_steps else None
        self._factors = self._exact_factors(cap) if self._mode == "exact" else self._searched_factors(cap)
        for parameter, step, factor in zip(self._parameters, self._step_of, self._factors.unbind(), strict=True):
            parameter.addcmul_(step, factor)
        self._steps += 1
        self._step, self._step_of, self._before, self._grids = self._factors, [], [], []

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Slices of a flat buffer in the shape and memory format of the weights; fused optimizers insist on both."""
        return [
            chunk.as_strided(like.shape, torch.empty_like(like, device="meta").stride(), chunk.storage_offset())
            for chunk, like in zip(flat.split(self._sizes), self._parameters, strict=True)
        ]

    def _park(self) -> None:
        """Put zero tensors in the weights' places: the optimizer leaves its displacement in them, free of rounding."""
        step_of = {id(parameter): step for parameter, step in zip(self._parameters, self._step_of, strict=True)}
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused step under GradScaler divides by it
        for group in self._optimizer.param_groups:
            decay = 0 if group.get("decoupled_weight_decay", False) else group.get("weight_decay", 0)
            for place, parameter in enumerate(group["params"]):
                step, gradient = step_of.get(id(parameter)), parameter.grad
                if step is None or gradient is None:
                    continue
                if decay != 0:  # the optimizer cannot decay a stand-in
                    decayed = parameter if scale is None else parameter * scale.to(parameter.device)
                    gradient = gradient.add(decayed, alpha=-decay if group.get("maximize", False) else decay)
                stand_in = nn.Parameter(step, requires_grad=False)  # shares the memory of `step`
                stand_in.grad = gradient
                if parameter in self._optimizer.state:
                    self._optimizer.state[stand_in] = self._optimizer.state.pop(parameter)
                group["params"][place] = stand_in
                self._parked.append((parameter, stand_in, group, place))

    def _unpark(self) -> None:
        skipped = getattr(self._optimizer, "found_inf", None)  # a fused step under GradScaler may skip itself
        for parameter, stand_in, group, place in self._parked:
            group["params"][place] = parameter
            if stand_in in self._optimizer.state:
                self._optimizer.state[parameter] = self._optimizer.state.pop(stand_in)
            if group.get("decoupled_weight_decay", False):
                share = group["lr"] * group["weight_decay"]
                stand_in.sub_(parameter * (share if skipped is None else share * (1 - skipped.to(parameter.device))))
        self._parked = []

    def _exact_factors(self, cap: float | None) -> Tensor:
        """Order statistic of the crossing times: no loop over candidates, nothing read back from the device."""
        position, rate = torch.empty_like(self._step), torch.empty_like(self._step)
        views = zip(self._parameters, self._step_of, self._grids, self._views(position), self._views(rate), strict=True)
        for parameter, step, (inv_step, zero, _, _), at, per_factor in views:
            torch.mul(parameter, inv_step, out=at).sub_(zero)
            torch.mul(step, inv_step, out=per_factor)
        ends = [(low, high) for _, _, low, high in self._grids]
        low, high = ends[0] if len(set(ends)) == 1 else map(self._spread, zip(*ends, strict=True))  # bit widths differ
        pairs = zip(crossing_times(position, rate, low, high).split(self._sizes), self._sizes, strict=True)
        first = torch.stack([_kth_smallest(times, flip_count(self.flip_rate, size)) for times, size in pairs])
        farthest = torch.stack([chunk.abs().max() for chunk in self._step.split(self._sizes)])
        factors = (first * (1 + _OVERSHOOT)).clamp(min=1.0, max=cap)
        return torch.where((farthest > 0) & torch.isfinite(factors * farthest), factors, 1.0)  # false also for NaN

    def _spread(self, values: Sequence[int]) -> Tensor:
        return torch.cat([self._step.new_full((n,), value) for value, n in zip(values, self._sizes, strict=True)])

    def _searched_factors(self, cap: float | None) -> Tensor:
        pairs = zip(self._weights, self._step_of, strict=True)
        return self._step.new_tensor([_search(w, u, self.flip_rate, cap, self._search_steps) for w, u in pairs])


def flip_count(flip_rate: float, size: int) -> int:
    """Smallest m >= 1 with ``m / size >= flip_rate``: how many of `size` codes must change."""
    return min(size, max(1, math.ceil(flip_rate * size - 1e-6)))  # 1e-6: a decayed rate is not an exact decimal


def _kth_smallest(values: Tensor, count: int) -> Tensor:
    return values.min() if count == 1 else values.topk(count, largest=False, sorted=False).values.max()


def _search(weight: InundatedWeight, step: Tensor, flip_rate: float, cap: float | None, bisections: int) -> float:
    """Doubling, then bisection, as published; waits for the device at every candidate."""

    def codes(values: Tensor) -> Tensor:
        inv_step, zero, qmin, qmax = weight.grid(values)
        return (values * inv_step).sub_(zero).round_().clamp_(qmin, qmax)

    def flips(factor: float) -> int:
        return int((codes(torch.add(start, step, alpha=factor)) != before).sum())

    start, farthest, high = weight.parameter.detach(), float(step.abs().max()), 1.0
    before, target = codes(start), flip_count(flip_rate, start.numel())
    while flips(high) < target and (cap is None or high <= cap):
        high *= 2
        if high > _MAX_FACTOR or not 0 < high * farthest < math.inf:
            return 1.0
    low, middle = high / 2, high
    for _ in range(bisections if high > 1 else 0):
        middle = (low + high) / 2
        found = flips(middle)
        if abs(found / start.numel() - flip_rate) < flip_rate / 100:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return middle


def _require(name: str, good: object, expected: str, got: object, fix: str) -> None:
    if not good:
        raise BadInput(f"gradient inundation: {name}", expected=expected, got=got, fix=fix)


def _check_parameters(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    foreign = [f"number {i}, {tuple(p.shape)}" for i, p in enumerate(parameters) if id(p) not in owned]
    kinds = sorted({f"{parameter.dtype} on {parameter.device}" for parameter in parameters})
    _require("weights", parameters, "at least one", "none", "Give the quantized weights of the student.")
    alike = len(kinds) == 1 and parameters[0].dtype in (torch.float32, torch.float64)
    _require("weights", alike, "one device, float32 or float64", kinds, "Keep latent weights in float32.")
    _require("weights", len({*map(id, parameters)}) == len(parameters), "each once", "repeats", "Drop the repeats.")
    _require("weights", not foreign, "parameters of the optimizer", foreign, "Add them to it, or leave them out.")
