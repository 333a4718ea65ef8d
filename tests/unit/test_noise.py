"""Images optimised from noise: that the objective falls, that nothing else changes, that the probe pool is fixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.losses import bn_gap, cross_entropy
from zsq.sources.base import Batch
from zsq.sources.noise import balanced_labels, image_loss, probe_images, synthesise
from zsq.sources.priors import total_variation
from zsq.tasks.base import Part
from zsq.tasks.classify import Classify
from zsq.tasks.detect import Detect
from zsq.tasks.segment import Segment
from zsq.teachers import Teacher
from zsq.view import View, look


def tiny(net: nn.Module) -> Teacher:
    return Teacher(net, "tiny", "classify", 10, (3, 8, 8))


def opinionated(net: nn.Module) -> Teacher:
    """A random network is sure of nothing and prefers one class: sharpen and centre its logits."""
    with torch.no_grad():
        net[-1].bias -= net(torch.randn(64, 3, 8, 8, generator=rng(4))).mean(0)
        net[-1].weight.mul_(30)
        net[-1].bias.mul_(30)
    return tiny(net)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_image(view: View, batch: Batch) -> dict[str, Tensor]:
    return {"norm": (batch.images - 1).square().sum()}


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_the_objective_falls(bn_net: nn.Module, precision: str) -> None:
    teacher, labels = opinionated(bn_net), torch.arange(20) % 10
    start = torch.randn(20, 3, 8, 8, generator=rng())
    images = synthesise(teacher, labels, image_loss(Classify(10)), steps=60, rng=rng(), batch=20, precision=precision)
    assert images.shape == (20, 3, 8, 8) and images.dtype == torch.float32 and not images.requires_grad
    for x, y in ((start, images),):
        before, after = look(bn_net, x, norms=True), look(bn_net, y, norms=True)
        assert cross_entropy(after.logits, labels) < 0.2 * cross_entropy(before.logits, labels)
        assert bn_gap(after.norms) < 10 * bn_gap(before.norms) + 0.5  # the class term may pull, not run away
    assert (look(bn_net, images).logits.argmax(1) == labels).float().mean() > 0.9


def test_it_is_adam(bn_net: nn.Module) -> None:
    labels = torch.arange(6)
    images = synthesise(
        tiny(bn_net), labels, image_loss(Classify(10)), steps=5, rng=rng(), batch=6, anneal=False, precision="float32"
    )
    x = torch.randn(6, 3, 8, 8, generator=rng()).requires_grad_()
    adam = torch.optim.Adam([x], 0.1)
    for _ in range(5):
        adam.zero_grad()
        view = look(bn_net, x, norms=True)
        (bn_gap(view.norms) + cross_entropy(view.logits, labels)).backward()
        adam.step()
    torch.testing.assert_close(images, x.detach(), rtol=0, atol=1e-3)


def test_annealing_ends_softly(bn_net: nn.Module) -> None:
    fixed, annealed = (
        synthesise(tiny(bn_net), torch.arange(2), first_image, steps=80, rng=rng(), batch=2, lr=0.3, anneal=anneal)
        for anneal in (False, True)
    )
    assert (annealed - 1).abs().max() < 0.2 and not torch.equal(fixed, annealed)


def test_batches_are_even_and_in_order(bn_net: nn.Module) -> None:
    sizes: list[int] = []
    seen: list[Tensor] = []

    def record(view: View, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        sizes.append(len(batch.images))
        seen.append(batch.labels)
        return {"norm": batch.images.square().sum()}

    done: list[tuple[int, int]] = []
    labels = torch.arange(10)
    images = synthesise(
        tiny(bn_net),
        labels,
        record,
        steps=2,
        rng=rng(),
        batch=4,
        progress=lambda step, total: done.append((step, total)),
    )
    assert sizes == [4, 4, 3, 3, 3, 3] and len(images) == 10
    assert torch.equal(torch.cat(seen[::2]), labels)
    assert done == [(step, 6) for step in range(1, 7)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ambient_modes_do_not_matter(bn_net: nn.Module, mode: type) -> None:
    labels = torch.arange(4)
    plain = synthesise(tiny(bn_net), labels, image_loss(Classify(10)), steps=3, rng=rng(), batch=4)
    with mode():
        wrapped = synthesise(tiny(bn_net), labels, image_loss(Classify(10)), steps=3, rng=rng(), batch=4)
    assert torch.equal(plain, wrapped) and not wrapped.is_inference()


def test_the_teacher_is_left_alone(bn_net: nn.Module) -> None:
    bn_net.train().requires_grad_(True)
    before = {name: value.clone() for name, value in bn_net.state_dict().items()}
    synthesise(tiny(bn_net), torch.arange(4), image_loss(Classify(10)), steps=2, rng=rng(), batch=4)
    assert all(m.training for m in bn_net.modules())
    assert all(p.requires_grad and p.grad is None for p in bn_net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in bn_net.state_dict().items())


@pytest.mark.parametrize(("labels", "steps", "batch"), [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_what_it_refuses(bn_net: nn.Module, labels: int, steps: int, batch: int) -> None:
    with pytest.raises(BadInput, match="positive counts"):
        synthesise(tiny(bn_net), torch.zeros(labels).long(), first_image, steps=steps, rng=rng(), batch=batch)


# ---- the objective


def test_image_loss_terms(bn_net: nn.Module, bn_free_net: nn.Module) -> None:
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    loss = image_loss(Classify(10), class_weight=0.5, bn_weight=2.0, smooth_weight=3.0)
    view = look(bn_net, x, norms=True)
    terms = loss(view, Batch(x, labels))
    torch.testing.assert_close(terms["bn"], 2 * bn_gap(view.norms))
    torch.testing.assert_close(terms["class"], cross_entropy(view.logits, labels) / 2)
    terms = loss(look(bn_free_net, x, norms=True), Batch(x, labels))
    assert set(terms) == {"smooth", "class"}
    torch.testing.assert_close(terms["smooth"], 3 * total_variation(x))


def test_image_loss_of_dense_and_foreign_outputs() -> None:
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 0])
    dense = torch.randn(2, 10, 4, 4)
    terms = image_loss(Segment(10))(View(dense), Batch(x, labels))
    torch.testing.assert_close(terms["class"], cross_entropy(dense.mean((2, 3)), labels))
    boxes = Detect(10, (Part("other", 10),))
    assert set(image_loss(boxes)(View(dense), Batch(x, labels))) == {"smooth"}


def test_total_variation() -> None:
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    down, across = x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
    assert float(total_variation(x)) == pytest.approx(float((down**2).mean() + (across**2).mean()))
    assert float(total_variation(torch.ones(1, 1, 4, 4))) == 0


# ---- the probe pool


@pytest.mark.parametrize(("classes", "count"), [(10, 256), (100, 256), (1000, 256), (3, 7)])
def test_labels_are_balanced(classes: int, count: int) -> None:
    counts = balanced_labels(classes, count, rng()).bincount(minlength=classes)
    assert counts.sum() == count and counts.max() - counts.min() <= 1 and len(counts) == classes


def test_labels_spread_over_many_classes() -> None:
    labels = balanced_labels(1000, 256, rng())
    assert labels.max() > 990 and labels[:64].float().mean() > 300  # not the first classes only, and not sorted


@pytest.mark.parametrize("net", ["bn_net", "bn_free_net"])
def test_probe_images_are_fixed_and_of_their_classes(net: str, request: pytest.FixtureRequest) -> None:
    teacher = opinionated(request.getfixturevalue(net))
    torch.manual_seed(1)
    first = probe_images(teacher, 40)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(first, probe_images(teacher, 40)) and torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (40, 3, 8, 8) and first.is_contiguous() and first.isfinite().all()
    with torch.no_grad():
        predictions = teacher.net(first).argmax(1)
    assert len(predictions.unique()) >= 5
