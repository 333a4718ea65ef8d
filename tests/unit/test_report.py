"""`zsq report`: numbers by hand, what is missing, and one clear message for what cannot be used."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zsq as package
from tiny import Command, Folder, contents, tiny_teacher
from zsq.analysis import INSTRUMENTS
from zsq.analysis.flips import Flips, Layer
from zsq.analysis.sensitivity import distance_of_logits, sensitivity, with_ranges_of
from zsq.checkpoint import load_tree, save_tree
from zsq.grid import decode, encode
from zsq.insert import QuantSpec, activation_quantizers, freeze_ranges, quantize, without_quantizers
from zsq.quantizer import LiveMinMax
from zsq.reporting.facts import training
from zsq.reporting.layers import measure, size
from zsq.reporting.opinions import album, colour, distance
from zsq.reporting.pictures import pixels_of
from zsq.reporting.readings import reading
from zsq.tasks.base import Boxes
from zsq.teachers import Teacher, make_teacher
from zsq.teachers.facts import Facts

FAST = ("--count", "8")


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file."""
    record = json.loads(file.read_text())
    file.write_text(json.dumps(edit(record) or record))


@pytest.fixture
def student_of(bn_net: nn.Module) -> Callable[..., tuple[nn.Module, QuantSpec, Tensor]]:
    """A calibrated student of the small network, and images."""

    def make(**options: Any) -> tuple[nn.Module, QuantSpec, Tensor]:
        spec, images = QuantSpec(**options), torch.randn(20, 3, 8, 8)
        student, _ = quantize(bn_net, spec)
        student.eval()(0.8 * images)
        freeze_ranges(student)
        return student, spec, images

    return make


# ---- the command


def test_page_and_facts(zsq: Command, run_copy: Path) -> None:
    before = contents(run_copy)
    said = zsq("report", run_copy, "--json", *FAST)
    assert said.code == 0, said.err
    facts = json.loads(said.out)
    assert "sensitivity" in said.err  # progress
    after = contents(run_copy)
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"report.html"}
    summary = json.loads((run_copy / "summary.json").read_text())
    assert facts["summary"] == summary and facts["sensitivity"]["count"] == 8
    kinds = [row["kind"] for row in facts["layers"]]
    assert kinds.count("weight") == summary["quantized_weights"]
    assert kinds.count("activation") == summary["activation_sites"]
    assert [row["name"] for row in facts["layers"]] == ["0", "2", "3", "5", "8"]  # the order of execution
    assert facts["images"]["count"] == 256 and len(facts["images"]["sample"]) == 24
    assert {stage: record["steps"] for stage, record in facts["training"].items()} == {"calibrate": [3], "fit": [3]}
    assert facts["reproduce"]["command"] and facts["missing"] == {}
    page = (run_copy / "report.html").read_text()
    assert facts["verdict"].replace("'", "&#39;") in page and len(page) < 2_000_000
    for text in ("4-bit weights and 4-bit activations", "No labelled score", "Not analysed", "Not exported", "torch 2."):  # noqa: E501
        assert text in page


def test_table_output_and_another_place(zsq: Command, run_copy: Path, tmp_path: Path) -> None:
    said = zsq("report", run_copy, "--output", tmp_path / "page.html", "--no-sensitivity")
    assert said.code == 0 and "verdict" in said.out and not (run_copy / "report.html").exists()
    page = (tmp_path / "page.html").read_text()
    assert "was not measured (--no-sensitivity)" in page and "What each quantizer costs" not in page


def test_same_run_same_page(run_copy: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        package.report(run_copy, output=tmp_path / name, count=4, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_after_evaluation_analysis_and_export(zsq: Command, run_copy: Path) -> None:
    assert zsq("evaluate", run_copy, "--data", "digits:train").code == 0
    assert zsq("analyse", run_copy, "--what", "flips").code == 0
    record = {"agreement": 0.97, "max_lsb": 1, "integer_conv_share": 0.5, "size_ratio": 3.5, "file": "<i>.onnx",
              "runtime": "onnxruntime 1", "convolutions": 2, "float_convolutions": ["0"], "warning": "one in float",
              "speedup_batch1": 1.25, "speedup_batch32": 0.5, "cpu": "some", "threads": 1, "vnni": False,
              "latency_ms_batch1": 0.53125, "latency_ms_float_batch1": 0.6640625, "waited_batch1": 0.27,
              "speedup_cpu_batch1": 1.75}  # fmt: skip
    (run_copy / "export-ort.json").write_text(json.dumps(record))
    facts = package.report(run_copy, sensitivity=False, progress=False)
    page = (run_copy / "report.html").read_text()
    assert facts["analysis"] == {"flips": "analysis/flips.png"} and "Figure of zsq analyse, flips" in page
    assert "1,198 labelled images" in facts["verdict"] and "digits:train" in page
    for text in ("&lt;i&gt;.onnx", "1.25", "3.5", "97.00", "1 of 2 convolutions of the ort file run in float",
                 "one in float", "0.531 ms, in float 0.664 ms", "27\u00a0%", "1.75 × faster"):  # fmt: skip
        assert text in page
    assert "Not exported" not in page and "Not analysed" not in page
    assert facts["labelled"]["name"] == "digits:train" and len(facts["labelled"]["sample"]) == 8
    assert "the first of digits:train" in page


def test_every_placement_and_real_images(zsq: Command, folder: Folder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez("real.npz", images=pixels, labels=np.zeros(40, dtype=np.int64))
    said = zsq("quantize", *folder.teacher(), "--recipe", "ait", "--steps", 2, "--warmup", 2, "--batch", 8, "--images",
               "npz:real.npz", "--placement", "deploy", "--bits", 3, "--run", "deploy")  # fmt: skip
    assert said.code == 0, said.err
    facts = package.report("deploy", count=4, progress=False)
    assert "on real images to 3-bit weights" in facts["verdict"] and "Nothing in it stays float" in facts["verdict"]
    page = Path("deploy/report.html").read_text()
    assert "not zero-shot" in page and "made for particular classes" not in facts["verdict"]
    assert facts["missing"]["labels"].startswith("The images were not made for") and facts["place"] == "deploy"
    assert facts["size"]["rest"] == 4 * (6 + 8 + 10)  # int32 biases: two of folded BatchNorms, one of the classifier


def test_images_of_another_size_than_the_networks(zsq: Command) -> None:
    said = zsq("quantize", "shapes-segment", "--recipe", "zaq", "--steps", 1, "--warmup", 1, "--batch", 4,
               "--leaves", 8, "--synthetic", "48x40", "--run", "small")  # fmt: skip
    assert said.code == 0, said.err
    facts = package.report("small", count=2, progress=False)
    assert facts["images"] is not None
    assert Path("small/report.html").read_text().count("<img") > 2


# ---- what is missing, what is damaged


def test_a_bare_run_still_gives_a_page(run_copy: Path) -> None:
    for name in ("metrics.jsonl", "images.safetensors"):
        (run_copy / name).unlink()
    shutil.rmtree(run_copy / "history")
    shutil.rmtree(run_copy / "checkpoint")
    facts = package.report(run_copy, progress=False)
    assert set(facts["missing"]) == {"training", "images", "changed"} and facts["images"] is None
    page = (run_copy / "report.html").read_text()
    for text in facts["missing"].values():
        assert text.replace("'", "&#39;") in page
    weights = [row for row in facts["layers"] if row["kind"] == "weight"]
    assert all(row["sqnr"] > 5 and row["changed"] is None and row["kl"] is None for row in weights)
    assert all(row["sqnr"] is None for row in facts["layers"] if row["kind"] == "activation")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "expected a finished run directory"),
        (lambda run: (run / "summary.json").write_text("{}"), "expected the summary of a run"),
        (lambda run: change(run / "summary.json", lambda r: r | {"agreement": "much"}), "expected the summary of a run"),  # noqa: E501
        (lambda run: (run / "summary.json").write_text("[1]"), "expected the summary of a run"),
        (lambda run: (run / "student.json").write_text('{"spec": {}}'), "student.json: expected"),
        (lambda run: change(run / "student.json", lambda r: r.pop("floats") and None), "student.json: expected"),
        (lambda run: (run / "metrics.jsonl").write_text('{"stage": "fit", "step": 1, "kl": 1}\n{"st'), "in line 2"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00"), "expected a text file"),
        (lambda run: (run / "images.safetensors").write_bytes(b"short"), "a truncated file"),
        (lambda run: save_tree(run / "images.safetensors", {"images": torch.zeros(3, 2, 8, 8)}), "expected finite images"),  # noqa: E501
        (lambda run: save_tree(run / "images.safetensors", {"images": torch.full((2, 1, 8, 8), math.nan)}), "finite"),
        (lambda run: save_tree(run / "images.safetensors", {"images": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([1, 10])}),  # noqa: E501
         "expected labels of 10 classes"),
        (lambda run: save_tree(run / "labelled.safetensors", {"images": torch.zeros(1, 1, 8, 8)}), "of an evaluation"),
        (lambda run: save_tree(run / "labelled.safetensors", {"name": "a", "images": torch.zeros(1, 1, 8, 8),
                                                              "truth": torch.tensor([10])}), "of an evaluation"),
        (lambda run: (run / "export-ort.json").write_text("[]"), "expected the result of `zsq export`"),
        (lambda run: ((run / "analysis").mkdir(), (run / "analysis" / "trace.png").write_bytes(b"GIF89a")), "expected a PNG"),  # noqa: E501
        (lambda run: sorted((run / "history").iterdir())[-1].write_bytes(b"x"), "a truncated file"),
    ],
)  # fmt: skip
def test_damaged_files(zsq: Command, run_copy: Path, break_it: Callable[[Path], object], message: str) -> None:
    break_it(run_copy)
    before = contents(run_copy)
    said = zsq("report", run_copy, *FAST)
    assert said.code == 2 and message in " ".join(said.err.split()), said.err
    assert said.err.count("zsq: ") == 1 and "Traceback" not in said.err and contents(run_copy) == before


def test_not_a_run_and_bad_options(zsq: Command, run_copy: Path) -> None:
    for arguments, message in (
        (["nowhere"], "expected a finished run directory"),
        ([run_copy, "--count", "0"], "--count: expected at least 1 image, got 0"),
        ([run_copy, "--output", "no/such/page.html"], "--output: expected a file in an existing folder"),
        ([run_copy, "--output", run_copy], "--output: expected a file in an existing folder"),
    ):
        said = zsq("report", *arguments)
        assert said.code == 2 and message in " ".join(said.err.split()), said.err


@pytest.mark.parametrize("name", ["matplotlib", "jinja2", "PIL"])
def test_missing_extra(zsq: Command, run_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest))  # noqa: E501
    said = zsq("report", run_copy)
    shown = {"PIL": "pillow"}.get(name, name)
    assert said.code == 2 and f"got no {shown}" in said.err and 'pip install "zsq[report]"' in said.err


# ---- numbers


def test_rows_against_float64(student_of: Callable[..., Any]) -> None:
    student, _, images = student_of(weight_bits=3, act_bits=3)
    rows = {row.name: row for row in measure(student, images, (3, 8, 8), {})}
    conv = student.get_submodule("0")
    w, quantizer = conv.weight.detach().double(), conv.weight_path.quantizer
    q = decode(encode(conv.weight, quantizer.grid(conv.weight)), quantizer.grid(conv.weight)).detach().double()
    row = rows["0"]
    assert row.sqnr == pytest.approx(10 * math.log10(float(w.square().sum() / (w - q).square().sum())), rel=1e-6)
    assert (row.op, row.shape, row.bits, row.scales, row.clipped) == ("Conv2d", (8, 3, 3, 3), 3, 8, 0.0)
    # the first activation by hand: what the quantized layer and the BatchNorm give, cut at the ends of the grid
    site = activation_quantizers(student)["2"]
    with torch.no_grad():
        x = torch.relu(student.get_submodule("1")(conv(images)))
    grid = site.grid(x)
    top = float((grid.qmax + grid.zero) / grid.inv_step)
    outside = float((x.double() > top + 0.5 / float(grid.inv_step)).double().mean())
    noise = (x - site(x)).double()
    assert rows["2"].clipped == pytest.approx(outside, abs=1e-12) and rows["2"].high == pytest.approx(top)
    ratio = float(x.double().square().sum() / noise.square().sum())
    assert rows["2"].sqnr == pytest.approx(10 * math.log10(ratio), rel=1e-6)
    assert 0 < outside < 0.1


def test_size_by_hand(student_of: Callable[..., Any], bn_net: nn.Module) -> None:
    student, _, images = student_of(weight_bits=3, act_bits=4)
    found = size(bn_net, student, measure(student, images, (3, 8, 8), {}))
    conv1, conv2, linear = 8 * 3 * 9, 16 * 8 * 9, 10 * 16
    assert found.whole == 4 * (conv1 + conv2 + 16 + linear + 10 + 4 * 8 + 4 * 16)  # conv2 and linear have biases
    assert found.codes == conv1 * 3 // 8 + conv2 * 3 // 8 + linear * 3 // 8
    assert found.scales == 8 * (8 + 16 + 10) + 8 * 2  # step and zero point per channel, and per site
    assert found.rest == 4 * (16 + 10 + 4 * 8 + 4 * 16)
    assert found.packed == found.codes + found.scales + found.rest and found.ratio == found.whole / found.packed


def test_size_of_integers_only(student_of: Callable[..., Any], bn_net: nn.Module) -> None:
    student, _, images = student_of(weight_bits=4, act_bits=4, placement="deploy")
    rows = measure(student, images, (3, 8, 8), {})
    found = size(bn_net, student, rows)
    assert found.rest == 4 * (8 + 16 + 10)  # one bias per channel: BatchNorm is folded
    sites = sum(row.kind == "activation" for row in rows)
    assert found.scales == 4 * (8 + 16 + 10) + 8 * sites  # symmetric weights have no zero point


def test_sensitivity_by_hand(student_of: Callable[..., Any], bn_net: nn.Module) -> None:
    student, spec, images = student_of(weight_bits=3, act_bits=3)
    with torch.no_grad():  # training moved the student's weights: they must not matter for single costs
        student.get_submodule("3").weight.mul_(1.1)
        found = sensitivity(student, bn_net, spec, images, batch=7)
        for name in found.weights:
            alone = copy.deepcopy(bn_net)
            alone.get_submodule(name).weight.copy_(LiveMinMax(3, axis=0)(bn_net.get_submodule(name).weight))
            assert found.weights[name] == pytest.approx(distance_of_logits(alone(images), bn_net(images)).mean(0).tolist())  # noqa: E501
        # one site: by hand in the float network
        site = activation_quantizers(student)["5"]
        logits = bn_net[6:](site(bn_net[:6](images)))
        assert found.sites["5"] == pytest.approx(distance_of_logits(logits, bn_net(images)).mean(0).tolist())
        assert found.trained == pytest.approx(distance_of_logits(student(images), bn_net(images)).mean(0).tolist())
        untrained = with_ranges_of(student, bn_net, spec)
        assert found.untrained == pytest.approx(distance_of_logits(untrained(images), bn_net(images)).mean(0).tolist())
    assert found.untrained.kl > 0 and found.count == 20 and set(found.sites) == {"2", "5"}


def test_only_some_quantizers_can_be_left_out(student_of: Callable[..., Any], bn_net: nn.Module) -> None:
    student, _, images = student_of()
    with torch.no_grad():
        whole, target = student(images), bn_net(images)
        with without_quantizers(student, weights=(), sites=()):
            assert torch.equal(student(images), whole)
        with without_quantizers(student):
            assert torch.allclose(student(images), target, atol=1e-5)
        with without_quantizers(student, sites=()), without_quantizers(student, weights=(), sites=("2", "5")):
            assert torch.allclose(student(images), target, atol=1e-5)  # nested
        assert torch.equal(student(images), whole)


def test_distance_of_pixels() -> None:
    s, t = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    found = distance_of_logits(s, t)
    p, q = t.double().softmax(1), s.double().softmax(1)
    assert found[:, 0].tolist() == pytest.approx((p * (p / q).log()).sum(1).mean((1, 2)).tolist())
    assert found[:, 1].tolist() == (s.argmax(1) == t.argmax(1)).double().mean((1, 2)).tolist()


def test_changed_weights(run_copy: Path) -> None:
    files = sorted((run_copy / "history").glob("*.safetensors"))
    tree = load_tree(files[-1])
    tree["0.codes"] = load_tree(files[0])["0.codes"].clone()
    tree["0.codes"].view(-1)[:6] += 1
    save_tree(files[-1], tree)
    facts = package.report(run_copy, sensitivity=False, progress=False)
    assert next(row for row in facts["layers"] if row["name"] == "0")["changed"] == 6 / 54


def test_curves_are_thinned(tmp_path: Path) -> None:
    lines = [{"stage": "fit", "step": i + 1, "kl": float(i), "seconds": 0.1} for i in range(1000)]
    lines[3]["ce"] = 1.0
    (tmp_path / "m").write_text("\n".join(map(json.dumps, lines)))
    record = training(tmp_path / "m")["fit"]
    assert len(record["steps"]) == 250 and record["steps"][0] == 4 and record["steps"][-1] == 1000
    assert record["terms"]["kl"][:2] == [1.5, 5.5] and record["terms"]["ce"][:2] == [1.0, None]
    assert training(tmp_path / "none") == {}


def test_pixels_are_those_that_went_in() -> None:
    teacher = tiny_teacher()
    pixels = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8)
    assert np.array_equal(pixels_of(teacher, teacher.normalise(pixels))[..., 0], pixels[..., 0].numpy())
    colour = replace(teacher, image=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25), channels="bgr")
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    assert np.array_equal(pixels_of(colour, colour.normalise(pixels)), pixels.numpy())
    unknown = replace(colour, mean=None, std=None)
    stretched = pixels_of(unknown, torch.randn(2, 3, 8, 8) * 50)
    assert stretched.min() == 0 and stretched.max() == 255


def test_album_shows_the_first_and_the_worst() -> None:
    teacher = tiny_teacher()
    images = torch.randn(40, 1, 8, 8)

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = teacher.net(x)
            wrong = (x[:, 0, 0, 0] == 9)[:, None]
            return torch.where(wrong, -logits, logits)

    images[[7, 30], 0, 0, 0] = 9
    found = album(teacher, Wrong(), images, torch.arange(40) % 10)
    assert found.count == 40 and found.agreement == 38 / 40 and not found.scaled
    assert [card.index for card in found.sample] == list(range(24)) and found.sample[3].asked == "class 3"
    assert {card.index for card in found.differing} == {7, 30}
    sure = [card.opinions[0].confidence or 0 for card in found.differing]
    assert sure == sorted(sure, reverse=True)
    told = found.sample[7].opinions
    logits = teacher.net(images)[7]
    assert told[0].text == f"class {int(logits.argmax())}" and told[1].text == f"class {int((-logits).argmax())}"
    assert told[0].confidence == pytest.approx(float(logits.softmax(0).max()))


# ---- other tasks


class Dense(nn.Module):
    """Three classes, told by where an image is bright; a detector's boxes are a cell wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, channels, 2, stride=2)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-2, 2, channels)[:, None, None, None].expand_as(self.head.weight))
            self.head.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def cells(raw: Tensor) -> Tensor:
    """One box per cell, half as wide as the image; score and class from the class channels."""
    score, kind = raw.softmax(1).flatten(2).max(1)
    corners = torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(*score.shape, 4)
    return torch.cat([corners, score[..., None], kind[..., None].float()], 2)


def dense_teacher(task: str) -> Teacher:
    facts = Facts(task=task, image=(1, 8, 8), mean=(0.5,), std=(0.5,), classes=3)
    teacher = make_teacher(Dense(3), facts, name="<dense>")
    if task == "detect":
        teacher = replace(teacher, outputs=replace(teacher.outputs, decode=cells, joined=False))  # type: ignore[type-var]
    return teacher


def test_overlays_of_a_segmenter() -> None:
    teacher = dense_teacher("segment")
    images = torch.full((3, 1, 8, 8), -1.0)
    images[1, :, :, 4:] = 1.0
    student = copy.deepcopy(teacher.net)
    with torch.no_grad():
        student.get_submodule("head").weight.mul_(torch.tensor([1.0, 1.0, -1.0])[:, None, None, None])
    found = album(teacher, student, images, None)
    card = found.sample[1]
    assert [view.title for view in card.views] == ["image", "teacher", "student"]
    assert card.opinions[0].text == "class 0 50 %, class 2 50 %"
    over = card.views[1].pixels.astype(int)
    bright = 0.45 * np.array([255] * 3) + 0.55 * np.array(colour(2))
    assert np.abs(over[4, 7] - bright).max() <= 1 and np.abs(over[4, 0] - 0.55 * np.array(colour(0))).max() <= 1
    masks = torch.full((3, 8, 8), 1)
    masks[:, :2] = 255
    label = album(teacher, student, images, masks).sample[0].views[3]
    assert label.title == "label" and label.pixels[0].max() == 0
    assert np.abs(label.pixels[4, 4] - 0.55 * np.array(colour(1))).max() <= 1
    assert card.agreement == 0.5 and found.differing[0].agreement <= found.differing[-1].agreement
    named = album(teacher, student, images, None, names=["sky", "road", "tree"])
    assert named.sample[1].opinions[0].text == "sky 50 %, tree 50 %"
    assert named.legend[1] == ("road", "#{:02x}{:02x}{:02x}".format(*colour(1))) and len(named.legend) == 3


def test_boxes_of_a_detector() -> None:
    teacher = dense_teacher("detect")
    images = torch.full((2, 1, 8, 8), -1.0)
    images[1] = 1.0
    same = album(teacher, teacher.net, images, None)
    assert same.agreement == 1.0 and same.differing == []
    assert same.sample[0].opinions[0].text == "1 class 0" and same.sample[1].opinions[1].text == "1 class 2"
    shown = same.sample[1].views[0].pixels
    assert shown.shape == (320, 320, 3) and tuple(shown[160, 80]) == colour(2) and tuple(shown[10, 10]) == (255,) * 3
    student = copy.deepcopy(teacher.net)
    with torch.no_grad():
        student.get_submodule("head").weight.neg_()
    other = album(teacher, student, images, None)
    assert other.agreement == 0.0 and [card.index for card in other.differing] == [0, 1]
    truth = [Boxes(torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([1]), torch.tensor([False]), torch.ones(1))] * 2
    shown = album(teacher, teacher.net, images, truth).sample[0].views[2]
    assert shown.title == "label" and tuple(shown.pixels[0, 150]) == colour(1)
    dumb = replace(teacher, outputs=replace(teacher.outputs, decode=None))  # type: ignore[type-var]
    assert album(dumb, student, images, None).sample[0].opinions[0].text == "nothing above 0.3"


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_single_costs_of_other_tasks(task: str) -> None:
    teacher, images = dense_teacher(task), torch.randn(4, 1, 8, 8)
    compare = distance(teacher)
    raw = teacher.net(images)
    assert compare(raw, raw)[:, 0].abs().max() < 1e-12 and compare(raw, raw)[:, 1].tolist() == [1.0] * 4
    assert compare(-raw, raw)[:, 0].min() > 0


@pytest.mark.parametrize("program", ["/usr/bin/zsq", "/x/src/zsq/cli.py", "/x/src/zsq/__main__.py"])
def test_the_command_as_it_is_typed(run_copy: Path, program: str) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["command"] = [program, "quantize", "my net.py:net"]
    (run_copy / "config.json").write_text(json.dumps(config))
    facts = package.report(run_copy, sensitivity=False, progress=False)
    assert facts["reproduce"]["command"] == "zsq quantize 'my net.py:net'"


def test_what_the_instruments_found_in_words(zsq: Command, run_copy: Path) -> None:
    assert zsq("analyse", run_copy, "--count", "4", "--probes", "2", "--points", "5").code == 0
    records = {name: json.loads((run_copy / "analysis" / f"{name}.json").read_text()) for name in INSTRUMENTS}
    flips = Flips(records["flips"]["steps"], True, [Layer(**layer) for layer in records["flips"]["layers"]])
    said = {name: reading(name, record) for name, record in records.items()}
    assert f"{100 * flips.ratio('own_grid', 0):.2g} % changed in steps 0 to 1" in said["flips"]
    estimate = records["trace"]["arms"]["synthetic images"]["ce"][-1]
    assert f"CE {estimate['trace']:.4g} ± {estimate['stderr']:.2g};" in said["trace"]
    assert "T=1 have one trace" in said["trace"]
    first = [value for value in records["cosine"]["curves"][0]["values"][0] if value is not None]
    assert f"{sum(first) / len(first):.2f} at the first snapshot".replace("-", "−") in said["cosine"]
    surface = records["landscape"]["surfaces"][1]
    ends = [line[i] for line in surface["lines"]["ce"] for i in (1, 3)]
    assert f"CE {sum(ends) / len(ends) - surface['centre']['ce']:+.2f}".replace("-", "−") in said["landscape"]
    assert reading("trace", {}) == reading("flips", {"layers": [], "steps": []}) == ""
    (run_copy / "analysis" / "trace.json").unlink()
    assert zsq("report", run_copy).code == 0
    page = unescape((run_copy / "report.html").read_text())
    assert said["cosine"] in page and said["trace"] not in page and "Figure of zsq analyse, trace" in page
