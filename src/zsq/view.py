"""What a network sees in one forward: logits, BatchNorm input statistics, outputs of named modules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from zsq.errors import BadInput

# Elements handled at a time: 1 MB of float32 stays in a CPU's cache between the sum and the sum of squares.
_BLOCK = 1 << 18
INPUT = ":input"  # behind a module's name: what it is given, instead of what it returns


class Moments(NamedTuple):
    """Statistics of one BatchNorm input, all of shape [c] and float32 (float64 if the input is).

    Attributes:
        mean: mean over batch and positions; carries the gradient to the input.
        var: biased variance over batch and positions; carries the gradient too.
        running_mean: the mean stored in the BatchNorm.
        running_var: the variance stored in the BatchNorm.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor


class View(NamedTuple):
    """One observed forward.

    Attributes:
        logits: what the network returned.
        norms: one entry per BatchNorm call, in call order; empty unless asked for.
        features: outputs of the modules asked for, by module name.
    """

    logits: Tensor
    norms: Sequence[Moments] = ()
    features: Mapping[str, Tensor] = {}

    def detach(self) -> View:
        """Give the same view without any gradient."""
        return View(
            self.logits.detach(),
            [Moments(*(part.detach() for part in norm)) for norm in self.norms],
            {name: value.detach() for name, value in self.features.items()},
        )


def _accumulate(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel on a CPU: one pass over memory, in blocks that stay in the cache.

    The sums are shifted by the mean of the first image. That is within sqrt(n) standard deviations of the batch mean
    whatever the data, so the subtraction at the end costs at most a factor n of float32's relative precision.
    """
    n, channels = x.shape[:2]
    per_image = x[0, 0].numel()
    images_per_block = max(1, _BLOCK // max(1, per_image * channels))
    last = x.movedim(1, -1)
    if x.dim() == 2 or (last.is_contiguous() and not x.is_contiguous()):  # channels last: a [pixels, channels] matrix
        rows, axis, step = last.reshape(-1, channels), 0, images_per_block * per_image
        shift = rows[:per_image].to(dtype).mean(0)
    else:
        rows, axis, step = x.reshape(n, channels, per_image), -1, images_per_block
        shift = rows[0].to(dtype).mean(-1, keepdim=True)
    first, second = torch.zeros_like(shift.flatten()), torch.zeros_like(shift.flatten())
    for block in rows.split(step):
        centred = block.to(dtype) - shift
        if axis == 0:
            first += centred.sum(0)
            second += centred.square_().sum(0)
        else:
            first += centred.sum(-1).sum(0)
            second += torch.linalg.vector_norm(centred, dim=-1).square_().sum(0)
    count = n * per_image
    offset = first.div_(count)
    return shift.flatten() + offset, second.div_(count).sub_(offset.square()).clamp_min_(0)


class _ChannelMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_grad: Tensor, var_grad: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return _moments_backward(x, mean, mean_grad, var_grad)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type == "cpu":
        return _accumulate(x, dtype)
    # Accelerators reduce over several dimensions well, and every further launch costs.
    var, mean = torch.var_mean(x.to(dtype), [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


def _moments_backward(x: Tensor, mean: Tensor, mean_grad: Tensor, var_grad: Tensor) -> Tensor:
    """Gradient of both moments: (x - mean) * 2 g_var / n + g_mean / n."""
    count = x.numel() // x.shape[1]
    return _affine(x, var_grad * (2 / count), mean_grad / count, mean)


def _affine(x: Tensor, factor: Tensor, offset: Tensor, mean: Tensor) -> Tensor:
    """(x - mean) * factor + offset, per channel."""
    # torch's inference BatchNorm is one fast pass of that form, in either memory format, with float32 arithmetic.
    return torch.batch_norm(x, factor, offset, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


class _ObservedNorm(torch.autograd.Function):
    """A BatchNorm in evaluation mode and the moments of its input as one node of the graph.

    Apart, they would be two: their gradients would meet in a further pass, and torch's backward of a BatchNorm also
    reduces for parameters that ask for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen = _moments(x)
        factor = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, seen[0], factor if weight is None else factor * weight)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), *seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, mean_grad: Tensor, var_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, factor = ctx.saved_tensors
        none = torch.zeros_like(factor)
        total = _moments_backward(x, mean, mean_grad, var_grad)
        return total.add_(_affine(grad, factor, none, none)), None, None, None, None, None


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float32, with gradient.

    On a CPU this is about ten times faster than ``torch.var_mean`` over several dimensions.

    Args:
        x: shape [n, c, ...], any memory format, floating point.

    Returns:
        Mean and variance, each of shape [c]; float64 if x is float64.

    Example:
        >>> mean, var = channel_moments(torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]))
        >>> mean.tolist(), var.tolist()
        ([2.0], [4.0])
    """
    mean, var = _ChannelMoments.apply(x)
    return mean, var


def _observe_norm(mean: Tensor, var: Tensor, norms: list[Moments]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = channel_moments(args[0] if args else kwargs["input"])
        norms.append(Moments(*seen, mean.to(seen[0].dtype), var.to(seen[0].dtype)))

    return hook


def _observing_forward(norm: Any, norms: list[Moments]) -> Callable[[Tensor], Tensor]:
    """A forward for a frozen BatchNorm that also records what it was given."""

    def forward(input: Tensor) -> Tensor:
        y: Tensor
        y, mean, var = _ObservedNorm.apply(input, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        norms.append(Moments(mean, var, norm.running_mean.to(mean.dtype), norm.running_var.to(mean.dtype)))
        return y

    return forward


def _frozen_stock(norm: _BatchNorm) -> bool:
    """Whether a BatchNorm is torch's own, in evaluation mode, asks for no gradient and nobody took its forward."""
    stock = type(norm).forward is _BatchNorm.forward and "forward" not in norm.__dict__
    return stock and not norm.training and not any(p.requires_grad for p in norm.parameters())


def _observe_output(name: str, found: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise BadInput(
                f"feature {name!r}",
                expected="a module that returns one tensor",
                got=type(output).__name__,
                fix="Name a module inside it.",
            )
        found[name] = output

    return hook


def _observe_input(name: str, found: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found[name] = args[0]

    return hook


def look(net: nn.Module, x: Tensor, *, norms: bool = False, features: Sequence[str] = ()) -> View:
    """Run the network once and record what happened inside. Hooks are removed afterwards, also after an error.

    Args:
        net: any network that returns one tensor. Its mode and its parameters' ``requires_grad`` are used as they are.
        x: shape [b, c, h, w] (whatever the network takes).
        norms: record mean and variance of the input of every BatchNorm that has running statistics.
        features: names of modules (as in ``net.named_modules()``) whose outputs are wanted, or ``NAME:input`` for what
            the module was given; of a module that runs several times, the last one.

    Returns:
        The view; everything in it carries gradients if the ambient mode records them.

    Raises:
        BadInput: a feature does not exist, did not run, or is not one tensor; or the network does not return a tensor.
    """
    seen: list[Moments] = []
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        if norms:
            for module in net.modules():
                if (
                    isinstance(module, _BatchNorm)
                    and module.running_mean is not None
                    and module.running_var is not None
                ):
                    if _frozen_stock(module):
                        module.__dict__["forward"] = _observing_forward(module, seen)
                        hooks.callback(module.__dict__.pop, "forward")
                        continue
                    hook = _observe_norm(module.running_mean, module.running_var, seen)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if features:
            modules = dict(net.named_modules())
            for name in features:
                path = name.removesuffix(INPUT)
                if path not in modules:
                    near = difflib.get_close_matches(path, modules, n=3, cutoff=0) or list(modules)
                    raise BadInput("feature", expected="the name of a module", got=repr(name), fix=f"Nearest: {near}.")
                if path != name:
                    hooks.callback(modules[path].register_forward_pre_hook(_observe_input(name, found)).remove)
                else:
                    hooks.callback(modules[name].register_forward_hook(_observe_output(name, found)).remove)
        logits = net(x)
    if not isinstance(logits, Tensor):
        raise BadInput(
            "network output",
            expected="one tensor",
            got=type(logits).__name__,
            fix="Wrap the network so that it returns its logits only.",
        )
    if missing := [name for name in features if name not in found]:
        got = f"{missing} did not run"
        raise BadInput("feature", expected="modules that run in a forward", got=got, fix="Name another module.")
    return View(logits, seen, found)


@contextmanager
def frozen(net: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode and no parameter gradients inside the block; every flag is put back afterwards.

    Args:
        net: the network; gradients still flow through it to its input.

    Yields:
        The same network.
    """
    training = [module for module in net.modules() if module.training]
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield net
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
