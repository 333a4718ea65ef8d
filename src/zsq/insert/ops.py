"""What the operations of a traced network do to values, as far as quantization cares."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Kind = Literal[
    "input", "constant", "number", "weighted", "relu", "norm", "pool", "keep", "create", "tuple", "index", "output"
]

# Names are compared without underscores and in lower case: nn.MaxPool2d, F.max_pool2d and torch.max_pool2d agree.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_RELU = _words("relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu hardswish mish softplus")
_BENT = _words("relu relu6 leakyrelu prelu rrelu")  # straight lines
_CLAMP = {"clamp": "min", "clip": "min", "clampmin": "min", "hardtanh": "min_val", "threshold": "threshold"}
_KEEP = _words(
    """maxpool1d maxpool2d maxpool3d adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d fractionalmaxpool2d
    fractionalmaxpool3d amax amin flatten unflatten reshape reshapeas view viewas permute transpose t swapaxes
    swapdims movedim moveaxis contiguous squeeze unsqueeze getitem chunk split splitwithsizes tensorsplit unbind
    narrow select indexselect sort topk gather take dropout dropout1d dropout2d dropout3d alphadropout featuredropout
    featurealphadropout identity detach clone expand expandas repeat repeatinterleave tile flip roll rot90
    pixelshuffle pixelunshuffle channelshuffle unfold zeropad1d zeropad2d zeropad3d reflectionpad1d
    reflectionpad2d reflectionpad3d replicationpad1d replicationpad2d replicationpad3d circularpad1d
    circularpad2d circularpad3d upsamplingnearest2d float to type typeas broadcastto ravel atleast1d atleast2d
    atleast3d stochasticdepth droppath"""
)
_POOL = _words("""avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d mean""")
_INDEX = _words(
    """argmax argmin argsort eq ne lt le gt ge equal isnan isinf isfinite logicaland logicalor logicalnot bool int long
    nonzero searchsorted bucketize onehot any all and or not"""
)
_NUMBER = _words("size dim ndimension numel nelement stride getdevice isfloatingpoint len assert requiredefault")
_CONV = _words("conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d linear")
_ALIASES = {
    "iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div", "divide": "div",
    "multiply": "mul", "subtract": "sub", "concat": "cat", "concatenate": "cat", "ipow": "pow",
}  # fmt: skip
# Operations whose float operands are worth a line in the report: an integer runtime has a kernel for them.
JOINS = _words("add sub mul div cat stack matmul bmm maximum minimum addmm baddbmm")


class Op(NamedTuple):
    """One node of a traced network.

    Attributes:
        kind: ``input``; ``constant``: a tensor that does not depend on the input; ``number``: a shape or another plain
            number; ``weighted``: a convolution or linear layer; ``relu``: an activation of the ReLU family; ``norm``: a
            BatchNorm; ``pool``: an average; ``keep``: moves or selects values, makes no new ones; ``index``: integers
            or booleans; ``tuple``: several new values; ``create``: anything else that makes new values; ``output``.
        name: the operation's name, e.g. ``"relu"``, ``"conv2d"``, ``"add"``.
    """

    kind: Kind
    name: str

    @property
    def data(self) -> bool:
        """Whether the node's value is a floating tensor that depends on the network's input."""
        return self.kind not in ("constant", "number", "index", "output")


def classify(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Op]:
    """Say of every node what it does.

    Args:
        graph: a traced network.
        modules: its modules by path.

    Returns:
        One `Op` per node.
    """
    ops: dict[fx.Node, Op] = {}
    for node in graph.nodes:
        ops[node] = _classify_node(node, ops, modules)
        if ops[node].kind == "create" and _is_tuple(node, modules):
            ops[node] = Op("tuple", ops[node].name)
    return ops


def _is_tuple(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module that is kept whole is only ever unpacked."""
    whole = node.op == "call_module" and (
        isinstance(modules[str(node.target)], nn.RNNBase) or any(True for _ in modules[str(node.target)].children())
    )
    inner = node.op == "call_function" and node.target is operator.getitem
    return (
        (whole or inner)
        and bool(node.users)
        and all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    )


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Look up an argument of a call, given by position or by name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _classify_node(node: fx.Node, ops: dict[fx.Node, Op], modules: Mapping[str, nn.Module]) -> Op:
    if node.op in ("placeholder", "output"):
        return Op("input" if node.op == "placeholder" else "output", node.op)
    if node.op == "get_attr":
        return Op("constant", "parameter")
    name = op_name(node, modules)
    key = _key(name)
    inputs = [ops[other] for other in node.all_input_nodes]
    if key in _NUMBER or (node.target is getattr and node.args[1] not in ("T", "mT", "H", "data", "real")):
        return Op("number", name)
    if node.op != "call_module" and not any(other.data or other.kind == "index" for other in inputs):
        plain = getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
        tensors = any(other.kind == "constant" for other in inputs)
        return Op("number" if plain and not tensors and node.op == "call_function" else "constant", name)
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, (_ConvNd, nn.Linear)):
        return Op("weighted", name)
    if node.op == "call_function" and key in _CONV:
        weight = argument(node, 1, "weight")
        return Op("weighted" if isinstance(weight, fx.Node) and ops[weight].kind == "constant" else "create", name)
    return Op(_value_kind(node, key, module, ops), name)


def _value_kind(node: fx.Node, key: str, module: nn.Module | None, ops: dict[fx.Node, Op]) -> Kind:
    """Kind of a node that takes the network's data and is no layer with a weight."""
    if key in _INDEX:
        return "index"
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if first is not None and ops[first].kind == "index" and key in _KEEP:
        return "index"
    if first is not None and ops[first].kind == "tuple":
        return "create"
    if is_norm(node, module):
        return "norm"
    if key in _RELU or lower_bound(node, key, module) == 0:
        return "relu"
    if key in _POOL:
        return "pool"
    if key in _KEEP or _keeps_values(node, key, module):
        return "keep"
    return "create"


def _keeps_values(node: fx.Node, key: str, module: nn.Module | None) -> bool:
    """Whether padding or resizing makes no value that was not there before (0 is on every grid)."""
    if key == "pad":
        return argument(node, 2, "mode", "constant") != "constant" or not argument(node, 3, "value", 0)
    if key.startswith("constantpad"):
        return getattr(module, "value", None) == 0
    if key == "upsample" and module is not None:
        return str(module.mode).startswith("nearest")
    if key in ("interpolate", "upsample"):
        return str(argument(node, 3, "mode", "nearest")).startswith("nearest")
    if key in ("max", "min"):  # over a dimension; with two tensors it joins two grids
        return not isinstance(argument(node, 1, "other"), fx.Node)
    return key == "getattr"


def lower_bound(node: fx.Node, key: str, module: nn.Module | None) -> float | None:
    """Constant lower bound of a clamp, else None."""
    if key not in _CLAMP:
        return None
    value = getattr(module, _CLAMP[key], None) if module is not None else argument(node, 1, _CLAMP[key])
    if value is None and module is None and key == "hardtanh":
        value = -1.0
    if key == "threshold" and (module.value if module is not None else argument(node, 2, "value")) != 0:
        return None
    return value if isinstance(value, (int, float)) else None


def is_rectifier(node: fx.Node, op: Op, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an integer runtime executes the node as a mere clamp of codes: ReLU, ReLU6, clamp from 0."""
    key = _key(op.name)
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return op.kind == "relu" and (key in ("relu", "relu6") or lower_bound(node, key, module) == 0)


def is_norm(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node is a BatchNorm with fixed statistics."""
    if module is not None:
        return isinstance(module, _BatchNorm) and module.running_mean is not None
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "batch_norm":
        return False
    statistics = [argument(node, 1, "running_mean"), argument(node, 2, "running_var")]
    fixed = all(isinstance(value, fx.Node) and value.op == "get_attr" for value in statistics)
    return fixed and argument(node, 5, "training", False) is False


def op_name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Name of the operation: ``nn.ReLU()``, ``F.relu`` and ``x.relu_()`` all give ``"relu"``."""
    if node.op == "call_module":
        kinds = type(modules[str(node.target)]).__mro__
        native = (kind for kind in kinds if kind.__module__.startswith("torch.nn.modules") and kind is not nn.Module)
        name = next(native, kinds[0]).__name__
        return snake(name.replace("ReLU", "Relu").replace("SiLU", "Silu"))
    if node.op == "call_method":
        name = str(node.target).strip("_")
    else:
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
    return _ALIASES.get(name, name)


def snake(name: str) -> str:
    """``MaxPool2d`` -> ``max_pool2d``."""
    return re.sub(r"(?<=[^A-Z])(?=[A-Z])", "_", name).lower()


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def self_gated(node: fx.Node, ops: Mapping[fx.Node, Op]) -> bool:
    """Whether the node is x * gate(x): a Swish, Mish or Hardswish written by hand."""
    if ops[node].name != "mul":
        return False
    pair = [value for value in node.args if isinstance(value, fx.Node)]
    return len(pair) == 2 and (gated_input(pair[0], ops) is pair[1] or gated_input(pair[1], ops) is pair[0])


def gated_input(node: fx.Node, ops: Mapping[fx.Node, Op]) -> fx.Node | None:
    """The x of gate(x): sigmoid, hardsigmoid, tanh(softplus), or relu6(x + 3), divided by 6 or not; else None."""
    key = _key(ops[node].name)
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if first is None:
        return None
    if key in ("sigmoid", "hardsigmoid"):
        return first
    if key == "tanh" and ops[first].name == "softplus":
        return first.all_input_nodes[0]
    if key in ("div", "mul") and len(node.all_input_nodes) == 1:
        inner = gated_input(first, ops)
        return inner if _key(ops[first].name) in ("relu6", "clamp", "hardtanh") else None
    if key in ("relu6", "clamp", "hardtanh") and ops[first].name == "add" and len(first.all_input_nodes) == 1:
        return first.all_input_nodes[0] if 3 in first.args else None
    return None


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of the ReLU family."""
    natives = [kind for kind in type(module).__mro__ if kind.__module__ == "torch.nn.modules.activation"]
    return bool(natives) and _key(natives[0].__name__) in _RELU


def is_bent(op: Op) -> bool:
    """Whether an activation is made of straight lines: unlike a curve, the same in every runtime."""
    return _key(op.name) in _BENT
