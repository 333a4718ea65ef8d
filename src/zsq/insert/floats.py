"""What stays float in a quantized network, line by line: nothing is left out silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from zsq.insert import ops as kinds
from zsq.insert.inventory import Layer, Traced, norm_module
from zsq.insert.placement import Site, grid_source
from zsq.insert.report import FloatRow
from zsq.insert.spec import QuantSpec


def list_floats(
    traced: Traced,
    found: list[Layer],
    layers: list[Layer],
    places: Mapping[fx.Node, Site],
    excluded: list[Site],
    folds: Mapping[Layer, nn.Module],
    spec: QuantSpec,
) -> tuple[FloatRow, ...]:
    """List everything that no quantizer rounds.

    Args:
        traced: the network, before quantizers are inserted into its graph.
        found: all layers the forward reaches.
        layers: those that get a quantizer.
        places: nodes that get a quantizer behind them.
        excluded: call sites that would have got one.
        folds: BatchNorms folded into layers.
        spec: what was asked for.

    Returns:
        Rows: excluded layers and sites, operands on no grid, outputs, BatchNorms, biases, whole modules, parameters.
    """
    rows = [FloatRow(layer.name, layer.op, "weight excluded") for layer in found if layer not in layers]
    rows += [FloatRow(site.name, site.op, "activation excluded") for site in excluded]
    rows += _operands(traced, places)
    rows += _outputs(traced, places)
    rows += _norms(traced, deploy=spec.placement == "deploy")
    rows += _biases(traced, layers, places, folds, spec)
    rows += _kept_whole(traced)
    rows += _parameters(traced, found, folds)
    return tuple(rows)


def _operands(traced: Traced, places: Mapping[fx.Node, Site]) -> Iterator[FloatRow]:
    for node in traced.graph.nodes:
        op = traced.ops[node]
        if op.kind != "weighted" and not (op.data and op.name in kinds.JOINS):
            continue
        inputs = node.all_input_nodes[:1] if op.kind == "weighted" else node.all_input_nodes
        tensors = [value for value in inputs if traced.ops[value].data or traced.ops[value].kind == "constant"]
        off = [traced.label(value) for value in tensors if grid_source(value, traced.ops, places) is None]
        if off:
            yield FloatRow(traced.label(node), op.name, f"reads values on no grid: {', '.join(off)}")


def _outputs(traced: Traced, places: Mapping[fx.Node, Site]) -> Iterator[FloatRow]:
    for node in traced.graph.nodes:
        for value in node.all_input_nodes if node.op == "output" else ():
            if traced.ops[value].data and grid_source(value, traced.ops, places) is None:
                yield FloatRow(traced.label(value), traced.ops[value].name, "output of the network")


def _norms(traced: Traced, *, deploy: bool) -> Iterator[FloatRow]:
    norms = [node for node in traced.graph.nodes if traced.ops[node].kind == "norm"]
    if deploy:
        why = "not directly behind a quantized layer: scale and shift are float, only the result is rounded"
        yield from (FloatRow(traced.label(node), traced.ops[node].name, why) for node in norms)
    elif norms:
        names = sorted({traced.ops[node].name for node in norms})
        yield FloatRow(f"{len(norms)} BatchNorm calls", ", ".join(names), "scale, shift and statistics are float")


def _biases(
    traced: Traced,
    layers: list[Layer],
    places: Mapping[fx.Node, Site],
    folds: Mapping[Layer, nn.Module],
    spec: QuantSpec,
) -> Iterator[FloatRow]:
    for layer in layers:
        if layer.module is None:
            has = kinds.argument(layer.nodes[0], 2, "bias") is not None
        else:
            has = getattr(layer.module, "bias", None) is not None
        if not (has or layer in folds):
            continue
        on_grid = layer.nodes and all(grid_source(n.all_input_nodes[0], traced.ops, places) for n in layer.nodes)
        if spec.placement == "paper":
            yield FloatRow(f"{layer.name}.bias", layer.op, "bias")
        elif not on_grid:
            yield FloatRow(f"{layer.name}.bias", layer.op, "bias: the layer's input is on no grid")


def _kept_whole(traced: Traced) -> Iterator[FloatRow]:
    for node in traced.graph.nodes:
        module = traced.module(node)
        if module is None or traced.ops[node].kind == "weighted" or not any(True for _ in module.children()):
            continue
        yield FloatRow(str(node.target), type(module).__name__, "kept whole: activations inside stay float")
        for path, inner in module.named_modules(prefix=str(node.target)):
            if kinds.is_activation(inner):
                yield FloatRow(path, type(inner).__name__, "activation inside a module that is kept whole")


def _parameters(traced: Traced, found: list[Layer], folds: Mapping[Layer, nn.Module]) -> Iterator[FloatRow]:
    """Layers the forward never reaches, and parameters that belong neither to a layer nor to a BatchNorm."""
    called = {id(layer.module) for layer in found}
    norms = {id(norm_module(traced, node)) for node in traced.graph.nodes if traced.ops[node].kind == "norm"}
    norms |= {id(norm) for norm in folds.values()}
    latents = {layer.parameter for layer in found if layer.module is None}
    for layer in found:
        if layer.module is None:
            latents |= _constants(kinds.argument(layer.nodes[0], 1, "weight"))
            latents |= _constants(kinds.argument(layer.nodes[0], 2, "bias"))
    covered: set[int] = set()
    for module in traced.root.modules():
        if id(module) in called | norms:
            covered |= {id(inner) for inner in module.modules()}
    for path, module in traced.root.named_modules():
        names = [name for name, value in module._parameters.items() if value is not None]
        names = [name for name in names if f"{path}.{name}".lstrip(".") not in latents]
        if id(module) in covered or not names:
            continue
        kind, label = type(module).__name__, path or "(network)"
        if isinstance(module, (_ConvNd, nn.Linear)) and not _inside_called(traced, path):
            yield FloatRow(label, kind, "not reached by the forward")
        else:
            yield FloatRow(label, kind, f"no quantizer covers {', '.join(names)}")


def _inside_called(traced: Traced, path: str) -> bool:
    return any(n.op == "call_module" and f"{path}.".startswith(f"{n.target}.") for n in traced.graph.nodes)


def _constants(value: Any) -> set[str]:
    """Paths of the parameters a constant is computed from."""
    found, queue = set(), [value] if isinstance(value, fx.Node) else []
    while queue:
        node = queue.pop()
        queue += node.all_input_nodes
        if node.op == "get_attr":
            found.add(str(node.target))
    return found
