"""Insert quantizers: any network becomes a trainable low-bit student, with a report of what stays float."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from zsq.errors import BadInput
from zsq.insert.access import (
    FUNCTIONS,
    SITES,
    QuantizedWeight,
    activation_quantizers,
    codes_and_latents,
    freeze_ranges,
    observe_ranges,
    quantized_weights,
    weight_paths,
    without_quantizers,
)  # fmt: skip
from zsq.insert.floats import list_floats
from zsq.insert.graph import Student, make_functional, trace
from zsq.insert.inventory import Layer, Traced, find_layers, fold_norms
from zsq.insert.layers import QuantizedFunction, function_arguments, swap_class
from zsq.insert.ops import classify
from zsq.insert.placement import Site, deploy_sites, edge_layers, grid_source, paper_sites
from zsq.insert.report import QuantReport, SiteRow, WeightRow
from zsq.insert.spec import QuantSpec, check_patterns
from zsq.insert.weight_path import WeightPath
from zsq.quantizer import Quantizer

__all__ = [
    "QuantReport", "QuantSpec", "QuantizedWeight", "activation_quantizers", "codes_and_latents", "freeze_ranges",
    "observe_ranges", "quantize", "quantized_weights", "weight_paths", "without_quantizers",
]  # fmt: skip


class _Sites(nn.Module):
    """Holds modules that belong to call sites; ``names`` maps their readable names to their keys."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def hold(self, name: str, module: nn.Module) -> str:
        key = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
        while hasattr(self, key):
            key += "_"
        self.add_module(key, module)
        self.names[name] = key
        return key


def quantize(model: nn.Module, spec: QuantSpec | None = None) -> tuple[nn.Module, QuantReport]:
    """Copy a float network and insert quantizers: one per weight, one per call site of an activation.

    Args:
        model: any network whose forward can be traced; it is left as it was.
        spec: bits, placement, ranges and exceptions; by default 4-bit weights and activations, placed as published.

    Returns:
        The student and the report. The student keeps every key of the model's state dict and is in eval mode; all its
        floating parameters are trainable. Ranges have seen nothing yet: run it on images before `freeze_ranges`.

    Raises:
        BadInput: if the network cannot be traced (the message names the line), has no convolution or linear layer or no
            activation to quantize, or if a pattern of the spec matches nothing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> student, report = quantize(net)
        >>> student(torch.zeros(2, 3, 8, 8)).shape, [site.name for site in report.sites]
        (torch.Size([2, 10]), ['1'])
    """
    spec = spec or QuantSpec()
    root, notes = _copy(model)
    traced = _trace(root, spec)
    found = find_layers(traced)
    if not found:
        raise BadInput(
            type(model).__name__, expected="at least one convolution or linear layer", got="none in its forward",
            fix="There is no weight to quantize.",
        )  # fmt: skip
    deploy = spec.placement == "deploy"
    names = [layer.name for layer in found]
    layers = [layer for layer in found if spec.selects(layer.name)]
    folds = fold_norms(traced, layers) if deploy else {}
    edges = edge_layers(traced, found) if deploy else set()
    candidates = deploy_sites(traced) if deploy else paper_sites(traced)
    check_patterns(spec, names + [site.name for site in candidates])
    sites = [site for site in candidates if spec.selects(site.name)]
    if not sites:
        raise BadInput(
            type(model).__name__, expected="at least one activation to quantize",
            got="none selected" if candidates else "none: no activation of the ReLU family is called",
            fix="Widen include/exclude." if candidates else "Use placement='deploy', which quantizes every operation.",
        )  # fmt: skip
    places = {site.node: site for site in sites}
    origins = [[grid_source(node.all_input_nodes[0], traced.ops, places) for node in layer.nodes] for layer in layers]
    excluded = [site for site in candidates if site not in sites]
    floats = list_floats(traced, found, layers, places, excluded, folds, spec)

    quantizers = _insert_sites(traced, sites, spec)
    rows = []
    for layer, origin in zip(layers, origins, strict=True):
        path = _weight_path(layer, spec, edge=layer in edges)
        path.folded = (folds[layer],) if layer in folds else ()
        path.inputs = tuple(None if node is None else quantizers[node] for node in origin)
        path.sources = path.inputs if deploy else ()
        own = path.quantizer
        rows.append(WeightRow(layer.name, layer.shape, own.bits, own.axis, own.symmetric))
        _attach(traced, layer, path)
    student = Student(root, traced.graph, type(model).__name__)
    site_rows = tuple(SiteRow(s.name, s.op, quantizers[s.node].bits, s.where) for s in sites)
    return student, QuantReport(spec.placement, tuple(rows), site_rows, floats, _count(student, layers), notes, spec)


def _copy(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Copy a network for training: eval mode, everything trainable, without the user's hooks."""
    if not isinstance(model, nn.Module):
        raise BadInput("model", expected="a torch.nn.Module", got=type(model).__name__, fix="Give the network itself.")
    if isinstance(model, Student) or hasattr(model, SITES):
        raise BadInput("model", expected="a float network", got="a student", fix="Quantize the teacher it came from.")
    if any(
        isinstance(p, (nn.UninitializedParameter, nn.UninitializedBuffer))
        for p in (*model.parameters(), *model.buffers())
    ):
        raise BadInput("model", expected="initialised parameters", got="lazy ones", fix="Run it on an input first.")
    try:
        root = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise BadInput(
            type(model).__name__, expected="a network that copy.deepcopy can copy", got=str(error).split(".")[0],
            fix="Detach tensors it stores as attributes, or build it afresh and load its state_dict.",
        ) from error  # fmt: skip
    dropped = []
    for path, module in root.named_modules():
        count = 0
        for registry in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks: dict[int, Any] = getattr(module, registry)
            # Weight and spectral norm compute the weight in a hook; any other hook must be assumed to watch only.
            foreign = [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]
            count += len(foreign)
            for key in foreign:
                del hooks[key]
        if count:
            dropped.append(f"{path or type(root).__name__} ({count})")
    for parameter in root.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return root.eval(), (f"hooks of the model are not in the student: {', '.join(dropped)}",) if dropped else ()


def _trace(root: nn.Module, spec: QuantSpec) -> Traced:
    paths = [path for path, _ in root.named_modules(remove_duplicate=False) if path]
    check_patterns(spec, paths, only=spec.leaf, subject="leaf")
    leaf = frozenset(path for path in paths if any(fnmatchcase(path, pattern) for pattern in spec.leaf))
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # its fused inference path would read the float weights
            module.activation_relu_or_gelu = 0
    graph = trace(root, leaf)
    modules = dict(root.named_modules(remove_duplicate=False))
    make_functional(graph, classify(graph, modules), modules)
    return Traced(root, graph, classify(graph, modules), modules)


def _insert_sites(traced: Traced, sites: list[Site], spec: QuantSpec) -> dict[fx.Node, Quantizer]:
    """Put a quantizer behind every site, and give it to every reader of the site's value."""
    holder = _Sites()
    traced.root.add_module(SITES, holder)
    device = next(traced.root.parameters()).device
    last_input = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    quantizers = {}
    for site in sites:
        quantizer = spec.activation_quantizer(site.name, edge=site.edge).to(device)
        key = holder.hold(site.name, quantizer)
        readers = list(site.node.users)
        with traced.graph.inserting_after(last_input if site.node.op == "placeholder" else site.node):
            rounded = traced.graph.call_module(f"{SITES}.{key}", (site.node,))
        for reader in readers:
            if traced.ops[reader].name != "require_default":
                reader.replace_input_with(site.node, rounded)
        quantizers[site.node] = quantizer
    return quantizers


def _weight_path(layer: Layer, spec: QuantSpec, *, edge: bool) -> WeightPath:
    quantizer = spec.weight_quantizer(layer.name, axis=layer.axis, edge=edge)
    groups = getattr(layer.module, "groups", 1)
    if layer.module is None and layer.axis == 1:
        groups = function_arguments(layer.nodes[0])[6]
    path = WeightPath(quantizer, transposed_groups=groups if layer.axis == 1 else 0)
    path.parameter, path.derived = layer.parameter, layer.derived
    return path


def _attach(traced: Traced, layer: Layer, path: WeightPath) -> None:
    """Make the layer's call sites compute with the quantized weight."""
    path.to(next(traced.root.parameters()).device)
    if layer.module is not None:
        swap_class(layer.module, path)
        for i, node in enumerate(layer.nodes):
            node.kwargs = {**node.kwargs, "site": i} if i else node.kwargs
        return
    if not hasattr(traced.root, FUNCTIONS):
        traced.root.add_module(FUNCTIONS, _Sites())
    holder: Any = getattr(traced.root, FUNCTIONS)
    (node,) = layer.nodes
    function: Any = node.target
    key = holder.hold(layer.name, QuantizedFunction(function, path))
    node.args, node.kwargs = function_arguments(node), {}
    node.op, node.target = "call_module", f"{FUNCTIONS}.{key}"


def _count(student: nn.Module, layers: list[Layer]) -> int:
    latents = {id(weight.parameter): weight.parameter.numel() for weight in quantized_weights(student)}
    return sum(latents.values()) + sum(torch.Size(layer.shape).numel() for layer in layers if not layer.parameter)
