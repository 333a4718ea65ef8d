"""What Qimera's generator is fed with: superposed latents, and the teacher's classifier as first embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zsq.errors import BadInput
from zsq.generators_superposed import soft_labels
from zsq.sources.generator import Latents, LatentSampler

if TYPE_CHECKING:
    from zsq.teachers import Teacher

_FEATURES = 64  # length of an embedding where no classifier sets it


class Setting(NamedTuple):
    """One released setting, and the data and networks it is for.

    Attributes:
        large: images above 64 pixels.
        classes: number of classes from which on it applies.
        features: width of the classifier from which on it applies.
        superposed: probability that a batch is superposed.
        slots: classes per superposed image, up to 4 bits.
        slots_5bit: the same from 5 bits on.
        embedding: "extracted" or "random".
    """

    large: bool
    classes: int
    features: int
    superposed: float
    slots: int
    slots_5bit: int
    embedding: str


# The last row that fits counts.
SETTINGS = (
    Setting(False, 0, 0, 0.4, 2, 2, "random"),  # CIFAR-10
    Setting(False, 100, 0, 0.4, 10, 50, "extracted"),  # CIFAR-100
    Setting(True, 0, 0, 0.4, 500, 100, "random"),  # ImageNet, ResNet-18
    Setting(True, 0, 1280, 0.4, 100, 100, "random"),  # ImageNet, MobileNetV2
    Setting(True, 0, 2048, 0.7, 500, 100, "extracted"),  # ImageNet, ResNet-50
)


def published(teacher: Teacher, bits: int) -> dict[str, Any]:
    """Give the released numbers for data of this size.

    Args:
        teacher: gives image size, classes and the width of its classifier.
        bits: of the student's weights.

    Returns:
        ``superposed``, ``slots``, ``embedding``; ``disentangle``, on above 64 pixels, where the first layer would
        otherwise have up to 822 M weights.

    Source: Qimera (arXiv 2111.02625), the released scripts.
    """
    large = max(teacher.image[1:]) > 64
    weight = classifier_weight(teacher.net, teacher.image, teacher.classes)
    size = (teacher.classes, _FEATURES if weight is None else weight.shape[1])
    row = [s for s in SETTINGS if s.large == large and size[0] >= s.classes and size[1] >= s.features][-1]
    slots = row.slots if bits < 5 else row.slots_5bit
    return {"superposed": row.superposed, "slots": slots, "embedding": row.embedding, "disentangle": large}


def first_embedding(teacher: Teacher, kind: str) -> tuple[int, Tensor | None]:
    """Length of the embeddings, and what they start from.

    Args:
        teacher: the network.
        kind: "extracted" for the rows of its classifier, "random" for N(0, 1).

    Returns:
        D (the width of the classifier, 64 without one), and the rows [classes, D] or None.

    Raises:
        BadInput: if the kind is unknown, or there is no classifier to extract from.
    """
    if kind not in ("extracted", "random"):
        raise BadInput("--embedding", expected="extracted or random", got=repr(kind), fix="Choose one of the two.")
    weight = classifier_weight(teacher.net, teacher.image, teacher.classes)
    if weight is None and kind == "extracted":
        raise BadInput(
            "--embedding extracted",
            expected="a teacher that ends in a linear layer or a 1x1 convolution with one row per class",
            got=f"none in {teacher.name}",
            fix="Choose --embedding random.",
        )
    return _FEATURES if weight is None else weight.shape[1], weight if kind == "extracted" else None


def superposed_latents(features: int, classes: int, *, superposed: float, slots: int) -> LatentSampler:
    """Draw whole batches of either superposed or single-class latents.

    Args:
        features: length of an embedding D.
        classes: number of classes.
        superposed: probability p that a batch is superposed.
        slots: classes per superposed image K, drawn with repeats; their weights are a softmax of Gaussians.

    Returns:
        A function of (count, rng), which gives the inputs of a `SuperposedGenerator` and soft labels [count, classes].

    Raises:
        BadInput: a probability outside 0 to 1, or no slot.

    Source: Qimera (arXiv 2111.02625), the released training loop.
    """
    if not 0 <= superposed <= 1:
        raise BadInput("--superposed", expected="a probability from 0 to 1", got=superposed, fix="Published: 0.4.")
    if slots < 1:
        raise BadInput(
            "--slots", expected="at least 1 class per superposed image", got=slots, fix="Published: 2 to 500."
        )

    def draw(count: int, rng: torch.Generator) -> Latents:
        # A number that was drawn on the host and stays there: the branch waits for no device.
        mixed = torch.rand(1, generator=rng).tolist()[0] < superposed
        shape = (count, slots) if mixed else (count,)
        chosen = torch.randint(classes, shape, generator=rng)
        z = torch.randn(*shape, features, generator=rng)
        weights = torch.randn(shape, generator=rng).softmax(1) if mixed else torch.ones(count)
        return Latents((z, chosen, weights), soft_labels(chosen, weights, classes))

    return draw


class _Weights(TorchFunctionMode):
    """Notes the weights of linear layers and convolutions in the order they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in (F.linear, F.conv2d):
            self.found.append(args[1] if len(args) > 1 else named["weight"])
        return func(*args, **named)


def classifier_weight(net: nn.Module, image: tuple[int, int, int], classes: int) -> Tensor | None:
    """Find a network's classifier: the last linear layer or 1x1 convolution of a forward that gives `classes` numbers.

    Args:
        net: the teacher's network; run once on black images.
        image: shape (c, h, w) of its input.
        classes: number of classes.

    Returns:
        Its weight [classes, D], float32, detached; None if the network has no such layer.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    with torch.no_grad(), _Weights() as used:
        net(torch.zeros(2, *image, device=device))
    fits = [w for w in used.found if len(w) == classes and w[0].numel() == w.shape[1]]
    return fits[-1].detach().flatten(1).float() if fits else None
