"""Loss surfaces: an exact paraboloid, filter normalisation, the centre, and nothing left moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from zsq.analysis.landscape import coordinates, directions, landscape, scan
from zsq.analysis.subject import open_subject
from zsq.errors import BadInput
from zsq.quantizer import LiveMinMax


def test_a_quadratic_loss_is_a_paraboloid() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 5, dtype=torch.float64)
    moves = directions([(w, 0)], count=2)
    axis = coordinates(5, 1.0)
    where = [(a, b) for a in axis for b in axis]
    found = scan([w], moves, where, lambda: {"square": w.square().sum()})["square"]
    (d,), (e,) = moves
    for (a, b), value in zip(where, found, strict=True):
        want = w @ w.T + a * a * d @ d.T + b * b * e @ e.T + 2 * a * w @ d.T + 2 * b * w @ e.T + 2 * a * b * d @ e.T
        assert value == pytest.approx(float(want.trace()), rel=1e-12)


def test_directions_have_the_norms_of_the_filters() -> None:
    torch.manual_seed(0)
    conv, linear, transposed, bias = torch.randn(6, 3, 3, 3), torch.randn(4, 7), torch.randn(3, 5, 2, 2), torch.randn(9)
    conv[2] = 0
    first, second = directions([(conv, 0), (linear, None), (transposed, 1), (bias, 0)], count=2, seed=4)
    for weight, move, dims in zip((conv, linear, transposed), first, ((1, 2, 3), (1,), (0, 2, 3)), strict=False):
        own, norms = (torch.linalg.vector_norm(t, dim=dims) for t in (weight, move))
        assert torch.allclose(own, norms, rtol=1e-5)
    assert not first[0][2].any() and not first[3].any()  # a dead filter and a one-dimensional tensor stay
    assert abs(torch.nn.functional.cosine_similarity(first[1].flatten(), second[1].flatten(), dim=0)) < 0.8
    again, _ = directions([(conv, 0), (linear, None), (transposed, 1), (bias, 0)], count=2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_deployed_surface_is_a_staircase() -> None:
    """Steps along a direction that change the codes of a random 4-bit layer: none, some percent, about 28 %."""
    weight = torch.randn(32, 16, 3, 3)
    ((move,),) = directions([(weight, 0)], count=1, seed=5)
    quantizer = LiveMinMax(4, axis=0)
    shares = [
        float((quantizer.codes(weight + step * move) != quantizer.codes(weight)).float().mean())
        for step in (1e-5, 0.01, 0.1)
    ]
    assert shares[0] == 0 and 0.01 < shares[1] < 0.1 and 0.2 < shares[2] < 0.4


def test_parameters_are_restored_also_after_an_error() -> None:
    w = torch.randn(3, 4)
    before = w.clone()

    def fail() -> dict[str, Tensor]:
        if not torch.equal(w, before):
            raise ValueError("in the middle")
        return {"loss": w.sum()}

    with pytest.raises(ValueError, match="in the middle"):
        scan([w], directions([(w, 0)], count=1), [(0.0,), (0.3,)], fail)
    assert torch.equal(w, before)


@pytest.mark.parametrize("points", [0, 1, 4])
def test_the_centre_must_be_a_point(points: int) -> None:
    with pytest.raises(BadInput, match=f"--points: expected an odd number from 3, .* got {points}"):
        coordinates(points, 1.0)


def test_a_run(finished_run: Path) -> None:
    subject = open_subject(finished_run, count=16)
    before = {key: value.clone() for key, value in subject.student.state_dict().items()}
    result = landscape(subject, points=3, lines=2)
    assert all(torch.equal(before[key], value) for key, value in subject.student.state_dict().items())
    with torch.no_grad():
        plain = {name: float(loss) for name, loss in subject.losses(subject.arms[0]).items()}
    requant, dequant = result.surfaces
    assert requant.mode == "requant" and requant.centre == plain
    assert dequant.mode == "dequant" and dequant.centre == pytest.approx(plain, rel=1e-4)
    assert result.coordinates == [-1.0, 0.0, 1.0]
    for surface in result.surfaces:
        for name, plane in surface.plane.items():
            lines = surface.lines[name]
            assert [len(plane), *map(len, plane), *map(len, lines)] == [3] * 6
            assert lines[0] == [row[1] for row in plane] and lines[1] == plane[1]  # the plane's own axes
            assert plane[1][1] == surface.centre[name]
    assert requant.plane != dequant.plane


def test_each_point_is_measured_once(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(finished_run, count=4)
    calls: list[int] = []
    plain = type(subject).losses
    monkeypatch.setattr(type(subject), "losses", lambda self, arm: calls.append(1) or plain(self, arm))
    result = landscape(subject, points=5, lines=4)
    assert len(calls) == 2 * (5 * 5 + 2 * 4)  # the plane holds the first two lines, and the centre of the others
    assert [len(line) for line in result.surfaces[0].lines["ce"]] == [5] * 4
