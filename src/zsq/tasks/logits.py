"""What tasks share whose raw output is logits over the classes and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zsq import losses
from zsq.errors import BadInput
from zsq.tasks.base import Reduction


@dataclass(frozen=True)
class Logits:
    """Raw output [b, classes, ...]: logits, one decision per position.

    Attributes:
        classes: number of classes.
    """

    classes: int

    def parts(self, raw: Tensor) -> dict[str, Tensor]:
        """The logits."""
        return {"class": raw}

    def foreground(self, raw: Tensor) -> None:
        """All positions count the same."""
        return

    def kl(
        self, student: Tensor, teacher: Tensor, *, temperature: float = 20.0, reduction: Reduction = "mean",
        through_teacher: bool = False,
    ) -> Tensor:  # fmt: skip
        """T^2 KL over the classes, averaged over positions."""
        return losses.kl(
            student, teacher, temperature=temperature, reduction=reduction, through_teacher=through_teacher
        )


def require_classes(said: int | None, found: int, name: str) -> None:
    """Refuse a number of classes that is not the width of the output.

    Raises:
        BadInput: naming both.
    """
    if said not in (None, found):
        raise BadInput("--classes", expected=f"{found}, the width of the output of {name}", got=said,
                       fix="Correct the number, or leave it out.")  # fmt: skip
