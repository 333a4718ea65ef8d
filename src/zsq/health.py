"""Is an adversarial run still healthy? A few numbers every some updates, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zsq.grid import encode
from zsq.insert import activation_quantizers, quantized_weights
from zsq.quantizer import Quantizer
from zsq.run import Run
from zsq.sources.base import Source

Gap = Callable[[Tensor, Tensor], Tensor]


class Health:
    """Looks at a student while it is trained; advanced like a learning-rate schedule, after every update.

    Every `every` updates it logs

    * ``noise_gap``: D_o on a fixed batch of noise; it should not grow;
    * ``image_gap``: D_o on new images of the source, which an adversary widens and the student narrows;
    * ``saturation``: share of values outside the range of their activation quantizer on those images, mean over sites,
      and ``saturation.SITE`` of each;
    * ``flips``: share of integer weights that changed since the last look.

    Args:
        student: from `quantize`.
        teacher: the float network.
        source: of the images; sampled, which changes nothing.
        run: logs, and gives the randomness.
        gap: D_o of a student's and a teacher's raw output, 0-dim.
        noise: images [n, c, h, w]; as many are sampled from the source.
        every: updates between two looks.

    Source: ZAQ names none of these; they show the three ways in which it fails: the student forgets (first), the
        generator runs away (second, third), or nothing moves (last).
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, source: Source, run: Run, *, gap: Gap, noise: Tensor,
        every: int = 20,
    ) -> None:  # fmt: skip
        self._student, self._teacher, self._source, self._run = student, teacher, source, run
        self._gap, self._noise, self._every = gap, noise, every
        self._count = 0
        self._codes = self._now()

    def step(self) -> None:
        """Count an update, and look if it is time."""
        self._count += 1
        if self._count % self._every == 0:
            with torch.no_grad():
                self._run.log(**self._look())

    def _look(self) -> dict[str, Tensor]:
        made = self._source.sample(len(self._noise), self._run.rng("health", self._count)).images
        noise = self._gap(self._student(self._noise), self._teacher(self._noise))
        outside: dict[str, Tensor] = {}
        sites = activation_quantizers(self._student)
        hooks = [site.register_forward_pre_hook(_watching(name, outside)) for name, site in sites.items()]
        try:
            low_bit = self._student(made)
        finally:
            for hook in hooks:
                hook.remove()
        terms = {"noise_gap": noise, "image_gap": self._gap(low_bit, self._teacher(made))}
        if outside:
            terms["saturation"] = torch.stack(list(outside.values())).mean()
        codes, changed, total = self._now(), torch.zeros((), device=noise.device), 0
        for name, now in codes.items():
            changed, total = changed + (now != self._codes[name]).sum(), total + now.numel()
        self._codes = codes
        terms["flips"] = changed / max(total, 1)
        return terms | {f"saturation.{name}": share for name, share in outside.items()}

    def _now(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {
                weight.name: encode(weight.parameter, weight.grid()).to(torch.int8)
                for weight in quantized_weights(self._student)
            }

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "codes": self._codes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._codes = {name: codes.to(self._noise.device) for name, codes in state["codes"].items()}


def _watching(name: str, outside: dict[str, Tensor]) -> Callable[[Quantizer, tuple[Tensor, ...]], None]:
    def hook(site: Quantizer, args: tuple[Tensor, ...]) -> None:
        grid = site.grid(args[0])
        codes = args[0] * grid.inv_step - grid.zero
        outside[name] = ((codes < grid.qmin - 0.5) | (codes > grid.qmax + 0.5)).float().mean()

    return hook
