"""Segmentation and detection: raw outputs, losses on them, scores, readers, and whole runs of the built-in teachers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from conftest import Shared
from tiny import Command, Folder
from zsq import losses
from zsq.data import check_disjoint, load_data
from zsq.data.shapes import draw_scenes
from zsq.errors import BadInput
from zsq.evaluation import agreement, score
from zsq.insert import quantize
from zsq.tasks.base import Boxes, Part
from zsq.tasks.boxes import AveragePrecision, best_boxes, overlaps
from zsq.tasks.detect import Detect, bernoulli_kl, name_parts
from zsq.tasks.segment import Segment, decisions
from zsq.teachers import EMBEDDED, load_teacher, make_teacher
from zsq.teachers.facts import Facts
from zsq.teachers.nets import ShapesSegmenter, grid_boxes

DENSE = ("shapes-segment", "shapes-detect")


def boxes(rows: list[list[float]]) -> Boxes:
    """x1 y1 x2 y2 score class."""
    table = torch.tensor(rows).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 5].long(), torch.zeros(len(table), dtype=torch.bool), table[:, 4])


# ---- raw outputs


def test_a_segmenter_ends_before_it_is_up_sampled() -> None:
    net = ShapesSegmenter().eval()
    x = torch.randn(2, 3, 64, 64)
    whole = net(x)
    teacher = make_teacher(net, Facts("segment", image=(3, 64, 64)), name="net")
    raw = teacher.net(x)
    assert raw.shape == (2, 5, 32, 32) and teacher.classes == 5
    assert torch.equal(F.interpolate(raw, (64, 64), mode="bilinear", align_corners=False), whole)
    assert torch.equal(decisions(raw, (64, 64)), whole.argmax(1))
    assert list(teacher.net.state_dict()) == list(net.state_dict())


def test_a_detector_ends_before_its_activations_and_gives_them_to_the_decoder() -> None:
    entry = EMBEDDED["shapes-detect"]
    net = entry.build().eval()
    whole, teacher = net(torch.ones(1, 3, 64, 64)), make_teacher(net, entry.facts, name="net")
    layout = (Part("objectness", 1, "sigmoid"), Part("box", 4), Part("class", 4, "softmax"))
    assert isinstance(teacher.outputs, Detect) and teacher.outputs.layout == layout
    raw = teacher.net(torch.ones(1, 3, 64, 64))
    assert (raw[:, 0].sigmoid() - whole[:, 0]).abs().max() < 1e-6
    found, expected = teacher.outputs.objects(raw, least=0.0)[0], best_boxes(grid_boxes(whole)[0], least=0.0)
    assert torch.allclose(found.corners, expected.corners, atol=1e-5)


def test_sites_keep_the_names_they_have_in_the_whole_network() -> None:
    net = ShapesSegmenter().eval()
    teacher = make_teacher(net, Facts("segment", image=(3, 64, 64)), name="net")
    whole, ending = quantize(net)[1], quantize(teacher.net)[1]
    assert [site.name for site in ending.sites] == [site.name for site in whole.sites]


def test_named_raw_outputs_and_what_cannot_be_one() -> None:
    net = ShapesSegmenter().eval()
    facts = Facts("segment", image=(3, 64, 64), raw=("classifier",))
    assert make_teacher(net, facts, name="net").net(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 32, 32)
    for names, message in ((("nothing",), "expected paths of modules"), (("trunk",), "called once and gives one")):
        with pytest.raises(BadInput, match=message):
            make_teacher(ShapesSegmenter().eval(), Facts("segment", image=(3, 64, 64), raw=names), name="net")


def test_parts_are_told_apart_when_there_are_as_many_classes_as_sides_of_a_box() -> None:
    names = [part.name for part in name_parts([1, 4, 4], ["sigmoid", "none", "softmax"], 4)]
    assert names == ["objectness", "box", "class"]


# ---- losses


def test_segmentation_loss_is_the_mean_over_pixels_of_that_of_single_pixels() -> None:
    s, t = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    found = Segment(5).kl(s, t, temperature=4.0, reduction="batchmean")
    assert torch.allclose(found, losses.kl(*rows, temperature=4.0, reduction="batchmean"))


def test_detection_loss_by_hand_and_zero_for_equal_outputs() -> None:
    task = Detect(3, (Part("objectness", 1, "sigmoid"), Part("box", 4), Part("class", 3, "softmax")))
    s, t = torch.randn(2, 2, 8, 6)
    weight = t[:, 0].sigmoid() + 0.05
    weight = weight / weight.mean()
    p, q = t[:, 5:].softmax(1), s[:, 5:].softmax(1)
    a, b = t[:, 0].sigmoid(), s[:, 0].sigmoid()
    expected = (((p * (p / q).log()).sum(1) * weight).mean()
                + ((s[:, 1:5] - t[:, 1:5]).abs().mean(1) * weight).mean()
                + (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).mean())  # fmt: skip
    assert float(task.kl(s, t, temperature=1.0, reduction="batchmean")) == pytest.approx(float(expected), rel=1e-4)
    assert float(task.kl(t, t)) == 0 and float(bernoulli_kl(s, s)) == 0


# ---- boxes


def test_overlap_and_suppression() -> None:
    a = torch.tensor([[0.0, 0, 2, 2]])
    assert overlaps(a, torch.tensor([[1.0, 1, 3, 3], [5, 5, 6, 6], [0, 0, 2, 2]])).tolist()[0] == pytest.approx(
        [1 / 7, 0, 1]
    )
    rows = torch.tensor([[0, 0, 2, 2, 0.9, 0], [0, 0, 2, 1.9, 0.8, 0], [0, 0, 2, 1.9, 0.7, 1], [0, 0, 1, 1, 0.01, 0]])
    assert best_boxes(rows, least=0.1).scores.tolist() == pytest.approx([0.9, 0.7])
    assert len(best_boxes(torch.full((3, 6), float("nan")), least=0.0).scores) == 0


def test_average_precision_of_sets_worked_out_by_hand() -> None:
    truth = boxes([[0, 0, 0.5, 0.5, 1, 0], [0.5, 0.5, 1, 1, 1, 0]])
    for found, expected in (
        (truth, 1.0),
        (boxes([]), 0.0),
        (boxes([[0, 0, 0.5, 0.5, 0.9, 0]]), 51 / 101),  # one of two found: precision 1 up to a recall of a half
        (boxes([[0, 0, 0.5, 0.5, 0.9, 1]]), 0.0),
    ):
        precision = AveragePrecision(2)
        precision.add(found, truth)
        assert precision.result()[0] == pytest.approx(expected, abs=1e-6)


# ---- scores


@pytest.mark.parametrize("name", DENSE)
def test_the_shipped_networks_reach_what_is_said_and_agree_with_themselves(name: str) -> None:
    teacher = load_teacher(name)
    result = score(teacher.net, load_data(name, teacher))
    assert f"{100 * result.value:.2f} % on the {result.count} held out" in EMBEDDED[name].about
    images = teacher.normalise(draw_scenes(8, seed=5).images)
    same = agreement(teacher.net, teacher, images)
    assert same.share == pytest.approx(1.0) and same.kl == 0.0


def test_miou_by_hand() -> None:
    meter = Segment(3).scored()
    raw = F.one_hot(torch.tensor([[[0, 1], [1, 0]]]), 3).permute(0, 3, 1, 2).float()
    meter.add(raw, torch.tensor([[[0, 1], [0, 255]]]))
    result = meter.result()  # class 0: 1 of 2, class 1: 1 of 2, class 2 never
    assert result.value == pytest.approx(0.5) and result.extra["pixel_accuracy"] == pytest.approx(2 / 3)


def test_float_scores_of_real_teachers(shared: Shared) -> None:
    file = shared / "teachers/nets.py"
    teacher = load_teacher(
        f"{file}:camvid_cgnet", weights=shared / "teachers/camvid_cgnet.safetensors", task="segment",
        image=(3, 360, 480), mean=(0.41434607, 0.40521503, 0.39068394), std=1 / 255,
    )  # fmt: skip
    found = score(teacher.net, load_data(f"camvid:{shared / 'data/camvid'}[:2]", teacher))
    assert found.metric == "miou" and found.extra["pixel_accuracy"] is not None and found.extra["pixel_accuracy"] > 0.8


# ---- readers


def segmenter() -> nn.Module:
    return nn.Conv2d(3, 2, 1)


def test_camvid_folder_and_its_first_bad_file(tmp_path: Path) -> None:
    teacher = make_teacher(segmenter(), Facts("segment", image=(3, 4, 4), mean=(0.0,), std=(1.0,)), name="net")
    for folder in ("test", "testannot"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"test/{name}.png")
        Image.fromarray(np.full((8, 8), 2, np.uint8)).save(tmp_path / f"testannot/{name}.png")
    data = load_data(f"camvid:{tmp_path}[1:]", teacher)
    (images, masks), = data.batches(4)
    assert images.shape == (1, 3, 4, 4) and masks.unique().tolist() == [255] and len(data.sha256) == 64
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "testannot/b.png")
    with pytest.raises(BadInput, match=r"mask .*b.png: expected numbers from 0 to 1, or 2 for none, got 7"):
        load_data(f"camvid:{tmp_path}", teacher)
    (tmp_path / "testannot/a.png").unlink()
    with pytest.raises(BadInput, match=r"a.png: expected its mask"):
        load_data(f"camvid:{tmp_path}", teacher)
    check_disjoint(f"camvid:{tmp_path}[:1]", f"camvid:{tmp_path}[1:]")
    with pytest.raises(BadInput, match="common ones"):
        check_disjoint(f"camvid:{tmp_path}", f"camvid:{tmp_path}[1:]")


def test_yolo_coco_and_voc_say_the_same(tmp_path: Path) -> None:
    teacher = make_teacher(nn.Conv2d(3, 2, 1), Facts("detect", 2, (3, 4, 4), (0.0,), (1.0,)), name="net")
    for folder in ("images", "labels", "JPEGImages", "Annotations", "annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("images", "JPEGImages"):
        Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / folder / "a.jpg")
    (tmp_path / "labels/a.txt").write_text("1 0.5 0.5 0.5 1.0\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\n")
    (tmp_path / "Annotations/a.xml").write_text(
        "<annotation><size><width>20</width><height>10</height></size><object><name>dog</name><bndbox><xmin>6</xmin>"
        "<ymin>1</ymin><xmax>15</xmax><ymax>10</ymax></bndbox></object></annotation>"
    )
    table = {"images": [{"id": 9, "file_name": "a.jpg", "width": 20, "height": 10}],
             "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
             "annotations": [{"image_id": 9, "category_id": 8, "bbox": [5, 0, 10, 10]}]}  # fmt: skip
    (tmp_path / "annotations/instances_mine.json").write_text(json.dumps(table))
    for kind in ("yolo", "coco", "voc"):
        (_, truth), = load_data(f"{kind}:{tmp_path}", teacher).batches(2)
        assert truth[0].classes.tolist() == [1], kind
        assert truth[0].corners.tolist()[0] == pytest.approx([0.25, 0.0, 0.75, 1.0]), kind
    (tmp_path / "labels/a.txt").write_text("1 0.5 0.5 0.5 1.0\n2 0 0 1 1\n")
    with pytest.raises(BadInput, match=r"a.txt, line 2: expected class \(0 to 1\)"):
        load_data(f"yolo:{tmp_path}", teacher)
    (tmp_path / "Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(BadInput, match=r"a.xml: expected an annotation"):
        load_data(f"voc:{tmp_path}", teacher)
    (tmp_path / "annotations/instances_mine.json").write_text("{}")
    with pytest.raises(BadInput, match=r"instances_mine.json: .*got no key"):
        load_data(f"coco:{tmp_path}", teacher)


def test_a_set_for_another_task_is_refused() -> None:
    with pytest.raises(BadInput, match="expected a network whose task is to segment"):
        load_data("shapes-segment", load_teacher("shapes-detect"))


# ---- whole runs


@pytest.mark.parametrize("name", DENSE)
def test_recipes_run_where_no_class_is_needed_and_say_so_elsewhere(zsq: Command, name: str) -> None:
    short = ["--json", "--batch", 4, "--warmup", 2, "--synthetic", "32x32", "--bits", 8, "--eval", name]
    pool = ["--count", 16, "--iterations", 2, "--group", 16]
    said = zsq("quantize", name, "--recipe", "zeroq", *pool, *short, "--run", "first")
    assert said.code == 0, said.err
    images = ["--images", "first/pool.safetensors"]
    said = zsq("quantize", name, "--recipe", "ait", *images, "--steps", 2, *short, "--run", "run")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert summary["metric"] in ("miou", "map50") and summary["synthetic"] == [32, 32]
    assert 0 <= summary["agreement"] <= 1 and 0 <= summary["student_score"] <= 1
    said = zsq("quantize", name, "--recipe", "gdfq", "--json", "--run", "other")
    assert said.code == 2 and "--base zeroq" in said.err and not Path("other").exists()


def test_a_run_is_found_from_another_folder(
    zsq: Command, folder: Folder, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    weights = ["mine.py:net", "--weights", "net.safetensors"]
    short = ["--recipe", "ait", "--steps", 1, "--warmup", 1, "--batch", 8]
    assert zsq("quantize", *weights, *short, "--run", "run").code == 0
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    said = zsq("evaluate", folder.path / "run", "--json")
    assert said.code == 0, said.err


def test_a_size_the_network_does_not_take(zsq: Command) -> None:
    said = zsq("quantize", "shapes-segment", "--recipe", "zeroq", "--synthetic", "30x30", "--run", "run")
    assert said.code == 2 and "--synthetic 30x30" in said.err
