"""AutoReCon's generators: five architectures found by search, decoded from a table and run without redundant work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.errors import BadInput
from zsq.generators import HIDDEN_EPS, BatchStatsNorm, batch_norm, conv_of_doubled

_WIDTH = 64
_SLOPE = 0.2


class Cell(NamedTuple):
    """One up-sampling cell.

    Attributes:
        ups: modes of the two up-samplings of the input, N(earest) or (bi)L(inear).
        convs: the five convolutions: kernel size, "d" in front if dilated by 2; "0" for none.
        skips: modes of the six skips from the cell before, "0" for none; empty in the first cell.
    """

    ups: str
    convs: str
    skips: str = ""


# Decoded from the one-hot matrices of the released program, by the network each was searched for.
ARCHITECTURES: dict[str, tuple[Cell, Cell, Cell]] = {
    "cifar10-resnet20": (
        Cell("NN", "d5 0 d5 d3 5"), Cell("NN", "d5 d5 3 d3 d5", "00L00N"), Cell("LN", "d5 d5 1 5 d3", "NNNLLL")),
    "cifar100-resnet20": (
        Cell("LN", "d5 d5 d5 0 5"), Cell("NN", "d5 5 1 d3 d5", "0LN00N"), Cell("NN", "d5 d3 5 5 d5", "0LNNLL")),
    "imagenet-resnet18": (
        Cell("LL", "d5 d5 d5 d5 d5"), Cell("LL", "d5 d5 d5 d5 d3", "NLNLLN"), Cell("LL", "d5 d5 5 d3 d3", "LLNNLN")),
    "imagenet-resnet50": (
        Cell("LL", "d5 d5 d5 d5 d5"), Cell("LL", "d5 d5 3 1 1", "LLLNNL"), Cell("LL", "d3 d5 d5 5 d3", "NNNNLL")),
    "imagenet-mobilenetv2": (
        Cell("LL", "d5 d5 5 d5 d5"), Cell("LL", "5 d5 1 1 1", "LLNLLL"), Cell("NL", "3 d5 5 d5 d3", "LNLLLN")),
}  # fmt: skip

# Which node each candidate reads and which it adds to, by position in the table; nodes 0 and 1 are the up-samplings.
_Edge = tuple[int, int]
_CONV_EDGES = ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
_SKIP_EDGES = ((0, 2), (1, 2), (2, 2), (0, 3), (1, 3), (2, 3))


def choose_architecture(name: str, classes: int, image: tuple[int, int, int]) -> str:
    """Pick the architecture searched for the most similar teacher.

    Args:
        name: of the teacher.
        classes: number of classes.
        image: (c, h, w) of its input.

    Returns:
        A key of `ARCHITECTURES`.

    Example:
        >>> choose_architecture("torchvision:resnet50", 1000, (3, 224, 224))
        'imagenet-resnet50'
    """
    if max(image[1:]) <= 64:
        return "cifar100-resnet20" if classes >= 100 else "cifar10-resnet20"
    plain = "".join(c for c in name.lower() if c.isalnum())
    known = {"resnet50": "imagenet-resnet50", "mobilenet": "imagenet-mobilenetv2"}
    return next((key for part, key in known.items() if part in plain), "imagenet-resnet18")


def count_parameters(
    architecture: str, image: tuple[int, int, int], classes: int, *, table: int | None = None, dead: bool = False
) -> int:
    """Count the parameters of a generator from its table alone.

    Args:
        architecture: key of `ARCHITECTURES`.
        image: (c, h, w).
        classes: number of classes.
        table: rows of the class tables of the cells; the number of classes if not given (released: 1000).
        dead: count the skips that the released program computes and multiplies by zero.

    Returns:
        The number of parameters.
    """
    rows = classes if table is None else table

    def candidate(kernel: int) -> int:
        return 2 * rows * _WIDTH + _WIDTH * _WIDTH * kernel**2 + _WIDTH

    total = 2 * classes * _WIDTH + image[0] * (9 * _WIDTH + 1)
    for level, length in enumerate((33, 33, 34)):
        total += (length + 1) * _WIDTH * (image[1] * image[2] // 64) * 4**level
    for cell in ARCHITECTURES[architecture]:
        kernels = [int(conv[-1]) for conv in cell.convs.split() if conv != "0"]
        ones = len(cell.ups) + sum(dead or mode != "0" for mode in cell.skips)
        total += sum(map(candidate, kernels + [1] * ones))
    return total


class _Node:
    """A tensor whose readers all begin with the same normalisation: computed once, on first use.

    A tensor made by nearest up-sampling is kept as the small tensor that it repeats.

    Args:
        x: [b, 64, h, w].
        doubled: the tensor meant is `x` after nearest up-sampling to twice the size.
    """

    def __init__(self, x: Tensor, *, doubled: bool = False) -> None:
        self.x, self.doubled = x, doubled
        self._plain: Tensor | None = None
        self._enlarged: Tensor | None = None

    def full(self) -> Tensor:
        """The tensor meant, at its own size."""
        return _double(self.x) if self.doubled else self.x

    def plain(self) -> Tensor:
        """`x` normalised; repeating every number four times changes neither mean nor biased variance."""
        if self._plain is None:
            self._plain = batch_norm(self.x, None, None, HIDDEN_EPS)
        return self._plain

    def enlarged(self) -> Tensor:
        """Normalised after bilinear up-sampling of the tensor meant to twice its size."""
        if self._enlarged is None:
            twice = F.interpolate(self.full(), scale_factor=2, mode="bilinear", align_corners=False)
            self._enlarged = batch_norm(twice, None, None, HIDDEN_EPS)
        return self._enlarged


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Candidate(nn.Module):
    """Conditional BatchNorm, LeakyReLU 0.2 and a convolution that keeps the size; the caller normalises.

    Args:
        kernel: size of the kernel, odd.
        classes: rows of the class table.
        dilation: of the convolution, 1 or 2.
    """

    def __init__(self, kernel: int, classes: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.norm = BatchStatsNorm(_WIDTH, eps=HIDDEN_EPS, classes=classes)
        self.conv = nn.Conv2d(_WIDTH, _WIDTH, kernel, padding=kernel // 2 * dilation, dilation=dilation)

    def forward(self, normalised: Tensor, labels: Tensor) -> Tensor:
        """Map a normalised [b, 64, h, w] to the same shape."""
        out: Tensor = self.conv(self._activate(normalised, labels))
        return out

    def read(self, node: _Node, labels: Tensor) -> tuple[Tensor, int]:
        """Apply to a node, on the small grid if it is doubled; gives the result and what it must yet be enlarged by.

        Steps of 2 on a doubled grid are steps of 1 on the small one: dilated convolutions give doubled tensors again.
        """
        kernel, dilation = self.conv.kernel_size[0], self.conv.dilation[0]
        if not node.doubled or kernel == 1:
            return self(node.plain(), labels), 1 + node.doubled
        h, weight, bias = self._activate(node.plain(), labels), self.conv.weight, self.conv.bias
        if dilation == 1:
            return conv_of_doubled(h, weight, bias), 1
        return F.conv2d(h, weight, bias, padding=kernel // 2), 2

    def _activate(self, normalised: Tensor, labels: Tensor) -> Tensor:
        return F.leaky_relu(self.norm.affine(normalised, labels), _SLOPE, inplace=True)


class SearchedCell(nn.Module):
    """One cell, with only the candidates that contribute.

    Nearest up-sampling commutes with what a candidate does (`Candidate.read`), so it runs as late as possible, once per
    node, on the sum of all that needs it.

    Args:
        cell: row of the table.
        classes: rows of the class tables.
    """

    def __init__(self, cell: Cell, classes: int) -> None:
        super().__init__()
        self.cell = cell
        self.ups = nn.ModuleList(Candidate(1, classes) for _ in cell.ups)
        self.convs = nn.ModuleDict({
            str(i): Candidate(int(conv[-1]), classes, dilation=1 + conv.startswith("d"))
            for i, conv in enumerate(cell.convs.split()) if conv != "0"
        })  # fmt: skip
        self.skips = nn.ModuleDict({str(i): Candidate(1, classes) for i, m in enumerate(cell.skips) if m != "0"})

    def forward(self, x: Tensor, labels: Tensor, previous: Sequence[_Node] = ()) -> list[_Node]:
        """Map [b, 64, h, w] and nodes 0 to 2 of the cell before to nodes 0 to 3 of twice the size; 3 is the output."""
        source = _Node(x)
        ups = zip(self.cell.ups, self.ups, strict=True)
        nodes = [_total([_enlarging(mode, up, source, labels)]) for mode, up in ups]
        for node in (2, 3):
            convs = [op.read(nodes[read], labels) for _, op, read in _into(node, _CONV_EDGES, self.convs)]
            skips = [_enlarging(self.cell.skips[i], op, previous[read], labels)
                     for i, op, read in _into(node, _SKIP_EDGES, self.skips)]  # fmt: skip
            nodes.append(_total(convs + skips))
        return nodes


def _into(node: int, edges: Sequence[_Edge], candidates: nn.ModuleDict) -> Iterator[tuple[int, Candidate, int]]:
    """Candidates that add to a node: position in the table, module, and the node they read."""
    for i, (read, write) in enumerate(edges):
        if write == node and str(i) in candidates:
            yield i, cast("Candidate", candidates[str(i)]), read


def _enlarging(mode: str, op: nn.Module, node: _Node, labels: Tensor) -> tuple[Tensor, int]:
    """A 1x1 candidate behind up-sampling by 2, N(earest) or bi(L)inear; result and what it must yet be enlarged by."""
    if mode == "L":
        return op(node.enlarged(), labels), 1
    return op(node.plain(), labels), 2 * (1 + node.doubled)


def _total(terms: Sequence[tuple[Tensor, int]]) -> _Node:
    """Sum of tensors that have still to be enlarged (nearest) by 1, 2 or 4, smallest first."""
    total, least = None, min(factor for _, factor in terms)
    for factor in (4, 2, 1):
        for x in (x for x, own in terms if own == factor):
            total = x if total is None else total + x
        if total is not None and factor > min(least, 2):
            total = _double(total)
    assert total is not None
    return _Node(total, doubled=least > 1)


class SearchedGenerator(nn.Module):
    """A generator that AutoReCon's search found, for images of any size divisible by 8.

    The latent is cut in three (33, 33, 34 of 100); each part enters through a linear layer at one resolution. Labels
    enter through the BatchNorms' class tables only.

    Args:
        architecture: key of `ARCHITECTURES`.
        classes: number of classes.
        image: (channels, height, width).

    Raises:
        BadInput: an unknown architecture, or a size not divisible by 8.

    Source: AutoReCon (arXiv 2105.12151); tables of the program released with AIT.

    Example:
        >>> net = SearchedGenerator("cifar10-resnet20", 10, (3, 16, 16))
        >>> net(torch.randn(2, 100), torch.arange(2)).shape
        torch.Size([2, 3, 16, 16])
    """

    latent = 100
    parts = (33, 33, 34)

    def __init__(self, architecture: str, classes: int, image: tuple[int, int, int]) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise BadInput("--architecture", expected=f"one of {', '.join(ARCHITECTURES)}", got=repr(architecture),
                           fix="Choose one of these.")  # fmt: skip
        channels, height, width = image
        if height % 8 or width % 8 or min(classes, channels, height, width) < 1:
            raise BadInput(
                "image size", expected="height and width divisible by 8 (the generator doubles its grid three times)",
                got=f"{height}x{width}", fix="Use a recipe whose generator doubles twice, such as gdfq.",
            )  # fmt: skip
        self.architecture, self.classes, self.image = architecture, classes, image
        sizes = [_WIDTH * (height // 8) * (width // 8) * 4**level for level in range(3)]
        self.linears = nn.ModuleList(nn.Linear(part, size) for part, size in zip(self.parts, sizes, strict=True))
        self.cells = nn.ModuleList(SearchedCell(cell, classes) for cell in ARCHITECTURES[architecture])
        self.norm = BatchStatsNorm(_WIDTH, eps=HIDDEN_EPS, classes=classes)
        self.conv = nn.Conv2d(_WIDTH, channels, 3, padding=1)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Make images.

        Args:
            z: latent noise, shape [b, 100].
            labels: int64 class numbers [b].

        Returns:
            Images [b, c, h, w], mean 0 and variance 1 per channel over the batch; float32 under autocast.
        """
        nodes: list[_Node] = []
        for level, part in enumerate(z.split(self.parts, dim=1)):
            x = self.linears[level](part).unflatten(1, (_WIDTH, *(side // 8 << level for side in self.image[1:])))
            if self.conv.weight.is_contiguous(memory_format=torch.channels_last):
                x = x.contiguous(memory_format=torch.channels_last)
            nodes = self.cells[level](nodes[3].full() + x if nodes else x, labels, nodes[:3])
        # Normalised like any reader of node 3, then the last convolution.
        x = F.leaky_relu(self.norm.affine(_Node(nodes[3].full()).plain(), labels), _SLOPE, inplace=True)
        x = self.conv(x)
        return batch_norm((x if x.dtype == torch.float64 else x.float()).tanh(), None, None, 1e-5)
