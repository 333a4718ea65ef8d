"""What can be read off a recorded graph before it is translated: what matters, and where OpenVINO needs help."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from zsq.export.frozen import operator_name

_NO_TENSOR = (torch.SymInt, torch.SymFloat, torch.SymBool)


def keeps_rounding(node: fx.Node) -> bool:
    """Whether a quantizer is one that OpenVINO would drop: between a convolution and an addition, read by nobody else.

    Of two such quantizers at one addition the first: the second then reaches the addition as integers.
    """
    if not _ends_a_branch(node):
        return False
    sides = [side for side in next(iter(node.users)).args if isinstance(side, fx.Node)]
    return node is next(side for side in sides if _ends_a_branch(side))


def _ends_a_branch(node: fx.Node) -> bool:
    if operator_name(node) != "zsq.site":
        return False
    source: Any = node.args[0]
    if operator_name(source).split(".")[0] in ("relu", "relu6", "hardtanh", "clamp"):
        source = source.args[0]
    readers = [operator_name(user) for user in node.users]
    return operator_name(source).startswith("conv") and readers in (["add.Tensor"], ["add_.Tensor"])


def needed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value reaches the output as data; what only computes sizes is read off the shapes instead."""
    found: set[fx.Node] = set()
    queue = [node for node in graph.nodes if node.op == "output"]
    while queue:
        for other in queue.pop().all_input_nodes:
            if other not in found and not isinstance(other.meta.get("val"), _NO_TENSOR):
                found.add(other)
                queue.append(other)
    return found
