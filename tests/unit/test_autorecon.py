"""AutoReCon's generators: the decoded tables, and the rewrites against the graph as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tiny import tiny_teacher
from zsq.errors import BadInput
from zsq.generators_searched import ARCHITECTURES, SearchedGenerator, choose_architecture, count_parameters
from zsq.recipes import ait, autorecon
from zsq.run import Run

CIFAR10, CIFAR100 = "cifar10-resnet20", "cifar100-resnet20"
# Architecture -> classes, image side, parameters with dead branches and 1000-row tables [M], MACs per image [G]
PUBLISHED = {
    CIFAR10: (10, 32, 5.995, 0.52),
    CIFAR100: (100, 32, 6.138, 0.62),
    "imagenet-resnet18": (1000, 224, 42.40, 28.5),
    "imagenet-resnet50": (1000, 224, 42.20, 26.1),
    "imagenet-mobilenetv2": (1000, 224, 42.17, 25.6),
}


# ---- the published graph, operation by operation


def norm(x: Tensor, module: Any, labels: Tensor) -> Tensor:
    x = F.batch_norm(x, None, None, training=True, eps=0.8)
    return module.weight[labels][:, :, None, None] * x + module.bias[labels][:, :, None, None]


def candidate(x: Tensor, op: Any, labels: Tensor, *, kernel: int = 1, dilation: int = 1) -> Tensor:
    padding = {(1, 1): 0, (3, 1): 1, (5, 1): 2, (3, 2): 2, (5, 2): 4}[kernel, dilation]
    x = F.leaky_relu(norm(x, op.norm, labels), 0.2)
    return F.conv2d(x, op.conv.weight, op.conv.bias, padding=padding, dilation=dilation)


def enlarge(x: Tensor, mode: str, op: Any, labels: Tensor) -> Tensor:
    """Up-sampling first, as published; a dead branch is computed like nearest and multiplied by zero."""
    if mode == "L":
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    else:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return candidate(x, op, labels) if op is not None else 0 * x


def naive(net: SearchedGenerator, z: Tensor, labels: Tensor) -> Tensor:
    base = [side // 8 for side in net.image[1:]]
    parts = [z[:, 0:33], z[:, 33:66], z[:, 66:100]]
    x, old = torch.zeros(()), []
    for level, cell in enumerate(net.cells):
        entry = net.linears[level](parts[level]).view(-1, 64, *(side * 2**level for side in base))
        x = entry if level == 0 else x + entry
        table = cell.cell
        n = [enlarge(x, mode, op, labels) for mode, op in zip(table.ups, cell.ups, strict=True)]

        def conv(i: int, y: Tensor, cell: Any = cell) -> Tensor:
            text = cell.cell.convs.split()[i]
            if text == "0":
                return 0 * y
            return candidate(y, cell.convs[str(i)], labels, kernel=int(text[-1]), dilation=2 if text[0] == "d" else 1)

        def skip(i: int, y: Tensor, cell: Any = cell) -> Tensor:
            op = dict(cell.skips.items()).get(str(i))
            return enlarge(y, cell.cell.skips[i], op, labels)

        n.append(conv(0, n[0]) + conv(1, n[1]))
        if old:
            n[2] = n[2] + skip(0, old[0]) + skip(1, old[1]) + skip(2, old[2])
        x = conv(2, n[0]) + conv(3, n[1]) + conv(4, n[2])
        if old:
            x = x + skip(3, old[0]) + skip(4, old[1]) + skip(5, old[2])
        old = n
    x = F.conv2d(F.leaky_relu(norm(x, net.norm, labels), 0.2), net.conv.weight, net.conv.bias, padding=1)
    return F.batch_norm(torch.tanh(x), None, None, training=True, eps=1e-5)


def shaken(name: str, image: tuple[int, int, int], classes: int = 4) -> SearchedGenerator:
    """A generator whose classes differ."""
    net = SearchedGenerator(name, classes, image)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "norm" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewrites_are_the_published_graph(name: str, dtype: torch.dtype, tolerance: float) -> None:
    net = shaken(name, (3, 16, 8)).to(dtype)
    z, y = torch.randn(6, 100, dtype=dtype), torch.randint(4, (6,))
    fast, slow = net(z, y), naive(net, z, y)
    assert (fast - slow).abs().max() < tolerance * slow.abs().max()
    weights = torch.randn_like(slow)
    pairs = [torch.autograd.grad((out * weights).mean(), list(net.parameters())) for out in (fast, slow)]
    scale = max(float(b.abs().max()) for b in pairs[1])
    assert all((a - b).abs().max() < tolerance * scale for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_changes_nothing(layout: torch.memory_format) -> None:
    net = shaken(CIFAR10, (3, 16, 16)).double().to(memory_format=layout)
    z, y = torch.randn(4, 100, dtype=torch.float64), torch.randint(4, (4,))
    torch.testing.assert_close(net(z, y), naive(net, z, y), rtol=0, atol=1e-10)


# ---- tables and sizes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_counts(name: str) -> None:
    classes, side, millions, _ = PUBLISHED[name]
    image = (3, side, side)
    with torch.device("meta"):
        net = SearchedGenerator(name, classes, image)
    assert sum(p.numel() for p in net.parameters()) == count_parameters(name, image, classes)
    published = count_parameters(name, image, classes, table=1000, dead=True)
    assert published / 1e6 == pytest.approx(millions, abs=0.0051 if side == 224 else 0.0006)
    dead = published - count_parameters(name, image, classes, table=1000)
    assert dead / 1e6 == pytest.approx(0.53 if side == 32 else 0, abs=0.005)


def test_tables_are_complete() -> None:
    for cells in ARCHITECTURES.values():
        assert len(cells) == 3 and cells[0].skips == ""
        for i, cell in enumerate(cells):
            assert len(cell.ups) == 2 and len(cell.convs.split()) == 5 and len(cell.skips) == (6 if i else 0)
            assert set(cell.ups + cell.skips) <= set("NL0")
            assert set(cell.convs.split()) <= {"0", "1", "3", "5", "d3", "d5"}
    for name in (CIFAR10, CIFAR100):
        net = SearchedGenerator(name, 10, (3, 8, 8))
        candidates = sum(len(cell.ups) + len(cell.convs) + len(cell.skips) for cell in net.cells)
        none = sum(cell.convs.split().count("0") + cell.skips.count("0") for cell in ARCHITECTURES[name])
        assert candidates == 3 * 7 + 2 * 6 - none
        assert net.cells[1].convs["0"].norm.weight.shape == (10, 64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_runs_at_its_published_size(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    classes, side, _, giga = PUBLISHED[name]
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        net = SearchedGenerator(name, classes, (3, side, side))
        assert net(torch.randn(2, 100), torch.zeros(2, dtype=torch.int64)).shape == (2, 3, side, side)
    # fewer than published: what reads a nearest up-sampling runs before it
    share = flops.get_total_flops() / 4e9 / giga
    expected = {CIFAR10: 0.52, CIFAR100: 0.45, "imagenet-mobilenetv2": 0.78}.get(name, 0.97)
    assert share == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("teacher", "classes", "side", "expected"),
    [("resnet20-cifar10", 10, 32, CIFAR10), ("resnet20-cifar100", 100, 32, CIFAR100), ("digits", 10, 8, CIFAR10),
     ("torchvision:resnet18", 1000, 224, "imagenet-resnet18"), ("timm:resnet50.a1", 1000, 224, "imagenet-resnet50"),
     ("torchvision:mobilenet_v2", 1000, 224, "imagenet-mobilenetv2"), ("mine.py", 7, 96, "imagenet-resnet18")],
)  # fmt: skip
def test_architecture_follows_the_teacher(teacher: str, classes: int, side: int, expected: str) -> None:
    assert choose_architecture(teacher, classes, (3, side, side)) == expected


# ---- images


@pytest.mark.parametrize("image", [(3, 32, 32), (1, 8, 8), (4, 8, 24)])
def test_images_have_unit_statistics(image: tuple[int, int, int]) -> None:
    net = SearchedGenerator(CIFAR100, 5, image)
    x = net(torch.randn(16, 100), torch.randint(5, (16,)))
    assert x.shape == (16, *image) and x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(image[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(image[0]), rtol=0, atol=0.01)


def test_the_latent_is_cut_in_33_33_34() -> None:
    net = SearchedGenerator(CIFAR10, 5, (3, 8, 8))
    assert [linear.in_features for linear in net.linears] == [33, 33, 34]
    assert [linear.out_features for linear in net.linears] == [64, 256, 1024]
    seen: list[Tensor] = []
    for linear in net.linears:
        linear.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    z = torch.randn(3, 100)
    net(z, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(torch.cat(seen, 1), z)


def test_only_rows_of_the_labels_matter() -> None:
    net = shaken(CIFAR10, (3, 8, 8), classes=4)
    z, y = torch.randn(5, 100), torch.tensor([0, 2, 2, 0, 2])
    before = net(z, y)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "norm" in key:
                parameter[[1, 3]] = float("nan")
    assert torch.equal(net(z, y), before)
    assert (net(z, (y + 2) % 4) - before).abs().max() > 0.01


def test_bfloat16_stays_close() -> None:
    net = SearchedGenerator(CIFAR10, 5, (3, 16, 16))
    z, y = torch.randn(16, 100), torch.randint(5, (16,))
    with torch.autocast("cpu", torch.bfloat16):
        half = net(z, y)
    assert half.dtype == torch.float32 and (half - net(z, y)).square().mean() < 5e-3


def test_every_parameter_learns() -> None:
    net = shaken(CIFAR100, (3, 8, 8), classes=3)
    net(torch.randn(8, 100), torch.randint(3, (8,))).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("image", [(3, 12, 16), (3, 4, 4)])
def test_sizes_it_refuses(image: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="divisible by 8"):
        SearchedGenerator(CIFAR10, 10, image)


# ---- the recipe


def short_run(**options: Any) -> Any:
    with Run(None, progress=False) as run:
        return autorecon(tiny_teacher(), run, **{"steps": 1, "warmup": 1, "batch": 4, **options})


def test_the_architecture_is_an_option() -> None:
    assert short_run().plan["architecture"] == CIFAR10
    outcome = short_run(architecture="imagenet-resnet50")
    assert outcome.plan["architecture"] == outcome.source.generator.architecture == "imagenet-resnet50"
    with pytest.raises(BadInput, match="--architecture: expected one of cifar10-resnet20.*got 'none'"):
        short_run(architecture="none")


def test_as_base_of_ait() -> None:
    with Run(None, progress=False) as run:
        outcome = ait(tiny_teacher(), run, base="autorecon", steps=1, warmup=1, batch=4)
    assert outcome.source.name == "autorecon" and outcome.plan["flip_rate"] == 1e-3


def test_flip_rate_above_64_pixels() -> None:
    def rate(fidelity: str) -> float:
        with Run(None, progress=False) as run:
            options: dict[str, Any] = {"fidelity": fidelity, "steps": 0, "warmup": 1, "batch": 2}
            return ait(tiny_teacher(72), run, base="autorecon", **options).plan["flip_rate"]

    assert (rate("best"), rate("official")) == (1e-4, 1e-3)
