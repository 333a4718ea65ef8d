"""The embedded architectures: key names, sizes, what their forward computes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.teachers import EMBEDDED, FOLDER
from zsq.teachers.nets import ResidualNet, digits_net, resnet20


@pytest.mark.parametrize("name", EMBEDDED)
def test_keys_and_shapes_are_those_of_the_shipped_file(name: str) -> None:
    net = EMBEDDED[name].build()
    with safe_open(FOLDER / EMBEDDED[name].weights, "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == stored


def test_resnet20_has_the_known_size() -> None:
    net = resnet20(10)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert sum(p.numel() for p in net.parameters()) == 272_474  # pytorchcv's resnet20_cifar10
    assert len(convs) == 21 and sum(isinstance(m, nn.ReLU) for m in net.modules()) == 19
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10) and resnet20(100).output.out_features == 100


def test_digits_net_is_small_and_made_of_eights() -> None:
    net = digits_net()
    assert 30_000 <= sum(p.numel() for p in net.parameters()) <= 80_000
    assert not [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.out_channels % 8]
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def unit_by_hand(x: Tensor, state: dict[str, Tensor], prefix: str, stride: int) -> Tensor:
    """One residual unit written with functions and the weights of a state dict."""

    def conv_bn(x: Tensor, name: str, stride: int) -> Tensor:
        weight = state[f"{prefix}.{name}.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        bn = [state[f"{prefix}.{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *bn)

    body = conv_bn(conv_bn(x, "body.conv1", stride).relu(), "body.conv2", 1)
    projected = f"{prefix}.identity_conv.conv.weight" in state
    return (body + (conv_bn(x, "identity_conv", stride) if projected else x)).relu()


def test_forward_against_functions() -> None:
    net = ResidualNet((8, 16), units=2, classes=5, c_in=3).double()
    net.train()(torch.randn(16, 3, 8, 8, dtype=torch.float64))  # statistics other than 0 and 1
    net.eval()
    state, x = net.state_dict(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = F.conv2d(x, state["features.init_block.conv.weight"], padding=1)
    y = F.batch_norm(
        y, *(state[f"features.init_block.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    )
    y = y.relu()
    for stage, unit in ((1, 1), (1, 2), (2, 1), (2, 2)):
        y = unit_by_hand(y, state, f"features.stage{stage}.unit{unit}", 2 if (stage, unit) == (2, 1) else 1)
    assert y.shape[-1] == 4
    expected = F.linear(y.mean((2, 3)), state["output.weight"], state["output.bias"])
    torch.testing.assert_close(net(x), expected)
