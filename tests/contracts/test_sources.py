"""What every source promises (see `zsq.sources.base.Source`). A new source joins by a line in FACTORIES."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zsq import recipes
from zsq.generators import ConditionalGenerator
from zsq.insert import QuantSpec, freeze_ranges, quantize
from zsq.losses import bn_gap, cross_entropy
from zsq.run import Run
from zsq.sources.base import Batch, Source
from zsq.sources.crops import CropSource
from zsq.sources.generator import GeneratorSource, Latents
from zsq.sources.harder import HarderSource
from zsq.sources.leaves import LeavesSource
from zsq.sources.mixed import MixedSource
from zsq.sources.noise_pool import NoiseSource
from zsq.sources.pool import PoolSource
from zsq.sources.recorded import RecordedSource
from zsq.teachers import Teacher
from zsq.view import View

BATCH = 8


def loss(view: View, batch: Batch) -> dict[str, Tensor]:
    return {"ce": cross_entropy(view.logits, batch.labels), "bns": 0.1 * bn_gap(view.norms)}


def soft_latents(count: int, rng: torch.Generator) -> Latents:
    mix = torch.randn(count, 10, generator=rng).softmax(1)
    return Latents((torch.randn(count, 16, generator=rng), mix), mix)


def from_generator(teacher: Teacher, **options: Any) -> GeneratorSource:
    conditional = options.pop("conditional", False)
    net = ConditionalGenerator(teacher.classes, teacher.image, latent=16, conditional=conditional)
    return GeneratorSource(teacher, net, loss, name="test", batch=BATCH, milestones=(2,), **options)


def from_pool(teacher: Teacher) -> Source:
    rng = torch.Generator().manual_seed(3)
    images, labels = torch.randn(64, *teacher.image, generator=rng), torch.randint(10, (64,), generator=rng)
    return PoolSource(images, labels, name="pool", batch=BATCH, held_out=32)


def of_recipe(recipe: str, teacher: Teacher, **options: Any) -> Source:
    source: Source = recipes.module(recipe).source(teacher, batch=BATCH, milestones=(2,), **options)
    return source


def from_noise(teacher: Teacher) -> Source:
    source = NoiseSource(teacher, lambda _: loss, name="noise", batch=BATCH, count=160, iterations=2, group=45, lr=0.1,
                         schedule="cosine")  # fmt: skip
    with Run(None, progress=False) as run:
        source.prepare(run)
    return source


def from_recording(teacher: Teacher) -> Source:
    builds = [lambda: from_generator(teacher), lambda: from_generator(teacher, conditional=True)]
    source = RecordedSource(teacher, builds, name="recorded", batch=BATCH, count=120, shown=BATCH, lead=1)
    with Run(None, progress=False) as run:
        source.prepare(run)
    return source


def from_adversary(teacher: Teacher, *, calibrated: bool = True, **options: Any) -> Source:
    student, _ = quantize(teacher.net, QuantSpec())
    student.eval()
    if calibrated:
        with torch.no_grad():
            student(torch.randn(32, *teacher.image, generator=torch.Generator().manual_seed(4)))
        freeze_ranges(student)
    return of_recipe("zaq", teacher, student=student, width=4, turns=2, **options)


def from_leaves(teacher: Teacher) -> LeavesSource:
    source = LeavesSource(teacher, batch=BATCH, count=64)
    with Run(None, progress=False) as run:
        source.prepare(run)
    return source


def from_harder(teacher: Teacher) -> Source:
    student, _ = quantize(teacher.net, QuantSpec())
    student.eval()
    with torch.no_grad():
        student(torch.randn(32, *teacher.image, generator=torch.Generator().manual_seed(4)))
    freeze_ranges(student)

    def gap(s: Tensor, t: Tensor) -> Tensor:
        return teacher.outputs.kl(s, t, through_teacher=True)

    return HarderSource(from_pool(teacher), teacher, student, gap, epsilon=0.2, precision="float32")


FACTORIES: dict[str, Callable[[Teacher], Source]] = {
    "generator": from_generator,
    "generator-conditional": lambda teacher: from_generator(teacher, conditional=True),
    "generator-float32": lambda teacher: from_generator(teacher, precision="float32"),
    "generator-soft": lambda teacher: from_generator(teacher, latents=soft_latents),
    "qimera": lambda teacher: of_recipe("qimera", teacher, superposed=0.5),
    "qimera-official": lambda teacher: of_recipe("qimera", teacher, fidelity="official", superposed=1.0),
    "autorecon": lambda teacher: of_recipe("autorecon", teacher),
    "zaq": from_adversary,
    "zaq-early": lambda teacher: from_adversary(teacher, calibrated=False),
    "zaq-official": lambda teacher: from_adversary(teacher, fidelity="official"),
    "zaq-bns": lambda teacher: from_adversary(teacher, bns_weight=0.1),
    "pool": from_pool,
    "pool-cropped": lambda teacher: CropSource(from_pool(teacher), scale=(0.5, 1.0)),
    "pool-harder": from_harder,
    "noise": from_noise,
    "leaves": from_leaves,
    "mixed": lambda teacher: MixedSource(from_leaves(teacher), from_adversary(teacher), share=0.5, batch=BATCH),
    "recorded": from_recording,
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def teacher(bn_net: nn.Module) -> Teacher:
    return Teacher(bn_net, "tiny", "classify", 10, (3, 8, 8))


@pytest.fixture(params=FACTORIES)
def make(request: pytest.FixtureRequest, teacher: Teacher) -> Callable[[], Source]:
    """Builds the same source every time."""

    def build() -> Source:
        torch.manual_seed(5)
        return FACTORIES[request.param](teacher)

    return build


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a state dict by path, tensors cloned."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), path)
    return {path: value.clone() if isinstance(value, Tensor) else value}


def same(a: Any, b: Any) -> bool:
    left, right = flat(a), flat(b)
    return left.keys() == right.keys() and all(
        torch.equal(x, right[key]) if isinstance(x, Tensor) else x == right[key] for key, x in left.items()
    )


def snapshot(net: nn.Module) -> list[Any]:
    """Everything a source must not touch."""
    flags = [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return [flags, hooks, {str(i): g for i, g in enumerate(grads)}, flat(net.state_dict())]


# ---- what comes out


def test_it_is_a_source(make: Callable[[], Source]) -> None:
    source = make()
    assert isinstance(source, Source) and source.name and source.metrics == {}


def test_batches(make: Callable[[], Source], teacher: Teacher) -> None:
    source = make()
    for batch, count in ((source.draw(rng()), BATCH), (source.sample(11, rng()), 11)):
        assert batch.images.shape == (count, 3, 8, 8) and batch.images.dtype == torch.float32
        assert not batch.images.requires_grad
        assert batch.images.isfinite().all()
        if batch.labels is not None:
            hard = batch.labels.dtype == torch.int64 and batch.labels.shape == (count,)
            assert hard or batch.labels.shape == (count, teacher.classes)
        if batch.view is not None:
            assert not batch.view.logits.requires_grad and batch.view.logits.dtype == torch.float32


def test_the_view_belongs_to_the_images(make: Callable[[], Source], teacher: Teacher) -> None:
    batch = make().draw(rng())
    if batch.view is None:
        pytest.skip("this source computes no view")
    with torch.no_grad():
        expected = teacher.net(batch.images)
    # bfloat16 keeps 8 bits; a view of other images would differ by the spread of the logits.
    assert (batch.view.logits - expected).abs().max() < 0.1 * expected.std() + 0.02
    assert len(batch.view.norms) == 2


def test_metrics_are_detached_scalars(make: Callable[[], Source]) -> None:
    source = make()
    source.draw(rng())
    assert all(term.shape == () and not term.requires_grad for term in source.metrics.values())


# ---- randomness


def test_randomness_comes_from_the_rng_only(make: Callable[[], Source]) -> None:
    first, second = make(), make()
    for step in range(3):
        torch.manual_seed(step)
        a = first.draw(rng(step))
        torch.manual_seed(77 + step)
        b = second.draw(rng(step))
        assert torch.equal(a.images, b.images)
    before = torch.random.get_rng_state()
    first.sample(5, rng())
    first.draw(rng())
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_seeds_give_other_images(make: Callable[[], Source]) -> None:
    source = make()
    assert not torch.equal(source.sample(8, rng(0)).images, source.sample(8, rng(1)).images)


# ---- what stays as it was


def test_sample_changes_nothing(make: Callable[[], Source]) -> None:
    source = make()
    source.draw(rng())
    state, metrics = copy.deepcopy(source.state_dict()), copy.deepcopy(source.metrics)
    a = source.sample(19, rng(1))
    assert same(state, source.state_dict()) and same(metrics, source.metrics)
    assert torch.equal(a.images, source.sample(19, rng(1)).images)
    other = make()
    other.draw(rng())
    assert torch.equal(source.draw(rng(2)).images, other.draw(rng(2)).images)


def test_a_small_sample_begins_a_large_one(make: Callable[[], Source]) -> None:
    source = make()
    assert torch.equal(source.sample(3, rng()).images, source.sample(20, rng()).images[:3])


@pytest.mark.parametrize("training", [False, True])
def test_the_teacher_is_left_alone(make: Callable[[], Source], teacher: Teacher, training: bool) -> None:
    teacher.net.train(training).requires_grad_(training)
    for parameter in teacher.net.parameters():
        parameter.grad = torch.ones_like(parameter) if training else None
    source = make()
    before = snapshot(teacher.net)
    source.draw(rng())
    source.sample(5, rng())
    assert same(before, snapshot(teacher.net))


def test_the_teacher_is_left_alone_after_an_error(make: Callable[[], Source], teacher: Teacher) -> None:
    source = make()
    teacher.net.train().requires_grad_(True)
    before = snapshot(teacher.net)

    def stop(*_: Any) -> None:
        raise ValueError("stop")

    handle = teacher.net[-1].register_forward_pre_hook(stop)
    with contextlib.suppress(ValueError):  # a source that does not ask the teacher gets through
        source.draw(rng())
    handle.remove()
    assert same(before, snapshot(teacher.net))


# ---- the caller's modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_ambient_modes_do_not_matter(make: Callable[[], Source], mode: Callable[[], Any]) -> None:
    plain, wrapped = make(), make()
    for step in range(2):
        a = plain.draw(rng(step))
        with mode():
            b = wrapped.draw(rng(step))
            held = wrapped.sample(4, rng(9))
        assert torch.equal(a.images, b.images) and torch.equal(plain.sample(4, rng(9)).images, held.images)
    assert same(plain.state_dict(), wrapped.state_dict())


# ---- resuming


def test_a_resumed_source_goes_on_as_if_nothing_had_happened(make: Callable[[], Source]) -> None:
    source = make()
    for step in range(3):
        source.draw(rng(step))
    saved = copy.deepcopy(source.state_dict())
    expected = [source.draw(rng(step)).images for step in (3, 4, 5)]
    resumed = make()
    resumed.load_state_dict(as_on_disk(saved))
    assert same(saved, resumed.state_dict())
    assert all(torch.equal(x, resumed.draw(rng(step)).images) for x, step in zip(expected, (3, 4, 5), strict=True))
    assert same(source.state_dict(), resumed.state_dict())


def as_on_disk(state: Any) -> Any:
    """Files keep values and shapes, not memory formats."""
    if isinstance(state, dict):
        return {key: as_on_disk(value) for key, value in state.items()}
    return state.contiguous().clone() if isinstance(state, Tensor) else state


# ---- speed


class _NoReadBack(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} in a training step")
        return func(*args, **(kwargs or {}))


def test_draw_reads_nothing_back(make: Callable[[], Source]) -> None:
    source = make()
    with pytest.raises(AssertionError, match="in a training step"), _NoReadBack():
        torch.ones(()).item()
    for step in range(3):
        with _NoReadBack():
            source.draw(rng(step))
