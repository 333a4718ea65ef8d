"""Calibration and distillation: what they change, what they must not change, and what they never wait for."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zsq.checkpoint import load_tree
from zsq.errors import BadInput, RunFailed
from zsq.fit import calibrate, fit
from zsq.insert import QuantSpec, activation_quantizers, codes_and_latents, quantize, quantized_weights
from zsq.inundation import GradientInundation
from zsq.quantizer import RunningMinMax
from zsq.run import Run
from zsq.sources.base import Batch
from zsq.teachers import Teacher
from zsq.view import View, look


class Noise:
    """A source that learns one number, and may bring the teacher's view along."""

    def __init__(self, teacher: nn.Module | None = None, *, batch: int = 6, features: tuple[str, ...] = ()) -> None:
        self.name, self.batch, self.teacher, self.features = "noise", batch, teacher, features
        self.scale = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.SGD([self.scale], 0.01)
        self.metrics: dict[str, Tensor] = {}
        self.seen: list[int] = []

    def draw(self, rng: torch.Generator) -> Batch:
        self.seen.append(rng.initial_seed())
        images = torch.randn(self.batch, 3, 8, 8, generator=rng)
        with torch.enable_grad():
            loss = (images * self.scale).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.metrics = {"g_size": loss.detach()}
        images = images * self.scale.detach()
        labels = torch.randint(10, (self.batch,), generator=rng)
        view = None
        if self.teacher is not None:
            with torch.no_grad():
                view = look(self.teacher, images, norms=True, features=self.features)
        return Batch(images, labels, view)

    def sample(self, count: int, rng: torch.Generator) -> Batch:
        return Batch(torch.randn(count, 3, 8, 8, generator=rng))

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.scale.copy_(state["scale"])
        self.optimizer.load_state_dict(state["optimizer"])


def gap(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
    terms = {"l2": (s.logits - t.logits).square().mean()}
    if batch.labels is not None:
        terms["ce"] = 0.1 * nn.functional.cross_entropy(s.logits, batch.labels)
    return terms


def as_teacher(net: nn.Module) -> Teacher:
    return Teacher(net=net, name="tiny", task="classify", classes=10, image=(3, 8, 8))


def quiet(path: Path | None = None, **options: Any) -> Run:
    return Run(path, **{"progress": False, "log_every": 5, "checkpoint_every": 5, **options})


def ready(net: nn.Module, **spec: Any) -> nn.Module:
    """A calibrated student."""
    student, _ = quantize(net, QuantSpec(**spec))
    calibrate(student, Noise(), steps=3, run=quiet())
    return student


def sgd(student: nn.Module, lr: float = 0.02) -> torch.optim.SGD:
    return torch.optim.SGD(student.parameters(), lr, momentum=0.9, nesterov=True)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# ---- calibrate


def count_forwards(student: nn.Module) -> list[bool]:
    """Notes, per forward, whether the first site was observing."""
    first = next(iter(activation_quantizers(student).values()))
    seen: list[bool] = []
    first.register_forward_pre_hook(lambda module, _: seen.append(module.observing))
    return seen


@pytest.mark.parametrize(("last", "forwards"), [(None, 8), (3, 3), (8, 8), (50, 8)])
def test_calibrate_observes_the_last_batches(bn_net: nn.Module, last: int | None, forwards: int) -> None:
    student, _ = quantize(bn_net)
    seen, source = count_forwards(student), Noise()
    calibrate(student, source, steps=8, run=quiet(), observe_last=last)
    assert seen == [True] * forwards
    assert len(source.seen) == 8
    assert not any(quantizer.observing for quantizer in activation_quantizers(student).values())


def test_calibrate_gives_the_ranges_of_its_batches(bn_net: nn.Module) -> None:
    student, _ = quantize(bn_net, QuantSpec(act=partial(RunningMinMax, momentum=0.0)))
    site = next(iter(activation_quantizers(student).values()))
    seen: list[Tensor] = []
    site.register_forward_pre_hook(lambda _, args: seen.append(args[0].amax()))
    calibrate(student, Noise(), steps=4, run=quiet(), observe_last=2)
    assert site.hi == seen[-1] != seen[-2]
    images = [Noise().draw(quiet().rng("calibrate", step)).images for step in (0, 3)]
    for x in images:
        with torch.no_grad():
            student(x)
    assert site.hi == seen[1]  # frozen


def test_calibrate_trains_nothing_and_leaves_no_gradient(bn_net: nn.Module) -> None:
    student, _ = quantize(bn_net)
    student.train()
    before = weights(student)
    calibrate(student, Noise(), steps=3, run=quiet())
    after = weights(student)
    assert equal(
        {k: v for k, v in before.items() if "zsq_" not in k}, {k: v for k, v in after.items() if "zsq_" not in k}
    )
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not student.training


def test_calibrate_once_more(bn_net: nn.Module) -> None:
    student = ready(bn_net)
    site = next(iter(activation_quantizers(student).values()))
    before = site.hi.clone()
    source = Noise()
    with torch.no_grad():
        source.scale.fill_(9.0)
    calibrate(student, source, steps=3, run=quiet())
    assert site.hi > before


@pytest.mark.parametrize(("steps", "last"), [(0, None), (5, 0)])
def test_calibrate_needs_a_batch(bn_net: nn.Module, steps: int, last: int | None) -> None:
    student, _ = quantize(bn_net)
    with pytest.raises(BadInput, match="stage calibrate: expected at least one observed batch, got 0"):
        calibrate(student, Noise(), steps=steps, run=quiet(), observe_last=last)


# ---- fit


def test_fit_reduces_the_loss_and_changes_the_student_only(bn_net: nn.Module, tmp_path: Path) -> None:
    def loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        return {"l2": 1000 * (s.logits - t.logits).square().mean()}

    teacher, student = as_teacher(bn_net), ready(bn_net, weight_bits=2)
    student.train()  # whatever a user did before
    frozen = weights(bn_net)
    ranges = {name: (q.lo.clone(), q.hi.clone()) for name, q in activation_quantizers(student).items()}
    with quiet(tmp_path / "r") as run:
        fit(student, teacher, Noise(), loss, sgd(student, 1e-3), steps=60, run=run)
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["l2"] < 0.5 * lines[0]["l2"]
    assert {"l2", "g_size"} <= set(lines[0])
    assert equal(weights(bn_net), frozen)
    for name, value in student.state_dict().items():
        if "running_" in name or "num_batches" in name:
            assert torch.equal(value, bn_net.state_dict()[name])
    assert {n: (q.lo, q.hi) for n, q in activation_quantizers(student).items()} == ranges
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_every_kind_of_parameter_is_trained(bn_net: nn.Module) -> None:
    student = ready(bn_net)
    before = weights(student)
    fit(student, as_teacher(bn_net), Noise(), gap, sgd(student), steps=3, run=quiet())
    moved = {
        name for name, _ in student.named_parameters() if not torch.equal(before[name], student.get_parameter(name))
    }
    assert moved == {name for name, _ in student.named_parameters()}


def test_the_view_of_the_source_is_used(bn_net: nn.Module) -> None:
    calls = []
    own = [ready(bn_net) for _ in range(2)]
    for student, source in zip(own, [Noise(), Noise(bn_net)], strict=True):
        handle = bn_net.register_forward_pre_hook(lambda *_: calls.append(1))
        fit(student, as_teacher(bn_net), source, gap, sgd(student), steps=4, run=quiet())
        handle.remove()
    assert len(calls) == 8  # four by fit for the first, four by the source for the second, none by fit
    assert equal(weights(own[0]), weights(own[1]))


def test_features_reach_the_loss(bn_net: nn.Module) -> None:
    shapes: set[tuple[int, ...]] = set()

    def loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        shapes.update({tuple(view.features["4"].shape) for view in (s, t)})
        assert not t.features["4"].requires_grad
        return {"f": (s.features["4"] - t.features["4"]).square().mean()}

    student = ready(bn_net)
    for i, source in enumerate([Noise(), Noise(bn_net), Noise(bn_net, features=("4",))]):
        fit(student, as_teacher(bn_net), source, loss, sgd(student), steps=1, run=quiet(), stage=f"fit{i}",
            features=["4"], micro_batch=4)  # fmt: skip
    assert shapes == {(4, 16, 4, 4), (2, 16, 4, 4)}


def gradients(net: nn.Module, *, micro: int | None, view: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and logged terms of one step in float64 (so that only the mathematics is compared)."""
    torch.manual_seed(0)
    student = ready(net).double()
    teacher = as_teacher(net.double())
    found: dict[str, Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    class Double(Noise):
        def draw(self, rng: torch.Generator) -> Batch:
            batch = super().draw(rng)
            images = batch.images.double()
            return Batch(images, batch.labels, look(net, images) if view else None)

    logged: dict[str, float] = {}
    run = quiet()
    run.log = lambda **terms: logged.update({name: float(value) for name, value in terms.items()})  # type: ignore[method-assign]
    fit(student, teacher, Double(batch=7), gap, Keep(student.parameters()), steps=1, run=run, micro_batch=micro)
    net.float()
    return found, logged


@pytest.mark.parametrize("micro", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("view", [False, True], ids=["asked", "brought"])
def test_micro_batches_give_the_gradient_of_the_batch(bn_net: nn.Module, micro: int, view: bool) -> None:
    whole, terms = gradients(bn_net, micro=None, view=view)
    parts, terms_of_parts = gradients(bn_net, micro=micro, view=view)
    assert list(whole) == list(parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-12)
    assert terms_of_parts == pytest.approx(terms, rel=1e-9)


def test_student_sees_micro_batches(bn_net: nn.Module) -> None:
    student, sizes = ready(bn_net), []
    student.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    fit(student, as_teacher(bn_net), Noise(batch=5), gap, sgd(student), steps=2, run=quiet(), micro_batch=2)
    assert sizes == [2, 2, 1] * 2


def test_schedules_and_inundation_take_part(bn_net: nn.Module, tmp_path: Path) -> None:
    student = ready(bn_net)
    optimizer = sgd(student, 0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4], 0.1)
    flood = GradientInundation(optimizer, quantized_weights(student), flip_rate=0.01)
    with quiet(tmp_path / "r") as run:
        fit(student, as_teacher(bn_net), Noise(), gap, optimizer, steps=6, run=run, schedulers=[schedule],
            inundation=flood, history_of=partial(codes_and_latents, student))  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    state = load_tree(tmp_path / "r" / "checkpoint" / "000-fit.safetensors")["objects"]
    assert set(state) == {"student", "source", "optimizer", "scheduler0", "inundation"}
    assert state["inundation"] == {"steps": 6}
    last = load_tree(tmp_path / "r" / "history" / "000006.safetensors")
    assert all(torch.equal(last[name], value) for name, value in codes_and_latents(student).items())


def test_bf16_keeps_quantizers_and_losses_in_float32(bn_net: nn.Module) -> None:
    student = ready(bn_net)
    kinds: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        kinds[type(module).__name__] = (args[0].dtype, out.dtype)

    for module in (student.get_submodule("3"), *activation_quantizers(student).values()):
        module.register_forward_hook(note)

    def loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        kinds["logits"] = s.logits.dtype, t.logits.dtype
        return gap(s, t, batch)

    before = weights(student)
    fit(student, as_teacher(bn_net), Noise(), loss, sgd(student), steps=2, run=quiet(), precision="bf16")
    half, full = torch.bfloat16, torch.float32
    assert kinds == {"QuantizedConv2d": (full, half), "RunningMinMax": (half, full), "logits": (full, full)}
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert not equal(before, weights(student))


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_counter_of_host_reads_counts() -> None:
    with HostReads() as reads:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert reads.count == 2


@pytest.mark.parametrize("inundated", [False, True])
def test_no_step_waits_for_the_device(bn_net: nn.Module, inundated: bool) -> None:
    student = ready(bn_net)
    optimizer = sgd(student)
    flood = GradientInundation(optimizer, quantized_weights(student)) if inundated else None
    run = quiet(log_every=1000, checkpoint_every=1000)
    reads = HostReads()
    seen: list[int] = []

    class Watched(Noise):
        def draw(self, rng: torch.Generator) -> Batch:
            seen.append(reads.count)
            return super().draw(rng)

    with reads:
        calibrate(student, Noise(), steps=5, run=quiet(log_every=1000), observe_last=2)
        reads.count = 0
        fit(student, as_teacher(bn_net), Watched(), gap, optimizer, steps=9, run=run, inundation=flood, micro_batch=4)
    assert seen == [seen[0]] * 9  # before the first step the student's grids are read, once


def test_a_loss_that_is_not_finite_stops_the_run(bn_net: nn.Module, tmp_path: Path) -> None:
    def loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        calls.append(1)
        terms = gap(s, t, batch)
        return {**terms, "ce": terms["ce"] * (math.nan if len(calls) == 8 else 1.0)}

    calls: list[int] = []
    student = ready(bn_net)
    with (
        quiet(tmp_path / "r") as run,
        pytest.raises(
            RunFailed,
            match=r"stage fit: .* got 'ce' = nan at step 8 .* steps 6 to 10\)\. The checkpoint after step 5 is kept",
        ),
    ):
        fit(student, as_teacher(bn_net), Noise(), loss, sgd(student), steps=20, run=run)
    saved = load_tree(tmp_path / "r" / "checkpoint" / "000-fit.safetensors")
    assert saved["step"] == 5
    assert all(value.isfinite().all() for value in saved["objects"]["student"].values())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [("calibrate", 4), ("calibrate", 7), ("fit", 1), ("fit", 9)], ids=str)
def test_resumed_equals_uninterrupted(bn_net: nn.Module, tmp_path: Path, stop: tuple[str, int]) -> None:
    """calibrate, then fit with momentum, schedule and inundation, stopped in the middle and begun again."""

    def program(run: Run, stop: tuple[str, int] | None = None) -> nn.Module:
        class Source(Noise):
            def draw(self, rng: torch.Generator) -> Batch:
                if stop is not None and rng.initial_seed() == run.rng(*stop).initial_seed():
                    raise Stopped
                return super().draw(rng)

        student, _ = quantize(bn_net)
        source = Source()
        calibrate(student, source, steps=8, run=run, observe_last=4)
        optimizer = sgd(student)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 8], 0.5)
        flood = GradientInundation(optimizer, quantized_weights(student), flip_rate=0.01, milestones=(6,))
        fit(student, as_teacher(bn_net), source, gap, optimizer, steps=12, run=run, schedulers=[schedule],
            inundation=flood, micro_batch=4)  # fmt: skip
        return student

    options: dict[str, Any] = {"log_every": 2, "checkpoint_every": 3}
    expected = weights(program(quiet(**options)))
    with pytest.raises(Stopped), quiet(tmp_path / "r", **options) as run:
        program(run, stop)
    with quiet(tmp_path / "r", resume=True, **options) as run:
        assert equal(weights(program(run)), expected)


# ---- refusals


def test_an_optimizer_of_something_else(bn_net: nn.Module) -> None:
    """The published baseline that trains the float network by mistake must not be possible."""
    student = ready(bn_net)
    for optimizer in (sgd(bn_net), sgd(nn.Linear(1, 1))):
        with pytest.raises(
            BadInput, match=r"expected trainable parameters of the student, got none of them. Create it from"
        ):
            fit(student, as_teacher(bn_net), Noise(), gap, optimizer, steps=1, run=quiet())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"micro_batch": 0}, "--micro-batch: expected a whole number from 1, got 0"),
     ({"precision": "fp8"}, "precision: expected float32, bf16 or integers, got 'fp8'")],
)  # fmt: skip
def test_bad_options(bn_net: nn.Module, options: dict[str, Any], message: str) -> None:
    student = ready(bn_net)
    with pytest.raises(BadInput, match=message):
        fit(student, as_teacher(bn_net), Noise(), gap, sgd(student), steps=1, run=quiet(), **options)


def test_terms_of_source_and_student_are_kept_apart(bn_net: nn.Module) -> None:
    student, logged = ready(bn_net), {}
    run = quiet()
    run.log = lambda **terms: logged.update(terms)  # type: ignore[method-assign]

    def loss(s: View, t: View, batch: Batch) -> dict[str, Tensor]:
        return {"g_size": s.logits.square().mean()}

    fit(student, as_teacher(bn_net), Noise(), loss, sgd(student), steps=1, run=run)
    assert set(logged) == {"g_size", "noise_g_size"}
