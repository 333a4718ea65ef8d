"""Where quantizers go: the call sites of each placement, and whose grid a tensor is on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from torch import fx

from zsq.insert import ops as kinds
from zsq.insert.inventory import Layer, Traced, inner_layers, sole_reader
from zsq.insert.ops import Op


class Site(NamedTuple):
    """A call site that gets a quantizer behind it.

    Attributes:
        node: whose result is rounded.
        name: unique.
        op: name of the operation.
        where: path of the module that contains it, or that it calls; empty for the network itself.
        edge: input, pooled feature, first or last layer's activation, or logits.
    """

    node: fx.Node
    name: str
    op: str
    where: str
    edge: bool


def grid_source(node: fx.Node, ops: dict[fx.Node, Op], quantized: Container[fx.Node]) -> fx.Node | None:
    """Node whose quantizer determines the grid of a tensor; None if the tensor is on no grid.

    Args:
        node: the tensor.
        ops: what the nodes do.
        quantized: nodes with a quantizer behind them.
    """
    while not any(getattr(user.target, "__name__", "") == "setitem" and user.args[0] is node for user in node.users):
        if node in quantized:
            return node
        if ops[node].kind != "keep" or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return None


def paper_sites(traced: Traced) -> list[Site]:
    """Every ReLU-type activation, and nothing else."""
    ops, sites, namer = traced.ops, [], Namer(traced)
    for node in traced.graph.nodes:
        op = ops[node]
        if not node.users or not op.data:
            continue
        composed = kinds.self_gated(node, ops)
        if composed or (op.kind == "relu" and not _inside_gate(node, ops)):
            last = _without_division(node, ops) if composed else node
            sites.append(Site(last, namer(last), "swish" if composed else op.name, traced.scope(node), edge=False))
    return sites


def _inside_gate(node: fx.Node, ops: dict[fx.Node, Op]) -> bool:
    if ops[node].name == "softplus":  # of a Mish written by hand
        return all(ops[user].name == "tanh" for user in node.users)
    return kinds.gated_input(node, ops) is not None


def _without_division(node: fx.Node, ops: dict[fx.Node, Op]) -> fx.Node:
    """``x * relu6(x + 3) / 6``: the activation ends with its constant factor."""
    users = list(node.users)
    scaled = len(users) == 1 and ops[users[0]].name in ("div", "mul") and users[0].all_input_nodes == [node]
    return users[0] if scaled and any(ops[n].name == "relu6" for n in node.all_input_nodes) else node


def deploy_sites(traced: Traced) -> list[Site]:
    """Input and every operation that makes new values; behind a ReLU that directly follows a layer or an add."""
    ops, sites, namer = traced.ops, [], Namer(traced)
    nodes = [node for node in traced.graph.nodes if _needs_site(node, traced)]
    chosen = set(nodes)
    edges = _edges(traced, chosen)
    inputs = sum(node.op == "placeholder" for node in nodes)
    for node in nodes:
        name, op = namer(node), ops[node]
        if node.op == "placeholder":
            name = "input" if inputs == 1 else f"input.{node.target}"
        operation = "input" if op.kind == "input" else op.name
        sites.append(Site(node, name, operation, traced.scope(node), edge=node in edges))
    return sites


def _needs_site(node: fx.Node, traced: Traced) -> bool:
    ops, op = traced.ops, traced.ops[node]
    readers = [user for user in node.users if ops[user].kind not in ("number", "constant")]
    if not readers or op.kind not in ("input", "weighted", "relu", "norm", "pool", "create"):
        return False
    if op.kind == "input":
        return _reads_values(node, ops)
    if op.name == "cat" and all(ops[reader].kind == "norm" for reader in readers):
        return False  # every operand stays on its own grid: a BatchNorm gives each channel a scale of its own
    reader = sole_reader(node, ops)
    if reader is None:
        return True
    if op.kind == "norm" and kinds.is_bent(ops[reader]):
        return False  # both are float; the activation's site rounds what they make
    merges = op.kind == "weighted" or op.name in ("add", "sub")
    return not (merges and kinds.is_rectifier(reader, ops[reader], traced.modules))


def _reads_values(node: fx.Node, ops: dict[fx.Node, Op]) -> bool:
    """Whether anything computes with an input's values, rather than using it as an index or returning it."""
    for user in node.users:
        if ops[user].kind == "keep" and user.args[:1] == (node,):
            if _reads_values(user, ops):
                return True
        elif ops[user].data and ops[user].name not in ("embedding", "embedding_bag"):
            return True
    return False


def _edges(traced: Traced, chosen: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose quantizer belongs to the edge of the network."""
    ops = traced.ops
    edges = {node for node in chosen if ops[node].kind == "input" or _is_global_pool(node, traced)}
    ends = [value for node in _end_calls(traced) for value in node.all_input_nodes[:1]]
    ends += [value for node in traced.graph.nodes if node.op == "output" for value in node.all_input_nodes]
    return edges | {source for value in ends if (source := grid_source(value, ops, chosen)) is not None}


def edge_layers(traced: Traced, layers: list[Layer]) -> set[Layer]:
    """Layers with no layer before, or none behind them."""
    ends = _end_calls(traced)
    return {layer for layer in layers if ends & set(layer.nodes)}


def _end_calls(traced: Traced) -> set[fx.Node]:
    """Calls of a weight with no such call before, or none behind them."""
    order = list(traced.graph.nodes)
    calls = {node for node in order if _has_weight(node, traced)}
    behind = _reach(order, calls, lambda node: node.all_input_nodes)
    ahead = _reach(order[::-1], calls, lambda node: list(node.users))
    return {node for node in calls if node not in behind or node not in ahead}


def _has_weight(node: fx.Node, traced: Traced) -> bool:
    module = traced.module(node)
    inner = module is not None and any(True for _ in inner_layers("", module))
    return traced.ops[node].kind == "weighted" or inner


def _reach(order: list[fx.Node], start: set[fx.Node], before: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    """Nodes with one of `start` strictly before them."""
    found: set[fx.Node] = set()
    for node in order:
        if any(other in start or other in found for other in before(node)):
            found.add(node)
    return found


def _is_global_pool(node: fx.Node, traced: Traced) -> bool:
    if traced.ops[node].kind != "pool":
        return False
    module: Any = traced.module(node)
    if "adaptive" in traced.ops[node].name:
        size = module.output_size if module is not None else kinds.argument(node, 1, "output_size")
        return set(size if isinstance(size, (tuple, list)) else (size,)) <= {1}
    return traced.ops[node].name == "mean"


class Namer:
    """Gives sites unique names: ``layer1.relu``, its second call ``layer1.relu:2``, a layer's output ``conv1.out``."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.used: Counter[str] = Counter()

    def __call__(self, node: fx.Node) -> str:
        name = self.traced.label(node) + (".out" if self.traced.ops[node].kind == "weighted" else "")
        self.used[name] += 1
        return name if self.used[name] == 1 else f"{name}:{self.used[name]}"
