"""torchvision's networks; segmenters and detectors end at raw outputs, before anchors, suppression and up-sampling."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.teachers.facts import Facts
from zsq.teachers.zoos import Found, fetch, import_package, unknown

KINDS = ("segmentation", "detection")


def from_torchvision(name: str, *, pretrained: bool) -> Found:
    """Build ``torchvision:NAME``; its facts are those of its default weights.

    Args:
        name: of a classifier (``resnet18``), a segmenter (``deeplabv3_mobilenet_v3_large``, ``lraspp_...``,
            ``fcn_...``) or a detector of one stage (``ssdlite320_mobilenet_v3_large``, ``ssd300_vgg16``,
            ``retinanet_...``, ``fcos_...``).
        pretrained: with its trained weights; without, nothing is downloaded.

    Raises:
        BadInput: without torchvision, for a name it does not have, or for a detector of two stages.
    """
    models = import_package("torchvision.models")
    families = [models, *(getattr(models, kind, None) for kind in KINDS)]
    names = [models.list_models(module=family) if family is not None else [] for family in families]
    kind = next((kind for kind, known in zip(("", *KINDS), names, strict=True) if name in known), None)
    if kind is None:
        raise unknown("torchvision", name, [each for known in names for each in known])
    weights = models.get_model_weights(name).DEFAULT
    # Without this a network without weights would still fetch those of its backbone.
    bare = {"weights_backbone": None} if kind else {}
    chosen = weights if pretrained else None
    net: Any = fetch(f"torchvision:{name}", lambda: models.get_model(name, weights=chosen, **bare))
    build = {"": _classifier, "segmentation": _segmenter, "detection": _detector}[kind]
    return build(net, weights, name)


def _classifier(net: nn.Module, weights: Any, _: str) -> Found:
    prepare = weights.transforms()
    size = int(prepare.crop_size[0])
    facts = Facts(
        classes=len(weights.meta["categories"]), image=(3, size, size), mean=tuple(prepare.mean),
        std=tuple(prepare.std), resize=int(prepare.resize_size[0]), crop=size,
    )  # fmt: skip
    return Found(net, facts)


def _segmenter(net: Any, weights: Any, _: str) -> Found:
    prepare = weights.transforms()
    size = int(prepare.resize_size[0])
    facts = Facts(
        task="segment", classes=len(weights.meta["categories"]), image=(3, size, size), mean=tuple(prepare.mean),
        std=tuple(prepare.std),
    )  # fmt: skip
    return Found(RawSegmenter(net), facts, unused=("aux_classifier.",))


def _detector(net: Any, weights: Any, name: str) -> Found:
    if not all(hasattr(net, part) for part in ("head", "anchor_generator", "box_coder")):
        raise BadInput(f"teacher torchvision:{name}", expected="a detector of one stage: ssd, ssdlite, retinanet, fcos",
                       got="another, whose boxes depend on its own proposals", fix="Choose one of these.")  # fmt: skip
    prepare = net.transform
    height, width = prepare.fixed_size[::-1] if prepare.fixed_size else [min(prepare.min_size)] * 2
    image = (3, int(height), int(width))
    kind: Literal["softmax", "sigmoid"] = "softmax" if type(net).__name__.startswith("SSD") else "sigmoid"
    facts = Facts(
        task="detect", classes=len(weights.meta["categories"]) - 1, image=image, mean=tuple(prepare.image_mean),
        std=tuple(prepare.image_std), decode=AnchorBoxes(net, image),
    )  # fmt: skip
    return Found(RawDetector(net, kind), facts)


class RawSegmenter(nn.Module):
    """Backbone and classifier, without up-sampling and auxiliary output; the parameters keep their names.

    Args:
        net: DeepLabV3, FCN or LR-ASPP of torchvision.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.backbone, self.classifier = net.backbone, net.classifier
        self._all = hasattr(net.classifier, "low_classifier")  # LR-ASPP's head reads two resolutions

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, h, w], normalised, to logits [b, classes, h', w']."""
        features = self.backbone(x)
        out: Tensor = self.classifier(features if self._all else features["out"])
        return out


class RawDetector(nn.Module):
    """Backbone and head, every anchor's numbers along the channels; the parameters keep their names.

    Args:
        net: SSD, RetinaNet or FCOS of torchvision.
        kind: what turns class logits into probabilities; with softmax channel 0 is the background. With sigmoids it
            is never used: torchvision numbers classes from 1.
    """

    def __init__(self, net: Any, kind: Literal["softmax", "sigmoid"]) -> None:
        super().__init__()
        self.backbone, self.head, self._softmax = net.backbone, net.head, kind == "softmax"

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, h, w], normalised, to [b, 4 + 1 + classes, anchors]: box, objectness (FCOS only), probabilities."""
        features = self.backbone(x)
        found = self.head([features] if isinstance(features, Tensor) else list(features.values()))
        parts = [found["bbox_regression"].transpose(1, 2)]
        if "bbox_ctrness" in found:
            parts.append(found["bbox_ctrness"].transpose(1, 2).sigmoid())
        logits = found["cls_logits"].transpose(1, 2)
        parts.append(logits.softmax(1) if self._softmax else logits.sigmoid())
        return torch.cat(parts, 1)


class AnchorBoxes:
    """Boxes of a raw output, by the network's own anchors and coder.

    Args:
        net: detector of torchvision, which is put into eval mode.
        image: input shape; the anchors are those of this size, whatever the size of the images a run is made on.
    """

    def __init__(self, net: Any, image: tuple[int, int, int]) -> None:
        self._size = image[1:]
        with torch.no_grad():
            x = torch.zeros(1, *image)
            found = net.eval().backbone(x)
            features = [found] if isinstance(found, Tensor) else list(found.values())
            shape = SimpleNamespace(tensors=x, image_sizes=[self._size])
            self._anchors: Tensor = net.anchor_generator(shape, features)[0]
            self._objectness = int("bbox_ctrness" in net.head(features))
        # FCOS's coder knows whole batches only, the others' `decode` wants lists.
        self._decode: Callable[..., Tensor] = getattr(net.box_coder, "decode_single", None) or net.box_coder.decode

    def __call__(self, joined: Tensor) -> Tensor:
        """Decode.

        Args:
            joined: output of `RawDetector`, shape [b, channels, anchors].

        Returns:
            Shape [b, anchors, 6]: x1, y1, x2, y2 in units of the image's sides, score, class. An anchor gives its best
            class; where there is a centre-ness, the score is the root of its product with the probability.
        """
        if joined.shape[2] != len(self._anchors):
            size = f"{self._size[0]}x{self._size[1]}"
            raise BadInput("detector", expected=f"{len(self._anchors)} anchors, those of {size}", got=joined.shape[2],
                           fix="Its boxes can be had for images of that size only.")  # fmt: skip
        rows = joined.transpose(1, 2).float().cpu()
        unit = torch.tensor([*self._size[::-1], *self._size[::-1]])
        corners = torch.stack([self._decode(box, self._anchors.cpu()) for box in rows[..., :4]]) / unit
        score, best = rows[..., 5 + self._objectness :].max(-1)  # without channel 0
        if self._objectness:
            score = (score * rows[..., 4]).sqrt()
        return torch.cat([corners.clamp(0, 1), score[..., None], best[..., None].float()], -1)
