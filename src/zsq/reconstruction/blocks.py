"""Where a student can be cut in two: stretches of its graph with one tensor in and one tensor out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import fx, nn

from zsq.errors import BadInput
from zsq.insert.access import weight_paths
from zsq.insert.ops import Op, classify
from zsq.quantizer import Quantizer


@dataclass(frozen=True)
class Block:
    """A stretch of a network between two single tensors.

    Attributes:
        layers: paths of the modules in it that compute with a quantized weight, in order of call.
        sites: paths of its activation quantizers, in order of call.
        start: number of the graph's node whose value it takes.
        end: number of the node whose value it returns.
        whole: whether it has several layers and no single tensor between any two of them.
    """

    layers: tuple[str, ...]
    sites: tuple[str, ...]
    start: int
    end: int
    whole: bool

    def within(self, net: fx.GraphModule) -> fx.GraphModule:
        """Give the block as a network of its own, which shares its modules with `net`.

        Args:
            net: the student, or a copy of it with the same graph.
        """
        nodes = list(net.graph.nodes)
        graph = fx.Graph()
        copies = {nodes[self.start]: graph.placeholder("x")}

        def copy(node: fx.Node) -> fx.Node:  # what does not depend on the input may stand before the block
            if node not in copies:
                copies[node] = graph.node_copy(node, copy)
            return copies[node]

        for node in nodes[self.start + 1 : self.end + 1]:
            if node.op not in ("placeholder", "output") and _in_reach(node, copies):
                copy(node)
        graph.output(copies[nodes[self.end]])
        part = fx.GraphModule(net, graph, "Block")
        part.train(net.training)
        return part


def find_blocks(student: nn.Module, *, run: int = 3) -> list[Block]:
    """Cut a student into blocks for reconstruction.

    Wherever only one tensor is alive, the network can be cut. Between two such points lies one layer or, around a
    residual addition, a gate or a concatenation, several: these are one block, as published (BRECQ). Layers that follow
    each other in a straight line form blocks of up to `run`, as in a bottleneck without its shortcut. What comes behind
    a layer without a weight of its own (BatchNorm, activation, its quantizer, pooling) belongs to the layer.

    Args:
        student: from `quantize`.
        run: most layers of a straight run in one block; 1 reconstructs layer by layer.

    Returns:
        Blocks in order of execution, each with at least one quantized weight; together they are the whole network.

    Raises:
        BadInput: if the network takes several tensors, returns anything but one tensor, or `run` is below 1.

    Source: BRECQ (Li et al., ICLR 2021), block granularity.
    """
    if run < 1:
        raise BadInput("layers of a block", expected="1 or more", got=run, fix="3 suits most networks.")
    cuts = _cuts(student)
    layers, blocks = set(weight_paths(student)), list[Block]()
    for start, end in pairwise(cuts):
        found, sites = _contents(student, start, end, layers)
        last = blocks[-1] if blocks else None
        if last is not None and last.layers and found:
            alone = last.whole or len(found) > 1 or len(last.layers) + len(found) > run
            last = None if alone else last
        if last is None:
            blocks.append(Block(found, sites, start, end, len(found) > 1))
        else:  # a stretch without a layer belongs to the block before it, or, at the very beginning, behind it
            joined = tuple(dict.fromkeys(last.layers + found)), tuple(dict.fromkeys(last.sites + sites))
            blocks[-1] = Block(*joined, last.start, end, last.whole or len(found) > 1)
    return blocks


def _cuts(student: nn.Module) -> list[int]:
    """Numbers of the nodes whose values are, at some moment, all that the rest of the network needs."""
    graph: fx.Graph = student.graph  # type: ignore[assignment]
    nodes = list(graph.nodes)
    ops = classify(graph, dict(student.named_modules(remove_duplicate=False)))
    number = {node: i for i, node in enumerate(nodes)}
    last_read = {node: max((number[user] for user in node.users), default=-1) for node in nodes}
    fixed = _fixed(nodes)
    alive: set[fx.Node] = set()
    cuts: list[int] = []
    for i, node in enumerate(nodes[:-1]):
        alive = {other for other in (*alive, node) if last_read[other] > i and other not in fixed}
        if len(alive) == 1 and _is_tensor(one := next(iter(alive)), ops) and number[one] not in cuts:
            cuts.append(number[one])
    inputs = [node for node in nodes if node.op == "placeholder" and not node.args]
    fix = "Wrap the network so that it takes images and returns its logits only."
    if len(inputs) != 1 or number[inputs[0]] not in cuts:
        names = ", ".join(str(node.target) for node in inputs)
        raise BadInput("reconstruction", expected="a network with one input", got=names or "none", fix=fix)
    if nodes[-1].args[0] is not nodes[cuts[-1]]:
        raise BadInput("reconstruction", expected="a network that returns one tensor", got="several", fix=fix)
    return cuts


def _fixed(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that do not depend on the input: parameters, and what is computed from nothing else."""
    fixed: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (node.op.startswith("call") and all(n in fixed for n in node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _is_tensor(node: fx.Node, ops: dict[fx.Node, Op]) -> bool:
    return ops[node].data and ops[node].kind != "tuple"


def _in_reach(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> bool:
    """Whether everything the node needs is there or does not depend on the input."""
    return all(n in copies or (n.op != "placeholder" and _in_reach(n, copies)) for n in node.all_input_nodes)


def _contents(student: nn.Module, start: int, end: int, layers: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Layers with a quantized weight, and activation quantizers, called behind `start` up to `end`."""
    graph: fx.Graph = student.graph  # type: ignore[assignment]
    called = [str(node.target) for node in list(graph.nodes)[start + 1 : end + 1] if node.op == "call_module"]
    inner = [layer for path in called for layer in sorted(layers) if layer == path or layer.startswith(f"{path}.")]
    sites = [path for path in called if isinstance(student.get_submodule(path), Quantizer)]
    return tuple(dict.fromkeys(inner)), tuple(dict.fromkeys(sites))


def describe(blocks: list[Block]) -> str:
    """Say in one line how a network was cut."""
    largest = max((block for block in blocks), key=lambda block: len(block.layers))
    count = f"{len(blocks)} block" + "s" * (len(blocks) != 1)
    if len(blocks) == 1 and largest.whole:
        return f"{count}: no single tensor passes between its {len(largest.layers)} layers"
    layers = f"{len(largest.layers)} layers" if len(largest.layers) != 1 else "1 layer"
    return f"{count}, the largest of {layers} ({largest.layers[0]} to {largest.layers[-1]})"
