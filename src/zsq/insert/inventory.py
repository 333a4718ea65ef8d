"""What a traced network contains: its calls, its layers with a weight, and the BatchNorms behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from zsq.insert import ops as kinds
from zsq.insert.layers import probe
from zsq.insert.ops import Op


@dataclass(eq=False)
class Traced:
    """A traced network.

    Attributes:
        root: holds every module.
        graph: its calls.
        ops: what they do.
        modules: modules by path.
    """

    root: nn.Module
    graph: fx.Graph
    ops: dict[fx.Node, Op]
    modules: dict[str, nn.Module]

    def module(self, node: fx.Node) -> nn.Module | None:
        """Module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def scope(self, node: fx.Node) -> str:
        """Path of the called module, or of the one whose forward contains a functional call; empty for the network."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        return str(next(reversed(stack.values()))[0]) if stack else ""

    def label(self, node: fx.Node) -> str:
        """Readable name of a node; not unique."""
        name, scope = self.ops[node].name, self.scope(node)
        if node.op == "placeholder":
            return str(node.target)
        return scope if node.op == "call_module" else f"{scope}.{name}" if scope else name


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer, or a functional call of one.

    Attributes:
        name: path of the module; of the parameter without ``.weight`` if functional.
        op: ``"conv2d"``, ``"linear"`` ...
        module: None if functional.
        shape: shape of the weight.
        axis: output channels of the weight.
        nodes: its call sites; empty for a layer inside a module that is kept whole.
        parameter: path of the latent parameter, relative to the module (to the network if functional); or empty.
        derived: whether the weight is computed from parameters.
        foldable: whether a BatchNorm behind it may be folded into its weight.
    """

    name: str
    op: str
    module: nn.Module | None
    shape: tuple[int, ...]
    axis: int
    nodes: list[fx.Node] = field(default_factory=list)
    parameter: str = "weight"
    derived: bool = False
    foldable: bool = True


def find_layers(traced: Traced) -> list[Layer]:
    """List everything with a convolution or linear weight that the forward reaches.

    Args:
        traced: the network.

    Returns:
        Layers in order of their first call.
    """
    layers: dict[object, Layer] = {}
    names: Counter[str] = Counter()
    for node in traced.graph.nodes:
        module = traced.module(node)
        if traced.ops[node].kind == "weighted":
            key: object = node if module is None else id(module)
            if key not in layers:
                layer = _functional(traced, node) if module is None else module_layer(str(node.target), module)
                names[layer.name] += 1
                layer.name += f":{names[layer.name]}" if names[layer.name] > 1 else ""
                layers[key] = layer
            layers[key].nodes.append(node)
        elif module is not None:
            for path, inner in inner_layers(str(node.target), module):
                layers.setdefault(id(inner), module_layer(path, inner))
    return list(layers.values())


def inner_layers(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List convolutions and linear layers inside a module that is kept whole, except those read by fused code."""
    for name, inner in module.named_modules(prefix=path):
        if isinstance(inner, (_ConvNd, nn.Linear)) and not isinstance(inner, NonDynamicallyQuantizableLinear):
            yield name, inner


def module_layer(name: str, module: Any) -> Layer:
    """Describe a convolution or linear module."""
    derived, last = probe(module)
    shape = tuple(module.weight.shape)
    parameter = "weight"
    if "weight" not in module._parameters:  # weight_norm, spectral_norm and other reparametrizations
        parameter = _only(path for path, value in module.named_parameters() if value.shape == shape)
    op = kinds.snake(next(k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules")).__name__)
    return Layer(name, op, module, shape, int(isinstance(module, _ConvTransposeNd)), [], parameter, derived, last)


def _functional(traced: Traced, node: fx.Node) -> Layer:
    """Describe ``F.conv2d(x, w)`` with a weight made of parameters."""
    source = kinds.argument(node, 1, "weight")
    found, queue = {}, [source]
    while queue:
        other = queue.pop()
        queue += other.all_input_nodes
        if other.op == "get_attr" and isinstance(value := get_attribute(traced.root, str(other.target)), nn.Parameter):
            found[str(other.target)] = value
    derived = source.op != "get_attr"
    # A derived weight has the shape of its latent wherever a latent can be named.
    shapes = {tuple(value.shape): path for path, value in found.items()}
    largest = max(shapes, key=lambda shape: torch.Size(shape).numel(), default=())
    parameter = _only(path for path, value in found.items() if tuple(value.shape) == largest)
    name = parameter.removesuffix(".weight") if parameter not in ("", "weight") else traced.label(node)
    op = traced.ops[node].name
    return Layer(name, op, None, largest, int(op.startswith("conv_transpose")), [], parameter, derived)


def _only(paths: Iterator[str]) -> str:
    found = list(paths)
    return found[0] if len(found) == 1 else ""


def get_attribute(root: nn.Module, path: str) -> Tensor:
    """Look up a parameter, buffer or other tensor of a network by path."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def norm_module(traced: Traced, node: fx.Node) -> Any:
    """BatchNorm module that a ``norm`` node applies, also if its forward calls F.batch_norm; None if there is none."""
    if node.op == "call_module":
        return traced.module(node)
    owner, _, _ = str(kinds.argument(node, 1, "running_mean").target).rpartition(".")
    module: Any = traced.root.get_submodule(owner)
    names = ("running_mean", "running_var", "weight", "bias")
    given = [kinds.argument(node, i, name) for i, name in enumerate(names, 1)]
    same = all(
        getattr(module, name, None) is None if value is None else str(value.target) == f"{owner}.{name}".lstrip(".")
        for name, value in zip(names, given, strict=True)
    )
    return module if same and kinds.argument(node, 7, "eps", 1e-5) == getattr(module, "eps", None) else None


def sole_reader(node: fx.Node, ops: Mapping[fx.Node, Op]) -> fx.Node | None:
    """The only node that computes with a value, looking through identities and dropout; None if there are several."""
    while True:
        readers = [user for user in node.users if ops[user].kind != "number"]
        if len(readers) != 1:
            return None
        node = readers[0]
        if ops[node].kind != "keep" or not ops[node].name.startswith(("identity", "dropout")):
            return node


def fold_norms(traced: Traced, layers: list[Layer]) -> dict[Layer, nn.Module]:
    """Take every BatchNorm that directly follows a layer out of the graph.

    Args:
        traced: the network; its graph changes.
        layers: layers that get a quantizer.

    Returns:
        The BatchNorm to fold into each layer. A layer called several times must have the same one behind every call.
    """
    folded: dict[Layer, nn.Module] = {}
    for layer in layers:
        after = [sole_reader(node, traced.ops) for node in layer.nodes]
        norms = [norm for norm in after if norm is not None and traced.ops[norm].kind == "norm"]
        modules = {id(m): m for m in (norm_module(traced, n) for n in norms)}
        if not layer.foldable or not norms or len(norms) != len(layer.nodes) or len(modules) != 1:
            continue
        (module,) = modules.values()
        if module is None:
            continue
        for norm in norms:
            norm.replace_all_uses_with(norm.all_input_nodes[0])
            traced.graph.erase_node(norm)
        folded[layer] = module
    return folded
