"""Call sites: a network is traced into a graph, and a graph becomes a network again.

A module list cannot show a functional relu, nor a ReLU module that is called twice. The tracer (torch.fx) is an
implementation detail of this file and of those that read its graphs.
"""

from __future__ import annotations

import copy
import linecache
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from zsq.errors import BadInput
from zsq.insert.ops import Op

_FRAMEWORK = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")
_OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, F.relu_: F.relu, torch.relu_: torch.relu, F.elu_: F.elu, F.selu_: F.selu,
    F.celu_: F.celu, F.leaky_relu_: F.leaky_relu, F.rrelu_: F.rrelu, F.hardtanh_: F.hardtanh, F.threshold_: F.threshold,  # type: ignore[attr-defined]
    torch.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh, torch.clamp_: torch.clamp, torch.dropout_: torch.dropout,
}  # fmt: skip


def require_default(value: object, name: str, default: object) -> None:
    """Check, in a traced network, that an optional argument has the value the network was traced with.

    Raises:
        BadInput: if it has not: the student has no other path.
    """
    same = value is default or (isinstance(default, (bool, int, float, str)) and value == default)
    if not same:
        raise BadInput(
            f"argument {name!r} of the student", expected=f"its default {default!r}", got=type(value).__name__,
            fix="Only the path of the default was quantized; make the argument required, or wrap the network.",
        )  # fmt: skip


class _Tracer(fx.Tracer):
    """Records call sites; keeps whole what has a weight, what torch defines, and what the user names."""

    def __init__(self, leaf: frozenset[str], *, proxy_buffers: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self.proxy_buffer_attributes = proxy_buffers
        self.leaf = leaf
        self.failed_in: str | None = None
        self.defaults: list[tuple[fx.Proxy, str, object]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = module_qualified_name in self.leaf or isinstance(m, (_ConvNd, nn.Linear))
        return kept or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = next((path for path, other in self.root.named_modules() if other is m), "")
            raise

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **named: Any) -> Any:
        """Create a proxy; an optional argument after the first keeps its default during the trace."""
        proxy = super().create_proxy(kind, target, args, *rest, **named)
        first = next(node for node in self.graph.nodes if node.op == "placeholder") if kind == "placeholder" else None
        if first is not None and args and proxy.node is not first:
            self.defaults.append((proxy, str(target), args[0]))
            return args[0]
        return proxy


def trace(root: nn.Module, leaf: frozenset[str]) -> fx.Graph:
    """Record every call of one forward, without an input.

    Args:
        root: network in eval mode.
        leaf: paths of modules to keep whole.

    Returns:
        Its graph; buffers are read when the graph runs, unless the network's control flow depends on them.

    Raises:
        BadInput: if the forward depends on the values of its input; names the source line and the ways out.
    """
    if isinstance(root, Shortened):  # traced before, with the scope of every call, which a second trace would lose
        return copy.deepcopy(root.graph)
    tracer = _Tracer(leaf, proxy_buffers=True)
    try:
        graph = tracer.trace(root)
    except Exception as first:  # noqa: BLE001 - the network's own code runs here and may raise anything
        tracer = _Tracer(leaf, proxy_buffers=False)
        try:
            graph = tracer.trace(root)
        except Exception:  # noqa: BLE001 - as above
            raise _cannot_trace(root, tracer, first) from first
    anchor = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for proxy, name, default in tracer.defaults:
        with graph.inserting_after(anchor[0]):
            graph.call_function(require_default, (proxy.node, name, default))  # type: ignore[arg-type]
    return graph


def _cannot_trace(root: nn.Module, tracer: _Tracer, error: Exception) -> BadInput:
    """Say where in the user's code the trace ended."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_FRAMEWORK)]
    path = tracer.failed_in or ""
    where = f"module {path!r} ({type(root.get_submodule(path)).__name__})" if path else f"{type(root).__name__}.forward"
    got = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if frames:
        line = (frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0)).strip()
        got = f"`{line}` at {frames[-1].filename}, line {frames[-1].lineno} ({got.rstrip('.')})"
    way_out = (
        f'Keep the module whole with leaf=("{path}",) or --leaf {path}: weights inside are still quantized, '
        "activations inside stay float; or rewrite the line."
        if path
        else "Rewrite the line, or move it into a module of its own and keep that whole with leaf=... or --leaf MODULE."
    )
    return BadInput(
        f"cannot follow {where}", expected="a forward whose path does not depend on the values in its input", got=got,
        fix=way_out,
    )  # fmt: skip


def make_functional(graph: fx.Graph, ops: Mapping[fx.Node, Op], modules: Mapping[str, nn.Module]) -> None:
    """Replace in-place operations on data by their ordinary forms; later readers of the old name get the new value.

    Otherwise a quantizer behind ``self.relu(x)`` (in place, result unused) would not be on the path of x.

    Args:
        graph: traced network; changed.
        ops: what its nodes do.
        modules: its modules by path; their ``inplace`` flags are cleared.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        first = node.args[0] if node.args else None
        if not ops[node].data or not isinstance(first, fx.Node) or not ops[first].data or not in_place(node, modules):
            continue
        now = position[node]
        first.replace_all_uses_with(node, lambda user, now=now: bool(position[user] > now))  # type: ignore[misc]
        if node.op == "call_method" and hasattr(torch.Tensor, str(node.target).rstrip("_")):
            node.target = str(node.target).rstrip("_")
        elif node.op == "call_function":
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
            if "inplace" in node.kwargs:
                node.kwargs = {**node.kwargs, "inplace": False}
    for module in modules.values():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]


def in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a call changes the tensor it is given."""
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _OUT_OF_PLACE or node.kwargs.get("inplace") is True


def norms_behind(net: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Find the BatchNorms with running statistics that alone read the result of a module, both called only once.

    Args:
        net: with a graph; any other network has none.

    Returns:
        The BatchNorm by the path of the module before it.
    """
    graph: Any = getattr(net, "graph", None)
    calls = {node: net.get_submodule(node.target) for node in getattr(graph, "nodes", ()) if node.op == "call_module"}
    often = Counter(map(id, calls.values()))
    found = {}
    for node, norm in calls.items():
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        if source in calls and len(source.users) == 1 and often[id(norm)] == often[id(calls[source])] == 1:
            found[str(source.target)] = norm
    return found


class _Rooted(fx.GraphModule):
    """Runs a graph and keeps the modules, names and state-dict keys of the network it was traced from.

    Args:
        root: holds every module, also those the graph never calls.
        graph: what to run; its paths refer to `root`.
        name: shown by ``repr``.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, name: str) -> None:
        super().__init__(root, graph, name)
        self._name = name
        # A graph module copies only what its graph calls, into new containers.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = root.__dict__[registry]
        for key, value in root.__dict__.items():
            self.__dict__.setdefault(key, value)
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rooted:
        root = nn.Module()
        skip = {"_graph", "_code"}
        root.__dict__ = {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key not in skip}
        kind = type(self).__mro__[1]  # the class itself is this instance's own, made by torch to hold its forward
        twin = kind(root, copy.deepcopy(self._graph), self._name)
        memo[id(self)] = twin
        twin.train(self.training)
        for ours, theirs in zip(self.modules(), twin.modules(), strict=True):
            theirs.training = ours.training
        return twin


class Student(_Rooted):
    """A network with quantizers, as its graph says."""

    def __reduce__(self) -> Any:
        raise TypeError("a student is not pickled: save its state_dict, and rebuild it with quantize(teacher, spec)")


class Shortened(_Rooted):
    """A float network that ends earlier than it was written: its graph has another output."""
