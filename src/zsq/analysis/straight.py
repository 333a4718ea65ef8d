"""Is a student piecewise linear in each of its weights? Then its Hessian traces are much cheaper to estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import fx, nn

from zsq.insert import weight_paths
from zsq.insert.layers import QuantizedFunction
from zsq.insert.ops import Op, classify, is_bent, lower_bound
from zsq.quantizer import Quantizer

# What only moves, sums or selects values; the kinds that `classify` knows are sorted out before these names count.
_SUMS = frozenset(("add", "sub", "neg", "cat", "stack", "maximum", "minimum", "interpolate", "upsample", "pad"))
_SCALES = frozenset(("mul", "div"))  # by a number or a constant; a product of two activations is quadratic
_PLAIN = ("input", "output", "constant", "number", "index", "norm", "pool", "keep", "weighted")


def bend(student: nn.Module) -> str | None:
    """Name what keeps a student from being piecewise linear in each single weight; None if nothing does.

    Convolutions, ReLUs, averages, sums and quantizers (straight through, as gradients see them) are straight lines with
    kinks; GELU, sigmoid gates, products of activations and attention are not, nor is a weight that is used twice or
    standardised. What is not known counts as bent.

    Args:
        student: from `quantize`, in eval mode.

    Returns:
        The operation in a few words, or None.
    """
    if not isinstance(student, fx.GraphModule):
        return "a network without a graph"
    modules = dict(student.named_modules(remove_duplicate=False))
    ops = classify(student.graph, modules)
    paths = weight_paths(student)
    uses: Counter[int] = Counter()
    for node in student.graph.nodes:
        if not _is_straight(node, ops, modules):
            return f"{ops[node].name} ({node.name})"
        place = paths.get(str(node.target)) if node.op == "call_module" else None
        if place is not None:
            if place.latent is None or place.path.derived:
                return f"the computed weight of {place.name}"
            uses[id(place.latent)] += 1
            if uses[id(place.latent)] > 1:
                return f"the weight of {place.name}, used more than once"
    return _read_elsewhere(student, set(uses))


def _is_straight(node: fx.Node, ops: Mapping[fx.Node, Op], modules: Mapping[str, nn.Module]) -> bool:
    op = ops[node]
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, (Quantizer, QuantizedFunction)) or op.kind in _PLAIN:
        return True
    if op.kind == "relu":
        return is_bent(op) or lower_bound(node, op.name.replace("_", ""), module) is not None
    if op.name in _SCALES:
        divides_by_data = op.name == "div" and not (isinstance(node.args[0], fx.Node) and ops[node.args[0]].data)
        return sum(ops[other].data and ops[other].kind != "constant" for other in node.all_input_nodes) < 2 and (
            not divides_by_data
        )
    return op.name in _SUMS


def _read_elsewhere(student: fx.GraphModule, latents: set[int]) -> str | None:
    """A latent weight that something besides its layer reads."""
    for node in student.graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(student.get_submodule(owner), name, None)
        readers = [user for user in node.users if user.op != "call_module"]
        if id(value) in latents and readers:
            return f"a weight read by {readers[0].name}"
    return None
