"""Stages found from the graph, on networks that write their stages in every way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Shared
from zsq.insert import QuantSpec, quantize
from zsq.teachers import load_teacher
from zsq.teachers.nets import digits_net, resnet20
from zsq.units import find_stages
from zsq.view import look


def maps(net: nn.Module, image: tuple[int, int, int], *, student: bool = False) -> list[tuple[int, ...]]:
    """Shapes of the stages, without the batch."""
    stages = find_stages(net, image)
    seen: nn.Module = quantize(net, QuantSpec())[0] if student else net
    seen.eval()
    with torch.no_grad():
        view = look(seen, torch.rand(2, *image), features=[stage.within(seen) for stage in stages])
    return [tuple(value.shape[1:]) for value in view.features.values()]


@pytest.mark.parametrize("student", [False, True])
def test_residual_stages(student: bool) -> None:
    assert maps(resnet20(10).eval(), (3, 32, 32), student=student) == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert maps(digits_net().eval(), (1, 8, 8), student=student) == [(16, 8, 8), (32, 4, 4), (48, 2, 2)]


class Functional(nn.Module):
    """A stem, strided blocks with a shortcut, a gate, functional activations and average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.b0, self.b1, self.b2 = nn.Conv2d(6, 8, 1, 2), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.a2(F.relu(self.a1(x))))
        x = F.relu(self.b0(x) + self.b2(F.relu(self.b1(x))))
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


def test_no_stem_no_inner_map_no_gate() -> None:
    net = Functional().eval()
    stages = find_stages(net, (3, 16, 16))
    # The last map is seen by nobody: functions make and average it. What the last layer before it gives stands for it.
    assert stages[0].output == "b0:input" and len(stages) == 2
    assert maps(net, (3, 16, 16)) == maps(net, (3, 16, 16), student=True)


class Detector(nn.Module):
    """Two heads at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.extra = nn.Conv2d(8, 8, 3, 2, 1)
        self.heads = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        near = F.relu(self.c2(F.relu(self.c1(x))))
        far = F.relu(self.extra(near))
        return torch.cat([head(z).flatten(2) for head, z in zip(self.heads, (near, far), strict=True)], dim=2)


def test_dense_outputs_end_in_what_the_last_layers_read() -> None:
    assert maps(Detector().eval(), (3, 32, 32)) == [(8, 8, 8), (8, 4, 4)]


def test_a_network_without_maps_has_no_stages() -> None:
    assert find_stages(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)), (3, 2, 2)) == []


def test_folded_batchnorm_is_found_in_front() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mean((2, 3))

    whole = Mean().eval()
    student, _ = quantize(whole, QuantSpec(placement="deploy"))
    names = [(stage.within(whole), stage.within(student)) for stage in find_stages(whole, (3, 9, 9))]
    assert names == [("body.3", "body.2")]


FACTS: dict[str, dict[str, Any]] = {
    "camvid_cgnet": {"task": "segment", "classes": 11},
    "coco_fastestdet": {"task": "detect", "classes": 80},
}


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("cifar10_resnet20_a", (3, 32, 32), [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("camvid_cgnet", (3, 64, 96), [(35, 32, 48), (131, 16, 24), (256, 8, 12)]),
        ("coco_fastestdet", (3, 64, 64), [(48, 8, 8), (96, 4, 4), (96, 4, 4), (96, 4, 4), (96, 4, 4)]),
    ],
)
def test_real_networks(shared: Shared, name: str, image: tuple[int, int, int], expected: list[tuple[int, ...]]) -> None:
    weights, nets = shared / f"teachers/{name}.safetensors", shared / "teachers/nets.py"
    net = load_teacher(f"{nets}:{name}", weights=weights, image=image, **FACTS.get(name, {})).net
    assert maps(net, image) == maps(net, image, student=True) == expected
