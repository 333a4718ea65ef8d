"""Where a network's raw output is: behind its last learned layers, before up-sampling, softmax and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from zsq.errors import BadInput
from zsq.insert.graph import Shortened, in_place, trace
from zsq.tasks.base import Part
from zsq.tasks.detect import name_parts


class Raw(NamedTuple):
    """A network that ends where its raw output is.

    Attributes:
        net: gives one tensor [b, channels, ...].
        parts: its channels, of a detector; empty if nothing is known about them.
        joined: whether the parts with their activations, side by side, are what the network itself returns.
    """

    net: nn.Module
    parts: tuple[Part, ...] = ()
    joined: bool = True


def find_raw(
    net: nn.Module, image: tuple[int, int, int], *, task: str, classes: int | None = None,
    modules: Sequence[str] = (), leaf: Sequence[str] = (),
) -> Raw:  # fmt: skip
    """Let a network end where its raw output is.

    Named modules: their outputs, in that order, joined along the channels. Otherwise a segmenter ends before a final
    bilinear up-sampling, a detector before final sigmoids and softmaxes over channels and their concatenation. Whatever
    is left out is float arithmetic that the task does itself.

    Args:
        net: the network, in eval mode.
        image: input shape (c, h, w).
        task: ``"classify"``, ``"segment"`` or ``"detect"``.
        classes: number of classes, if known.
        modules: paths of the modules that give raw outputs; empty to find them.
        leaf: patterns of modules kept whole where tracing fails.

    Returns:
        The network, or the same modules ending earlier.

    Raises:
        BadInput: if a named module does not exist, is not called exactly once, or the network cannot be traced then;
            or if the tensors cannot be joined.
    """
    if task == "classify" and not modules:
        return Raw(net)
    paths = dict(net.named_modules())
    kept = frozenset(path for path in paths if path and any(fnmatchcase(path, pattern) for pattern in leaf))
    try:
        graph = trace(net, kept)
    except BadInput:
        if modules:
            raise
        return Raw(net)  # quantizing it will say where tracing ends
    output = next(node for node in graph.nodes if node.op == "output")
    if modules:
        ends = [(node, _follower(node, paths)) for node in (_value_of(graph, path, paths) for path in modules)]
    elif task == "segment":
        ends = list(_before_upsampling(output.args[0], paths))
    else:
        ends = list(_before_activations(output.args[0], paths))
        if all(kind == "none" for _, kind in ends):
            return Raw(net)
    return _ending(net, graph, output, ends, image, classes, joined=not modules) if ends else Raw(net)


def _ending(
    net: nn.Module, graph: fx.Graph, output: fx.Node, ends: list[tuple[fx.Node, str]], image: tuple[int, int, int],
    classes: int | None, *, joined: bool,
) -> Raw:  # fmt: skip
    """The network with these values, joined along the channels, as its output."""
    found = tuple(node for node, _ in ends)
    behind: set[fx.Node] = set()  # what reads these values: it goes, also where it works in place
    for node in graph.nodes:
        if any(other in behind or other in found for other in node.all_input_nodes):
            behind.add(node)
    output.args = (found,)
    modules = dict(net.named_modules())
    graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output") or (node not in behind and in_place(node, modules))
    )
    name, device = type(net).__name__, next((p.device for p in net.parameters()), torch.device("cpu"))
    with torch.no_grad():
        values = Shortened(net, graph, name)(torch.zeros(2, *image, device=device))
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else () for value in values]
    if any(len(shape) < 2 or shape[2:] != shapes[0][2:] for shape in shapes):
        raise BadInput("--raw", expected="tensors [batch, channels, ...] over the same positions",
                       got=", ".join(str(list(shape)) for shape in shapes),
                       fix="Name others, or wrap the network so that it joins them.")  # fmt: skip
    with graph.inserting_before(output):
        output.args = (found[0] if len(found) == 1 else graph.call_function(torch.cat, (found, 1)),)
    parts = name_parts([shape[1] for shape in shapes], [kind for _, kind in ends], classes)
    return Raw(Shortened(net, graph, name), parts, joined)


def _value_of(graph: fx.Graph, path: str, modules: dict[str, nn.Module]) -> fx.Node:
    """The one value that leaves a module."""
    if path not in modules or not path:
        raise BadInput("--raw", expected="paths of modules of the network", got=repr(path),
                       fix=f"Its last ones: {', '.join(list(modules)[-5:])}.")  # fmt: skip
    inside = [node for node in graph.nodes if _within(node, path)]
    leaving = [node for node in inside if any(user not in inside for user in node.users)]
    if len(leaving) != 1:
        raise BadInput(f"--raw {path}", expected="a module that is called once and gives one tensor",
                       got=f"{len(leaving)} values that leave it",
                       fix="Name other modules, or wrap the network.")  # fmt: skip
    return leaving[0]


def _within(node: fx.Node, path: str) -> bool:
    if node.op == "call_module" and (node.target == path or str(node.target).startswith(f"{path}.")):
        return True
    scopes = (str(scope[0]) for scope in (node.meta.get("nn_module_stack") or {}).values())
    return any(scope == path or scope.startswith(f"{path}.") for scope in scopes)


def _before_upsampling(node: Any, modules: dict[str, nn.Module]) -> Iterator[tuple[fx.Node, str]]:
    """Input of a final bilinear up-sampling without aligned corners, which the task repeats; nothing without one."""
    if not isinstance(node, fx.Node) or not node.all_input_nodes:
        return
    mode, corners = "", None
    if node.op == "call_function" and node.target is F.interpolate:
        mode, corners = _argument(node, 3, "mode", "nearest"), _argument(node, 4, "align_corners", None)
    elif node.op == "call_module" and isinstance(modules[str(node.target)], nn.Upsample):
        up: Any = modules[str(node.target)]
        mode, corners = up.mode, up.align_corners
    if mode == "bilinear" and not corners:
        yield node.all_input_nodes[0], "none"


def _before_activations(node: Any, modules: dict[str, nn.Module]) -> Iterator[tuple[fx.Node, str]]:
    """Values a detector's output is put together from, each with the activation behind it."""
    if not isinstance(node, fx.Node):
        return
    joins = node.op == "call_function" and node.target in (torch.cat, torch.concat)
    parts = _argument(node, 0, "tensors", ()) if joins and _argument(node, 1, "dim", 0) == 1 else (node,)
    for part in parts:
        kind = _activation(part, modules)
        yield (part, kind) if kind == "none" else (part.all_input_nodes[0], kind)


def _follower(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The activation a network puts behind a value."""
    kinds = {_activation(user, modules) for user in node.users} - {"none"}
    return kinds.pop() if len(kinds) == 1 else "none"


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """``"sigmoid"``, ``"softmax"`` (over channels), or ``"none"``."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if isinstance(module, nn.Softmax):
            return "softmax" if module.dim == 1 else "none"
        return "sigmoid" if isinstance(module, nn.Sigmoid) else "none"
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if name == "softmax":
        return "softmax" if _argument(node, 1, "dim", None) == 1 else "none"
    return "sigmoid" if name in ("sigmoid", "sigmoid_") else "none"


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
