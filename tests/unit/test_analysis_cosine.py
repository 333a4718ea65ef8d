"""Gradient cosine: its definition, and over the history of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from zsq import losses
from zsq.analysis.cosine import cosine, gradient_cosine, logit_cosine
from zsq.analysis.subject import at_snapshot, history_files, open_subject
from zsq.checkpoint import load_tree, save_tree
from zsq.errors import BadInput


def test_equal_opposite_and_scaled() -> None:
    torch.manual_seed(0)
    a, b = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    assert gradient_cosine(a, a) == ([pytest.approx(1)] * 2, pytest.approx(1))
    assert gradient_cosine(a, [-g for g in a]) == ([pytest.approx(-1)] * 2, pytest.approx(-1))
    layers, whole = gradient_cosine(a, b)
    for scale in (1e-12, 1e9):
        scaled, all_of_it = gradient_cosine([scale * g for g in a], b)
        assert scaled == pytest.approx(layers, rel=1e-5) and all_of_it == pytest.approx(whole, rel=1e-5)
    flat = [torch.cat([g.flatten() for g in side]) for side in (a, b)]
    assert whole == pytest.approx(float(nn.functional.cosine_similarity(*flat, dim=0)), rel=1e-5)


def test_zero_gradients_are_skipped() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert gradient_cosine([zero, one], [one, one]) == ([None, pytest.approx(1)], pytest.approx(0.5**0.5))
    assert gradient_cosine([zero], [one]) == ([None], None)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_logit_cosine_is_that_of_the_gradients(temperature: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    ce = torch.autograd.grad(losses.cross_entropy(logits, labels), logits)[0]
    kl = torch.autograd.grad(losses.kl(logits, target, temperature=temperature), logits)[0]
    want = nn.functional.cosine_similarity(ce, kl, dim=1, eps=0).mean()
    assert logit_cosine(logits, target, labels, temperature) == pytest.approx(float(want), rel=1e-9)
    soft = nn.functional.one_hot(labels, 4).double()
    assert logit_cosine(logits, target, soft, temperature) == pytest.approx(float(want), rel=1e-9)
    assert logit_cosine(target, target, labels, temperature) is None


def test_positions_count_like_images() -> None:
    logits, target = torch.randn(2, 5, 5, 5), torch.randn(2, 5, 5, 5)
    labels = torch.randint(5, (2, 5, 5))
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (logits, target)]
    assert logit_cosine(logits, target, labels, 20.0) == pytest.approx(logit_cosine(*rows, labels.flatten(), 20.0))


def test_the_student_of_a_snapshot(finished_run: Path) -> None:
    subject = open_subject(finished_run, count=4)
    files = list(history_files(finished_run).values())
    final = {key: value.clone() for key, value in subject.student.state_dict().items()}

    def same() -> bool:
        return all(torch.equal(final[key], value) for key, value in subject.student.state_dict().items())

    with at_snapshot(subject, files[-1]):
        assert same()  # the history holds everything that was trained
    with at_snapshot(subject, files[0]):
        changed = [key for key, value in subject.student.state_dict().items() if not torch.equal(final[key], value)]
        assert "0.weight" in changed and "1.weight" in changed and not any("zsq" in key for key in changed)
    assert same()
    with pytest.raises(ValueError, match="stop"), at_snapshot(subject, files[0]):
        raise ValueError("stop")
    assert same()


def test_over_a_run(finished_run: Path) -> None:
    subject = open_subject(finished_run, count=12)
    result = cosine(subject, batch=8)
    assert result.steps == [0, 1, 2, 3] and result.complete
    kinds = [(curve.labels, curve.temperature) for curve in result.curves]
    assert kinds == [(kind, t) for kind in ("labels asked for", "teacher's labels") for t in (20.0, 1.0)]
    assert all(len(row) == 2 for curve in result.curves for row in curve.values)
    made = load_tree(finished_run / "images.safetensors")
    images, labels = made["images"][:8], made["labels"][:8]
    assert torch.equal(subject.arms[0].main_labels[:8], labels)
    logits, parameters = subject.student(images), [w.parameter for w in subject.weights]
    first, second = (
        torch.autograd.grad(loss, parameters, retain_graph=True)
        for loss in (losses.cross_entropy(logits, labels), losses.kl(logits, subject.arms[0].target[:8]))
    )
    assert result.curves[0].values[-1][0] == pytest.approx(gradient_cosine(first, second)[1], rel=1e-4)
    assert all(parameter.grad is None for parameter in parameters)


def test_an_older_history_says_so(run_copy: Path) -> None:
    for file in history_files(run_copy).values():
        tree = load_tree(file)
        save_tree(file, {key: value for key, value in tree.items() if not key.endswith(".parameter")})
    assert not cosine(open_subject(run_copy, count=4)).complete


def test_without_history_the_end_alone(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "history")
    result = cosine(open_subject(run_copy, count=4))
    assert result.steps == [None] and result.complete


@pytest.mark.parametrize("change", ["missing", "shape", "foreign"])
def test_a_snapshot_of_another_network(run_copy: Path, change: str) -> None:
    file = history_files(run_copy)[0]
    tree = load_tree(file)
    if change == "missing":
        del tree["0.latent"]
    else:
        tree["0.latent" if change == "shape" else "other.parameter"] = torch.zeros(2)
    save_tree(file, tree)
    with pytest.raises(BadInput, match="expected a snapshot of this run's student"):
        cosine(open_subject(run_copy, count=4))
