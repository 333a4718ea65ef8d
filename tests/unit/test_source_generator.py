"""The generator source: that its step is the published one, learns, and follows its schedule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from zsq.errors import BadInput
from zsq.generators import ConditionalGenerator
from zsq.losses import bn_gap, cross_entropy
from zsq.sources.base import Batch
from zsq.sources.generator import GeneratorSource, Latents, gaussian_latents
from zsq.teachers import Teacher
from zsq.view import View, look


@pytest.fixture
def teacher(bn_net: nn.Module) -> Teacher:
    return Teacher(bn_net, "tiny", "classify", 10, (3, 8, 8))


def loss(view: View, batch: Batch) -> dict[str, Tensor]:
    return {"ce": cross_entropy(view.logits, batch.labels), "bns": 0.1 * bn_gap(view.norms)}


def make(teacher: Teacher, *, precision: str = "float32", milestones: Sequence[int] = ()) -> GeneratorSource:
    net = ConditionalGenerator(10, teacher.image, latent=16, rng=torch.Generator().manual_seed(1))
    return GeneratorSource(
        teacher, net, loss, name="test", batch=16, precision=precision, milestones=milestones, lr=1e-2
    )


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_step_is_plain_adam_on_the_published_loss(teacher: Teacher) -> None:
    source = make(teacher)
    net = ConditionalGenerator(10, teacher.image, latent=16, rng=torch.Generator().manual_seed(1))
    adam = torch.optim.Adam(net.parameters(), 1e-2, (0.5, 0.999))
    for step in range(3):
        (z, labels), _ = gaussian_latents(16, 10)(16, rng(step))
        images = net(z, labels)
        view = look(teacher.net, images, norms=True)
        terms = loss(view, Batch(images, labels))
        adam.zero_grad()
        sum(terms.values()).backward()
        adam.step()
        batch = source.draw(rng(step))
        torch.testing.assert_close(batch.images, images.detach(), rtol=0, atol=2e-3)
        assert torch.equal(batch.labels, labels) and batch.view is not None
        torch.testing.assert_close(batch.view.logits, view.logits.detach(), rtol=0, atol=2e-3)
        for name, term in terms.items():
            assert float(source.metrics[name]) == pytest.approx(float(term.detach()), rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_learns(teacher: Teacher, precision: str) -> None:
    with torch.no_grad():  # a teacher with opinions
        teacher.net[-1].weight.mul_(20)
    source = make(teacher, precision=precision)
    totals = []
    for step in range(60):
        source.draw(rng(step))
        totals.append(float(sum(source.metrics.values())))
    assert sum(totals[-10:]) < 0.85 * sum(totals[:10])


def test_learning_rate_falls_at_milestones(teacher: Teacher) -> None:
    source = make(teacher, milestones=(2, 3))
    rates = []
    for step in range(5):
        source.draw(rng(step))
        rates.append(source.state_dict()["optimizer"]["param_groups"][0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-4])


def test_the_schedule_survives_a_resume(teacher: Teacher) -> None:
    source, other = make(teacher, milestones=(2,)), make(teacher, milestones=(2,))
    for step in range(3):
        source.draw(rng(step))
    other.load_state_dict(source.state_dict())
    other.draw(rng(3))
    assert other.state_dict()["count"] == 4
    assert other.state_dict()["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3)


def test_optimizer_state_lies_like_the_parameters_after_loading(teacher: Teacher) -> None:
    source = make(teacher)
    source.draw(rng())
    state = source.state_dict()
    for slots in state["optimizer"]["state"].values():
        slots.update({name: slots[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    source.load_state_dict(state)
    for parameter, slots in source._optimizer.state.items():
        assert slots["exp_avg"].stride() == slots["exp_avg_sq"].stride() == parameter.stride()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_batches_can_be_trained_on_whatever_the_mode(teacher: Teacher, mode: type) -> None:
    source = make(teacher)
    with mode():
        batches = source.draw(rng()), source.sample(3, rng())
    assert not any(batch.images.is_inference() or batch.labels.is_inference() for batch in batches)


def test_terms_see_images_with_gradient(teacher: Teacher) -> None:
    def image_norm(view: View, batch: Batch) -> dict[str, Tensor]:
        assert batch.images.requires_grad and view.logits.dtype == torch.float32
        return {"norm": batch.images.pow(4).mean()}

    net = ConditionalGenerator(10, teacher.image, latent=16)
    before = net.linear.weight.detach().clone()
    GeneratorSource(teacher, net, image_norm, name="test", batch=4).draw(rng())
    assert not torch.equal(before, net.linear.weight)


def test_own_latents_and_any_generator(teacher: Teacher) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3 * 8 * 8)

        def forward(self, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            return self.linear((z * weights[..., None]).sum(1)).view(-1, 3, 8, 8)

    def superposed(count: int, rng: torch.Generator) -> Latents:
        y = torch.randint(10, (count, 2), generator=rng)
        weights = torch.randn(count, 2, generator=rng).softmax(1)
        soft = torch.zeros(count, 10).scatter_add_(1, y, weights)
        return Latents((torch.randn(count, 2, 6, generator=rng), y, weights), soft)

    source = GeneratorSource(teacher, Mixing(), loss, name="mix", batch=4, latents=superposed)
    labels = source.draw(rng()).labels
    assert labels is not None and labels.shape == (4, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_gaussian_latents() -> None:
    (z, fed), labels = gaussian_latents(50, 7)(2000, rng())
    assert z.shape == (2000, 50) and torch.equal(fed, labels) and labels.dtype == torch.int64
    assert abs(float(z.mean())) < 0.02 and abs(float(z.var()) - 1) < 0.02
    assert int(labels.bincount(minlength=7).min()) > 200 and int(labels.max()) == 6


def test_a_teacher_without_batch_norm_is_refused_by_the_statistics_term(bn_free_net: nn.Module) -> None:
    source = make(Teacher(bn_free_net, "plain", "classify", 10, (3, 8, 8)))
    with pytest.raises(BadInput, match="BatchNorm"):
        source.draw(rng())


def test_what_it_refuses(teacher: Teacher) -> None:
    net = ConditionalGenerator(10, teacher.image, latent=16)
    with pytest.raises(BadInput, match="at least 2 images"):
        GeneratorSource(teacher, net, loss, name="test", batch=1)
    with pytest.raises(BadInput, match="'bf16' or 'float32'"):
        GeneratorSource(teacher, net, loss, name="test", batch=4, precision="half")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="at least 1 image"):
        GeneratorSource(teacher, net, loss, name="test", batch=4).sample(0, rng())
