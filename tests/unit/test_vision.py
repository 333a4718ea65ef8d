"""torchvision's networks end at their raw outputs: tested against stand-ins with torchvision's own interfaces."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.errors import BadInput
from zsq.insert import QuantSpec, quantize
from zsq.tasks.detect import Detect
from zsq.teachers import Teacher, load_teacher

SIZE, CLASSES = 32, 5  # of the detectors: background and four classes


class Backbone(nn.Module):
    """Two resolutions under names, as torchvision's feature extractors."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(c, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.first(self.first_pool(x))
        return OrderedDict(zip(self.names, (low, self.second(low)), strict=True))

    def first_pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class LowHigh(nn.Module):
    """LR-ASPP's head: reads both resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.low_classifier, self.high_classifier = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        low, high = features["low"], self.high_classifier(features["high"])
        return self.low_classifier(low) + F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    def __init__(self, head: nn.Module, names: tuple[str, str]) -> None:
        super().__init__()
        self.backbone, self.classifier = Backbone(names), head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        out = self.classifier(features if "low" in features else features["out"])
        return {"out": F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)}


class Head(nn.Module):
    """[b, anchors, numbers] over all resolutions, two anchors at each position."""

    def __init__(self, *, centre: bool) -> None:
        super().__init__()
        widths = {"bbox_regression": 4, "cls_logits": CLASSES} | ({"bbox_ctrness": 1} if centre else {})
        self.parts = nn.ModuleDict({name: nn.Conv2d(6, 2 * width, 1) for name, width in widths.items()})
        self.widths = widths

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([self.rows(conv(z), self.widths[name]) for z in features], 1)
                for name, conv in self.parts.items()}  # fmt: skip

    def rows(self, z: Tensor, width: int) -> Tensor:
        b, _, h, w = z.shape
        return z.view(b, -1, width, h, w).permute(0, 3, 4, 1, 2).reshape(b, -1, width)


class Anchors(nn.Module):
    def forward(self, images: Any, features: list[Tensor]) -> list[Tensor]:
        height, width = images.tensors.shape[-2:]
        found = []
        for z in features:
            h, w = z.shape[-2:]
            y, x = torch.meshgrid(torch.arange(h) * height / h, torch.arange(w) * width / w, indexing="ij")
            corner = torch.stack([x, y, x + width / w, y + height / h], -1).reshape(-1, 1, 4)
            found.append(corner.expand(-1, 2, 4).reshape(-1, 4))
        return [torch.cat(found) for _ in images.image_sizes]


class Detector(nn.Module):
    def __init__(self, *, centre: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.anchor_generator = Backbone(("0", "1")), Head(centre=centre), Anchors()
        name = "decode" if centre else "decode_single"
        self.box_coder = SimpleNamespace(**{name: lambda codes, boxes: boxes + codes})
        self.transform = SimpleNamespace(
            image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=(SIZE,), fixed_size=None if centre else (SIZE, SIZE)
        )

    def forward(self, x: Tensor) -> None:
        raise AssertionError("its own forward resizes, matches and suppresses")


class SSD(Detector):
    """Told from the others by its name, as its class scores are a softmax."""


class TwoStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.transform = Backbone(("0", "1")), SimpleNamespace()


BUILD: dict[str, dict[str, Any]] = {
    "segmentation": {
        "deeplabv3_mobilenet_v3_large": lambda: Segmenter(nn.Conv2d(6, 3, 1), ("aux", "out")),
        "lraspp_mobilenet_v3_large": lambda: Segmenter(LowHigh(), ("low", "high")),
    },
    "detection": {"ssdlite320_mobilenet_v3_large": SSD, "fcos_resnet50_fpn": lambda: Detector(centre=True),
                  "retinanet_resnet50_fpn": Detector, "fasterrcnn_resnet50_fpn": TwoStages},
}  # fmt: skip


class FakeModels(ModuleType):
    asked: dict[str, Any] = {}

    def list_models(self, module: ModuleType) -> list[str]:
        return list(BUILD.get(module.__name__.rpartition(".")[2], ["resnet18"]))

    def get_model_weights(self, name: str) -> Any:
        count = 3 if name in BUILD["segmentation"] else CLASSES
        prepare = SimpleNamespace(resize_size=[SIZE], mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3])
        return SimpleNamespace(
            DEFAULT=SimpleNamespace(transforms=lambda: prepare, meta={"categories": list("abcdefg"[:count])})
        )

    def get_model(self, name: str, **options: Any) -> nn.Module:
        FakeModels.asked = options
        torch.manual_seed(3)
        net: nn.Module = {**BUILD["segmentation"], **BUILD["detection"]}[name]()
        return net


@pytest.fixture(autouse=True)
def _torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    models = FakeModels("torchvision.models")
    for kind in BUILD:
        setattr(models, kind, ModuleType(f"torchvision.models.{kind}"))
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def original(name: str) -> Any:
    return FakeModels("torchvision.models").get_model(name).eval()


@pytest.mark.parametrize("name", BUILD["segmentation"])
def test_a_segmenter_gives_logits_before_up_sampling(name: str) -> None:
    teacher = load_teacher(f"torchvision:{name}")
    assert (teacher.task, teacher.classes, teacher.image) == ("segment", 3, (3, SIZE, SIZE))
    assert teacher.mean == (0.4, 0.5, 0.6)
    x = images()
    raw = teacher.net(x)
    assert raw.shape[1] == 3 and raw.shape[2] < SIZE
    up = F.interpolate(raw, size=x.shape[-2:], mode="bilinear", align_corners=False)
    assert torch.equal(up, original(name)(x)["out"])
    student, report = quantize(teacher.net, QuantSpec(4, 4))
    assert len(report.weights) == (4 if "lraspp" in name else 3) and student(x).shape == raw.shape


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_a_detector_gives_every_anchor_before_decoding(name: str) -> None:
    teacher = load_teacher(f"torchvision:{name}")
    task, x = teacher.outputs, images()
    assert isinstance(task, Detect) and teacher.image == (3, SIZE, SIZE)
    assert (task.classes, task.background) == (CLASSES - 1, 1)
    net = original(name)
    wanted = net.head(list(net.backbone(x).values()))
    parts = task.parts(teacher.net(x))
    assert torch.equal(parts["class"], wanted["cls_logits"].transpose(1, 2))
    assert torch.equal(parts["box"], wanted["bbox_regression"].transpose(1, 2))
    assert ("objectness" in parts) == ("bbox_ctrness" in wanted)
    assert {part.name: part.activation for part in task.layout}["class"] == ("softmax" if "ssd" in name else "sigmoid")
    quantize(teacher.net, QuantSpec(4, 4))


def test_boxes_are_those_of_the_network_s_own_anchors_and_coder() -> None:
    teacher = load_teacher("torchvision:ssdlite320_mobilenet_v3_large")
    task = teacher.outputs
    assert isinstance(task, Detect) and task.decode is not None
    joined = torch.zeros(1, 4 + CLASSES, 2 * (8 * 8 + 4 * 4))
    joined[0, 4] = 0.9  # background, except at the third anchor: the second position of the finer grid
    joined[0, 4:, 2] = torch.tensor([0.1, 0.0, 0.0, 0.7, 0.2])
    joined[0, :4, 2] = torch.tensor([1.0, 2.0, 3.0, -1.0])
    rows = task.decode(joined)[0]
    assert torch.allclose(rows[2], torch.tensor([5 / SIZE, 2 / SIZE, 11 / SIZE, 3 / SIZE, 0.7, 2.0]))
    assert rows[:, 4].argmax() == 2 and rows[0, 4] == 0  # the background is no object
    with pytest.raises(BadInput, match="160 anchors, those of 32x32, got 40"):
        task.decode(joined[..., :40])


def test_centre_ness_counts_half() -> None:
    task = load_teacher("torchvision:fcos_resnet50_fpn").outputs
    assert isinstance(task, Detect) and task.decode is not None
    joined = torch.zeros(1, 5 + CLASSES, 160)
    joined[0, 4, 7], joined[0, 6, 7], joined[0, 5, 8] = 0.25, 0.64, 0.99  # channel 0 of the classes means nothing
    rows = task.decode(joined)[0]
    assert torch.allclose(rows[7, 4:], torch.tensor([0.4, 0.0])) and rows[8, 4] == 0


def test_nothing_is_downloaded_with_weights_of_one_s_own(tmp_path: Path) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    load_teacher(f"torchvision:{name}")
    assert FakeModels.asked["weights"] is not None and FakeModels.asked["weights_backbone"] is None
    net = Segmenter(nn.Conv2d(6, 3, 1), ("aux", "out"))
    state = {**net.state_dict(), "aux_classifier.0.weight": torch.ones(1)}  # as published weights have it
    save_file(state, tmp_path / "w.safetensors")
    teacher: Teacher = load_teacher(f"torchvision:{name}", weights=tmp_path / "w.safetensors")
    assert FakeModels.asked == {"weights": None, "weights_backbone": None}
    assert torch.equal(teacher.net.get_parameter("classifier.weight"), net.classifier.weight)


def test_two_stages_are_refused() -> None:
    with pytest.raises(BadInput, match="expected a detector of one stage"):
        load_teacher("torchvision:fasterrcnn_resnet50_fpn")


def test_a_near_miss_is_named() -> None:
    with pytest.raises(BadInput, match="Did you mean ssdlite320_mobilenet_v3_large"):
        load_teacher("torchvision:ssdlite320_mobilenet_v3_small")
