"""Which modules of a network to compare with its student: units found from the graph, and where features are pooled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from zsq.errors import BadInput
from zsq.insert.graph import trace
from zsq.insert.inventory import Traced, sole_reader
from zsq.insert.ops import classify
from zsq.view import INPUT, look


class Unit(NamedTuple):
    """Something whose output teacher and student are compared on.

    Attributes:
        output: path of the module that gives it.
        layer: path of the convolution in front: a student whose BatchNorms are folded gives the same values there.
    """

    output: str
    layer: str

    def within(self, net: nn.Module) -> str:
        """Path of the module that gives the unit's output in `net`, a teacher or a student."""
        called = {str(node.target) for node in net.graph.nodes} if isinstance(net, fx.GraphModule) else None
        return self.output if called is None or self.output in called else self.layer


def find_units(net: nn.Module, *, leaf: Sequence[str] = ()) -> list[Unit]:
    """Find the units that feature alignment compares.

    With depthwise convolutions: what the pointwise convolution behind each gives (MobileNetV1: every block; V2: the
    projections). Else with residual additions: the branch with more convolutions, before it is added. Else every
    convolution. Always behind the BatchNorm that follows.

    Args:
        net: the float network.
        leaf: patterns of modules kept whole.

    Returns:
        Units in order of their calls.

    Raises:
        BadInput: the network cannot be traced, or calls no convolution.

    Source: HAST (arXiv 2303.13826), as released: residual branches of ResNets, pointwise convolutions of MobileNetV1,
        projections of MobileNetV2.
    """
    traced = _read(net, leaf)
    nodes = [node for node in traced.graph.nodes if traced.ops[node].kind == "weighted" and _is_conv(traced, node)]
    behind = [node for node in nodes if _pointwise(traced, node) and _follows_depthwise(traced, node)]
    branches = [b for node in traced.graph.nodes if traced.ops[node].name == "add" and (b := _branch(traced, node))]
    chosen = behind or list(dict.fromkeys(branches)) or nodes
    if not chosen:
        raise BadInput("feature alignment", expected="a network that calls convolution modules", got="none",
                       fix="Leave the alignment out with --alignment 0.")  # fmt: skip
    return list(dict.fromkeys(_unit(traced, node) for node in chosen))


def find_stages(net: nn.Module, image: tuple[int, int, int], *, leaf: Sequence[str] = ()) -> list[Unit]:
    """Find the feature maps that a network works out at each resolution.

    The end of a stage is what a strided convolution or a pooling layer reduces; the last stages are what the last
    layers read. Not a stage: what only a stem of one layer has made, a map inside a block that begins at the same
    resolution, the average of a gate (its map goes on beside it), and outputs without positions.

    Args:
        net: the float network.
        image: input shape (c, h, w), large enough that every stage has more than one position.
        leaf: patterns of modules kept whole.

    Returns:
        In order of their calls; each is named by the layer that reads it (``LAYER:input``, which in a student is
        quantized already) or, where no layer does, by the module that gives it. Empty for a network without maps.

    Raises:
        BadInput: the network cannot be traced.

    Source: ZAQ (arXiv 2103.15263) compares the outputs of the residual stages.
    """
    traced = _read(net, leaf)
    sizes = _Sizes(traced, image)
    layers = [node for node in traced.graph.nodes if traced.ops[node].kind == "weighted"]
    reach = {node: _ancestors(node) for node in traced.graph.nodes}
    last = set(layers).difference(*(reach[node] - {node} for node in layers))
    ends: dict[fx.Node, bool] = {}  # end of a stage -> whether a last layer reads it
    for node in traced.graph.nodes:
        source = next((other for other in node.all_input_nodes if traced.ops[other].data), None)
        if source is None or sizes[source] < 2 or not any(layer in reach[source] for layer in layers):
            continue
        gate = sizes[node] < 2 and len(source.users) > 1
        if node in last or (_reduces(traced, node) and 0 < 2 * sizes[node] <= sizes[source] and not gate):
            ends[source] = ends.get(source, False) or node in last
    made = {end: sum(layer in reach[end] for layer in layers) for end in ends}
    inner = {end for end in ends if not ends[end] and any(
        other is not end and other in reach[end] and sizes[other] == sizes[end] for other in ends)}  # fmt: skip
    stages = [end for end in traced.graph.nodes if end in ends and end not in inner]
    stages = [end for end in stages if made[end] > 1] or stages
    named = [unit for end in stages if (unit := _where(traced, end, sizes)) is not None]
    return list(dict.fromkeys(named))


def classifier_input(net: nn.Module, *, leaf: Sequence[str] = ()) -> str:
    """Name, for `look`, of what the last layer is given: the pooled features.

    Args:
        net: the float network.
        leaf: patterns of modules kept whole.

    Returns:
        The path of the last called layer with ``:input`` behind it.

    Raises:
        BadInput: the network cannot be traced, or calls no layer as a module.
    """
    traced = _read(net, leaf)
    last = [node for node in traced.graph.nodes if traced.ops[node].kind == "weighted" and node.op == "call_module"]
    if not last:
        raise BadInput("class centres", expected="a network that calls layers as modules", got="none",
                       fix="Leave the centres out with --low 0 --high 2.")  # fmt: skip
    return f"{last[-1].target}{INPUT}"


def pooled(z: Tensor) -> Tensor:
    """Mean over positions, if there are any: [b, c, ...] to [b, c]."""
    return z.flatten(2).mean(2) if z.dim() > 2 else z


def class_centres(net: nn.Module, where: str, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean pooled feature of each class.

    Args:
        net: gives the features.
        where: name of the features, for `look`.
        images: shape [n, c, h, w], n at least 1.
        labels: int64 [n].
        classes: number of classes.

    Returns:
        Centres [k, f] and which of them exist, bool [k].
    """
    with torch.no_grad():
        parts = [pooled(look(net, x, features=[where]).features[where]) for x in images.split(256)]
    owner = torch.nn.functional.one_hot(labels, classes).float()
    return owner.T @ torch.cat(parts) / owner.sum(0).clamp_min(1)[:, None], owner.sum(0) > 0


def _read(net: nn.Module, leaf: Sequence[str]) -> Traced:
    modules = dict(net.named_modules(remove_duplicate=False))
    whole = frozenset(path for path in modules if path and any(fnmatchcase(path, pattern) for pattern in leaf))
    graph = trace(net, whole)
    return Traced(net, graph, classify(graph, modules), modules)


class _Sizes(fx.Interpreter):
    """Number of positions of every tensor of a traced network: 1 without any, 0 for what is no tensor."""

    def __init__(self, traced: Traced, image: tuple[int, int, int]) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self._sizes: dict[fx.Node, int] = {}
        device = next((p.device for p in traced.root.parameters()), torch.device("cpu"))
        with torch.no_grad():
            self.run(torch.zeros(1, *image, device=device))

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        self._sizes[n] = math.prod(value.shape[2:]) if isinstance(value, Tensor) and value.dim() > 1 else 0
        return value

    def __getitem__(self, node: fx.Node) -> int:
        return self._sizes[node]


def _reduces(traced: Traced, node: fx.Node) -> bool:
    op = traced.ops[node]
    return op.kind in ("weighted", "pool") or "maxpool" in op.name.replace("_", "")


def _where(traced: Traced, node: fx.Node, sizes: _Sizes) -> Unit | None:
    """How to see the value of a node in teacher and student alike; of the nearest node before it, if that is hidden."""
    calls = Counter(str(other.target) for other in traced.graph.nodes if other.op == "call_module")
    while True:
        for reader in node.users:
            first = reader.op == "call_module" and reader.args[:1] == (node,) and calls[str(reader.target)] == 1
            if first and _reduces(traced, reader):
                return Unit(f"{reader.target}{INPUT}", f"{reader.target}{INPUT}")
        if node.op == "call_module":
            twins = [other for other in traced.graph.nodes if (other.op, other.target) == (node.op, node.target)]
            if twins[-1] is node and traced.ops[node].kind not in ("norm", "tuple"):
                return Unit(str(node.target), str(node.target))
            layer = node.all_input_nodes[0] if node.all_input_nodes else node
            if twins[-1] is node and traced.ops[node].kind == "norm" and layer.op == "call_module":
                return Unit(str(node.target), str(layer.target))
        before = [other for other in node.all_input_nodes if traced.ops[other].data and sizes[other] == sizes[node]]
        if not before:
            return None
        node = before[0]


def _is_conv(traced: Traced, node: fx.Node) -> bool:
    return isinstance(traced.module(node), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _pointwise(traced: Traced, node: fx.Node) -> bool:
    module = traced.module(node)
    return set(getattr(module, "kernel_size", (0,))) == {1} and getattr(module, "groups", 0) == 1


def _follows_depthwise(traced: Traced, node: fx.Node) -> bool:
    for other in _before(traced, node):
        groups = getattr(traced.module(other), "groups", 1)
        if isinstance(groups, int) and 1 < groups == getattr(traced.module(other), "in_channels", 0):
            return True
    return False


def _before(traced: Traced, node: fx.Node) -> list[fx.Node]:
    """Nearest layers before a node; not through averages, behind which squeeze-and-excitation hides its own."""
    found: list[fx.Node] = []
    queue, seen = list(node.all_input_nodes), set()
    while queue:
        other = queue.pop()
        if other in seen:
            continue
        seen.add(other)
        if traced.ops[other].kind == "weighted":
            found.append(other)
        elif traced.ops[other].kind != "pool":
            queue += other.all_input_nodes
    return found


def _branch(traced: Traced, add: fx.Node) -> fx.Node | None:
    """The convolution that ends the residual branch of an addition; None if the addition is another kind."""
    sides = [node for node in add.all_input_nodes if traced.ops[node].data]
    if len(sides) != 2:
        return None
    reach = [_ancestors(side) for side in sides]
    own = [sum(_is_conv(traced, node) for node in mine - other) for mine, other in zip(reach, reach[::-1], strict=True)]
    if max(own) == 0:
        return None
    node = sides[own.index(max(own))]
    while traced.ops[node].kind in ("norm", "keep") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if _is_conv(traced, node) else None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        other = queue.pop()
        if other not in found:
            found.add(other)
            queue += other.all_input_nodes
    return found


def _unit(traced: Traced, node: fx.Node) -> Unit:
    norm = sole_reader(node, traced.ops)
    follows = norm is not None and traced.ops[norm].kind == "norm" and norm.op == "call_module"
    return Unit(str(norm.target) if follows and norm is not None else str(node.target), str(node.target))
