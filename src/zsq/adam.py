"""Adam that counts its steps on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Adam(Optimizer):
    """Adam without weight decay, bit for bit torch's plain one, that reads nothing back from a device.

    torch keeps the number of steps in tensors, one per parameter, and its kernels read them: on a CPU that is a scalar
    read per parameter and step. Here it is a number. A state of torch's Adam can be loaded.

    Args:
        parameters: tensors, or groups of them, as for any optimizer.
        lr: learning rate.
        betas: decay of the two averages.
        eps: added to the root of the second.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> x.grad = torch.ones(1)
        >>> Adam([x], lr=0.5).step()
        >>> x.detach()
        tensor([-0.5000])
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for count in dict.fromkeys(self._count(parameter) for parameter in moving):  # one count, as a rule
                self._update([p for p in moving if self.state[p]["step"] == count], count, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a state was taken, also one of torch's Adam; it comes to lie like the parameters."""
        super().load_state_dict(state_dict)
        for parameter, slots in self.state.items():
            slots["step"] = int(slots["step"])
            for name in ("exp_avg", "exp_avg_sq"):  # files do not keep memory formats
                slots[name] = torch.empty_like(parameter, dtype=slots[name].dtype).copy_(slots[name])

    def _count(self, parameter: Tensor) -> int:
        """Which step of a parameter this is; begins its state."""
        slots = self.state[parameter]
        if not slots:
            slots |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        slots["step"] += 1
        return int(slots["step"])

    def _update(self, parameters: list[Tensor], count: int, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages, squares = ([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(averages, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - second**count) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, averages, roots, -group["lr"] / (1 - first**count))
