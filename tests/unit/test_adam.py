"""Adam against torch's, bit for bit; what it reads back; states of torch's Adam."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from zsq.adam import Adam
from zsq.checkpoint import load_tree, save_tree


def parameters(seed: int = 0) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    wide = torch.randn(6, 5, 3, 3, generator=rng).to(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in (wide, torch.randn(7, generator=rng), torch.zeros(4))]


def give_gradients(own: list[nn.Parameter], step: int, *, without: int | None = None) -> None:
    rng = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(own):
        gradient = torch.randn(parameter.shape, generator=rng) * 10.0 ** (index - 1)
        parameter.grad = None if index == without else torch.empty_like(parameter).copy_(gradient)


def plain(own: list[nn.Parameter], **options: object) -> torch.optim.Adam:
    return torch.optim.Adam(own, 1e-2, (0.5, 0.999), foreach=False, fused=False, **options)  # type: ignore[arg-type]


def equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("without", [None, 1])
def test_the_bits_of_torchs_plain_adam(without: int | None) -> None:
    ours, theirs = parameters(), parameters()
    mine, torchs = Adam(ours, 1e-2, (0.5, 0.999)), plain(theirs)
    for step in range(12):
        for own, optimizer in ((ours, mine), (theirs, torchs)):
            give_gradients(own, step, without=without if step % 3 else None)  # counts drift apart
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.9**step
            optimizer.step()
        assert equal(ours, theirs), step


def test_the_fused_kernel_differs_in_rounding_only() -> None:
    ours, theirs = parameters(), parameters()
    mine, fused = Adam(ours, 1e-2), torch.optim.Adam(theirs, 1e-2, fused=True)
    for step in range(50):
        for own, optimizer in ((ours, mine), (theirs, fused)):
            give_gradients(own, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_no_number_is_read_in_a_step() -> None:
    def reads(optimizer: torch.optim.Optimizer, own: list[nn.Parameter]) -> int:
        give_gradients(own, 0)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            optimizer.step()
        return sum(event.count for event in found.key_averages() if event.key == "aten::_local_scalar_dense")

    own = parameters()
    assert reads(torch.optim.Adam(own, fused=True), own) > 0  # what is counted does happen
    assert reads(Adam(own), own) == 0


def test_a_state_of_torchs_adam_is_continued() -> None:
    ours, theirs = parameters(), parameters()
    torchs = plain(theirs)
    for step in range(3):
        give_gradients(theirs, step)
        torchs.step()
    with torch.no_grad():
        for own, other in zip(ours, theirs, strict=True):
            own.copy_(other)
    mine = Adam(ours, 1e-2, (0.5, 0.999))
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for step in range(3, 6):
        for own, optimizer in ((ours, mine), (theirs, torchs)):
            give_gradients(own, step)
            optimizer.step()
    assert equal(ours, theirs)


def test_a_checkpoint_keeps_bits_and_layout(tmp_path: object) -> None:
    straight, resumed = parameters(), parameters()
    first, second = Adam(straight, 1e-2), Adam(resumed, 1e-2)
    for step in range(3):
        give_gradients(straight, step)
        first.step()
    save_tree(f"{tmp_path}/state.safetensors", {"p": list(straight), "adam": first.state_dict()})
    tree = load_tree(f"{tmp_path}/state.safetensors")
    with torch.no_grad():
        for own, saved in zip(resumed, tree["p"], strict=True):
            own.copy_(saved)
    second.load_state_dict(tree["adam"])
    moments: Tensor = second.state[resumed[0]]["exp_avg"]
    assert moments.stride() == resumed[0].stride()
    for own, optimizer in ((straight, first), (resumed, second)):
        give_gradients(own, 3)
        optimizer.step()
    assert equal(straight, resumed)


def test_a_closure_is_called_with_gradients() -> None:
    x = nn.Parameter(torch.ones(1))
    adam = Adam([x], 0.5)

    def closure() -> Tensor:
        loss = x.square().sum()
        loss.backward()
        return loss

    assert adam.step(closure).item() == 1.0
    assert float(x.detach()) == pytest.approx(0.5)
