"""Quantizers go where they belong in every network of the zoo, and change nothing else."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import partial
from typing import Any

import pytest
import torch
from tests.zoo import CASES, build, tensors
from torch import Tensor, nn

import zsq.quantizer
from zsq.errors import BadInput
from zsq.insert import (
    QuantSpec,
    activation_quantizers,
    codes_and_latents,
    freeze_ranges,
    observe_ranges,
    quantize,
    quantized_weights,
    without_quantizers,
)  # fmt: skip
from zsq.quantizer import LiveMinMax, RunningMinMax

PLACEMENTS = ("paper", "deploy")


def gap(a: object, b: object) -> float:
    """Largest relative L2 distance between the tensors of two results."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return max(float((x - y).detach().norm() / x.detach().norm()) for x, y in pairs)


def calibrated(name: str, placement: str, bits: int = 8) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...], Any]:
    net, inputs = build(name)
    student, report = quantize(net, QuantSpec(bits, bits, placement=placement))
    with torch.no_grad():
        student(*inputs)
    freeze_ranges(student)
    return net, student, inputs, report


# ---- the zoo


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_counts(name: str, placement: str) -> None:
    net, _ = build(name)
    _, report = quantize(net, QuantSpec(placement=placement))
    case = CASES[name]
    assert len(report.weights) == case.weights
    assert len(report.sites) == (case.paper if placement == "paper" else case.deploy), str(report)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_eight_bits_are_close_and_none_are_exact(name: str, placement: str) -> None:
    net, student, inputs, _ = calibrated(name, placement)
    with torch.no_grad():
        want, got = net(*inputs), student(*inputs)
        with without_quantizers(student):
            with without_quantizers(student):
                pass
            exact = student(*inputs)
        again = student(*inputs)
    assert 1e-5 < gap(want, got) < 0.08
    assert gap(got, again) == 0
    # Folding a BatchNorm reorders float operations; nothing else may differ.
    assert gap(want, exact) == 0 if placement == "paper" else gap(want, exact) < 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_student_trains_and_the_model_is_untouched(name: str, placement: str) -> None:
    net, inputs = build(name)
    net.requires_grad_(False)
    next(net.children()).train()
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    classes = [type(m) for m in net.modules()]
    student, _ = quantize(net, QuantSpec(placement=placement))
    assert not student.training
    assert not set(before) - set(student.state_dict())
    assert all(p.requires_grad for p in student.parameters())

    sum(t.square().mean() for t in tensors(student(*inputs))).backward()
    gradients = [w.parameter.grad for w in quantized_weights(student)]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert [type(m) for m in net.modules()] == classes
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_deep_copy_shares_nothing(name: str, placement: str) -> None:
    _, student, inputs, _ = calibrated(name, placement)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        want = student(*inputs)
        assert gap(want, twin(*inputs)) == 0
        mine = {id(p) for p in (*student.parameters(), *student.buffers())} | {id(m) for m in student.modules()}
        assert not mine & ({id(p) for p in (*twin.parameters(), *twin.buffers())} | {id(m) for m in twin.modules()})
        assert list(twin.state_dict()) == list(student.state_dict())
        for p in (*twin.parameters(), *twin.buffers()):
            if p.is_floating_point():
                p.mul_(1.5)
        assert gap(want, twin(*inputs)) > 0.01
        assert gap(want, student(*inputs)) == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_latent_grids_give_the_codes_the_layers_use(name: str, placement: str) -> None:
    net, inputs = build(name)
    student, _ = quantize(net, QuantSpec(4, 4, placement=placement))
    seen: dict[int, Tensor] = {}

    def watch(quantizer: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        seen[id(quantizer)] = quantizer.codes(args[0])  # type: ignore[operator]

    paths = {place: m.weight_path for place, m in student.named_modules() if hasattr(m, "weight_path")}
    for path in paths.values():
        path.quantizer.register_forward_hook(watch)
    with torch.no_grad():
        student(*inputs)
    codes = codes_and_latents(student)
    modules = dict(student.named_modules())
    for weight in quantized_weights(student):
        assert weight.bits == 4 or placement == "deploy"
        layer = modules.get(weight.name)
        path = layer.weight_path if layer is not None else next(p for p in paths.values() if p.parameter == weight.name)
        used = seen[id(path.quantizer)].reshape(weight.parameter.shape)
        # A tie may fall differently in the other coordinates.
        different = used != codes[f"{weight.name}.codes"]
        assert different.float().mean() < 0.02
        assert torch.equal(codes[f"{weight.name}.latent"], weight.parameter)
        assert weight.grid(weight.parameter * 2).inv_step.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_deploy_is_on_the_grid(name: str) -> None:
    """Every input of a layer, and the bias, consists of whole steps."""
    _, student, inputs, report = calibrated(name, "deploy", bits=4)
    float_biases = {row.name.removesuffix(".bias") for row in report.floats if row.name.endswith(".bias")}
    checked = []

    def watch(path: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor | None]) -> None:
        x, weight, bias, site = args
        source = path.sources[site]
        folded, _ = path.fold(weight, bias)
        grid, own = source.grid(x), path.quantizer.grid(folded)
        steps = x * grid.inv_step
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert own.zero.eq(0).all()
        torch.testing.assert_close(result[0] * own.inv_step, (result[0] * own.inv_step).round(), atol=1e-3, rtol=0)
        if result[1] is not None:
            units = own.inv_step.flatten() * grid.inv_step.flatten()
            units = units.repeat(path.transposed_groups) if path.transposed_groups else units
            torch.testing.assert_close(result[1] * units, (result[1] * units).round(), atol=1e-2, rtol=1e-5)
        checked.append(path)

    for module in student.modules():
        if hasattr(module, "weight_path"):
            module.weight_path.register_forward_hook(watch)
    with torch.no_grad():
        student(*inputs)
    assert not float_biases
    assert len({id(path) for path in checked}) == len(report.weights)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["own forward", "inverted residual", "mlp"])
def test_under_autocast(name: str, placement: str) -> None:
    _, student, inputs, _ = calibrated(name, placement)
    kinds = []
    for quantizer in activation_quantizers(student).values():
        quantizer.register_forward_hook(lambda module, args, result: kinds.append(result.dtype))
    want = student(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = student(*inputs)
    assert set(kinds) == {torch.float32}
    assert gap(want, got) < 0.15
    sum(t.float().sum() for t in tensors(got)).backward()
    assert all(w.parameter.grad.dtype == torch.float32 for w in quantized_weights(student))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CASES)
def test_state_round_trip(name: str, placement: str) -> None:
    net, student, inputs, _ = calibrated(name, placement)
    fresh, _ = quantize(net, QuantSpec(8, 8, placement=placement))
    fresh.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert gap(student(*inputs), fresh(*inputs)) == 0
        one = tuple(x[:1] for x in inputs)  # any batch size
        assert gap(student(*one), fresh(*one)) == 0


# ---- facts known from elsewhere


def test_resnet20_is_counted_as_published() -> None:
    net, _ = build("resnet20")
    student, report = quantize(net)
    assert (len(report.weights), len(report.sites), report.quantized_values) == (22, 19, 270_896)
    assert sum(w.parameter.numel() for w in quantized_weights(student)) == 270_896
    assert all(w.bits == 4 and w.axis == 0 and not w.symmetric for w in report.weights)


SHARED_NETS = {  # input, weights, paper sites, tolerance
    "cifar10_resnet20_a": ((3, 32, 32), 20, 19, 0.05),
    "cifar100_resnet20_p": ((3, 32, 32), 23, 13, 0.05),
    "imagenet_mobilenetv1_x025": ((3, 64, 64), 28, 27, 0.75),  # one range per tensor does not suit it
    "camvid_cgnet": ((3, 64, 64), 126, 78, 0.25),
    "coco_fastestdet": ((3, 64, 64), 70, 48, 0.1),
}


@pytest.mark.parametrize("name", SHARED_NETS)
def test_networks_of_others(name: str, shared: Any) -> None:
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("shared_nets", shared / "teachers/nets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = getattr(module, name)()
    state = load_file(shared / f"teachers/{name}.safetensors")
    tiny = torch.finfo(torch.float32).tiny  # denormal weights make a CPU crawl
    net.load_state_dict({k: v.where(v.abs() >= tiny, 0) if v.is_floating_point() else v for k, v in state.items()})
    size, weights, sites, tolerance = SHARED_NETS[name]
    x = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8), size[1:], mode="bicubic")
    x = (x - 0.5) * 200 if "camvid" in name else x
    with torch.no_grad():
        want = net.eval()(x)
        for placement in PLACEMENTS:
            student, report = quantize(net, QuantSpec(8, 8, placement=placement))
            assert gap(want, student(x)) < tolerance
            with without_quantizers(student):
                assert gap(want, student(x)) <= (0 if placement == "paper" else 1e-4)
            assert not set(state) - set(student.state_dict())
            assert len(report.weights) == weights
            assert placement == "deploy" or len(report.sites) == sites


# ---- what stays float is said


def reasons(name: str, placement: str) -> dict[str, str]:
    net, _ = build(name)
    return {row.name: row.why for row in quantize(net, QuantSpec(placement=placement))[1].floats}


def test_floats_of_the_paper_placement() -> None:
    net, _ = build("resnet20")
    _, report = quantize(net)
    rows = [(row.name, row.op) for row in report.floats]
    assert ("init.0", "conv2d") in rows  # the network's input
    assert sum(op == "add" for _, op in rows) == 9
    assert ("21 BatchNorm calls", "batch_norm2d") in rows
    assert ("output.bias", "linear") in rows
    assert rows.count(("output", "linear")) == 2  # reads an average, returns logits
    assert len(rows) == 1 + 9 + 1 + 1 + 2
    assert "head" in reasons("concat", "deploy") or "bn" in reasons("concat", "deploy")


def test_deploy_leaves_no_float_but_detached_norms() -> None:
    assert reasons("resnet20", "deploy") == {}
    assert set(reasons("fused", "deploy")) == {"lstm"}
    assert set(reasons("concat", "deploy")) == {"bn", "act"}  # the BatchNorm and the slopes of the PReLU
    assert set(reasons("dense", "deploy")) == {"norms.0", "norms.1", "norms.2"}


class ImageBesideFeatures(nn.Module):
    """As in CGNet: pixels of hundreds and features of hundredths meet, and a BatchNorm gives them one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.head = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn(torch.cat([self.conv(x / 100) / 100, x], 1))))


def test_what_a_batch_norm_scales_apart_keeps_grids_of_its_own() -> None:
    """One 8-bit grid for both would leave the features less than one step."""
    net, x = ImageBesideFeatures(), 300 * torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        for _ in range(50):
            net.train()(x)
        student, report = quantize(net.eval(), QuantSpec(8, 8, "deploy"))
        assert gap(net(x), student(x)) < 0.02
    names = [site.name for site in report.sites]
    assert "cat" not in names and "bn" not in names and "act" in names


def test_unreached_modules_are_listed_and_kept() -> None:
    why = reasons("dict output", "paper")
    assert why["auxiliary.0"] == "not reached by the forward"
    net, _ = build("dict output")
    student, _ = quantize(net)
    assert torch.equal(student.get_parameter("auxiliary.0.weight"), net.get_parameter("auxiliary.0.weight"))


def test_attention_and_embeddings_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attention = nn.Embedding(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc, self.position = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 4, 8))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens) + self.position
            x = x + self.attention(x, x, x)[0]
            return torch.relu(self.fc(x))

    net, tokens = Net().eval(), torch.tensor([[0, 1, 2, 3]])
    for placement in PLACEMENTS:
        student, report = quantize(net, QuantSpec(8, 8, placement=placement))
        assert [w.name for w in report.weights] == ["fc"]
        names = " ".join(f"{row.name}: {row.why}" for row in report.floats)
        for word in ("attention: no quantizer covers in_proj_weight", "attention.out_proj", "table", "position"):
            assert word in names
        with torch.no_grad():
            assert gap(net(tokens), student(tokens)) < 0.05


def test_reports_print_and_serialise() -> None:
    net, _ = build("inverted residual")
    _, report = quantize(net, QuantSpec(placement="deploy"))
    text = str(report)
    assert "6 quantized weights" in text and "expand.0" in text and "8x3x1x1" in text and "hardsigmoid" in text
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["weights"][0] == {"name": "expand.0", "shape": [8, 3, 1, 1], "bits": 8, "axis": 0, "symmetric": True}
    assert len(plain["sites"]) == len(report.sites)


# ---- bits and choices


def test_edges_of_deploy_have_eight_bits() -> None:
    net, _ = build("resnet20")
    _, report = quantize(net, QuantSpec(4, 3, placement="deploy"))
    assert {w.name for w in report.weights if w.bits == 8} == {"init.0", "output"}
    assert {s.name for s in report.sites if s.bits == 8} == {"input", "pool", "output.out"}
    assert {w.bits for w in report.weights} == {4, 8} and {s.bits for s in report.sites} == {3, 8}
    _, report = quantize(net, QuantSpec(4, 4, placement="deploy", edge_bits=6, layer_bits={"init.0": 5, "input": 7}))
    assert report.weights[0].bits == 5 and report.sites[0].bits == 7
    assert report.weights[-1].bits == 6


def test_patterns_choose() -> None:
    net, _ = build("resnet20")
    spec = QuantSpec(exclude=("init.*", "output"), layer_bits={"units.*": 5, "units.0.body.0": 8, "*.activ": 3})
    student, report = quantize(net, spec)
    assert len(report.weights) == 20 and len(report.sites) == 18
    assert {w.name: w.bits for w in report.weights}["units.0.body.0"] == 8
    assert {s.name: s.bits for s in report.sites}["units.3.activ"] == 3
    assert {s.name: s.bits for s in report.sites}["units.3.body.2"] == 5
    assert {"init.0", "init.2", "output"} <= {f.name for f in report.floats if "excluded" in f.why}
    assert not isinstance(student.get_submodule("init.0"), type(student.get_submodule("units.0.body.0")))
    _, report = quantize(net, QuantSpec(include=("units.0.*",)))
    assert len(report.weights) == 2 and len(report.sites) == 2


def test_range_rules_are_the_users() -> None:
    net, _ = build("functional relu")
    spec = QuantSpec(weight=partial(LiveMinMax, symmetric=True), act=partial(RunningMinMax, momentum=0.5))
    student, report = quantize(net, spec)
    assert all(w.symmetric for w in report.weights)
    assert all(q.momentum == 0.5 for q in activation_quantizers(student).values())  # type: ignore[attr-defined]
    again = QuantSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.to_json() == spec.to_json()
    assert again.act(4).momentum == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", ["RunningMinMax", "Percentile", "MseRange", "LearnedStep"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_range_rule(rule: str, placement: str) -> None:
    net, inputs = build("own forward")
    kind = getattr(zsq.quantizer, rule)
    student, _ = quantize(net, QuantSpec(8, 8, placement=placement, weight=kind, act=kind))
    with torch.no_grad():
        student(*inputs)
        freeze_ranges(student)
        assert gap(net(*inputs), student(*inputs)) < 0.1
    assert all(w.grid().inv_step.isfinite().all() for w in quantized_weights(student))


def test_freezing_and_observing() -> None:
    _, student, inputs, _ = calibrated("adds", "deploy")
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with torch.no_grad():
        student(*(x * 3 for x in inputs))
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    observe_ranges(student)
    with torch.no_grad():
        student(*(x * 3 for x in inputs))
    assert any(not torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert next(iter(activation_quantizers(student))) == "input"


# ---- refusals


def refusal(model: nn.Module, spec: QuantSpec | None = None) -> str:
    with pytest.raises(BadInput) as error:
        quantize(model, spec)
    return str(error.value)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        if y.mean() > 0:  # the line to name
            y = y * 2
        return y


def test_an_untraceable_network_names_the_line_and_the_way_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Branching())
    text = refusal(net)
    for word in ("if y.mean() > 0:", "test_insert.py", "'2' (Branching)", "--leaf 2", "line "):
        assert word in text
    assert "Rewrite the line" in refusal(Branching())

    student, report = quantize(net.eval(), QuantSpec(8, 8, leaf=("2",)))
    assert [w.name for w in report.weights] == ["0", "2.conv"]
    assert [s.name for s in report.sites] == ["1"]
    kept = [row.name for row in report.floats if "kept whole" in row.why]
    assert kept == ["2", "2.act"]
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert 0 < gap(net(x), student(x)) < 0.05


def test_nothing_to_quantize_is_refused() -> None:
    assert "ReLU family" in refusal(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)))
    assert "at least one convolution or linear layer" in refusal(nn.Sequential(nn.ReLU()))
    assert "none selected" in refusal(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), QuantSpec(exclude=("1",)))
    assert "lazy" in refusal(nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU()))
    student, _ = quantize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert "a student" in refusal(student)
    assert "a torch.nn.Module" in refusal(print)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["include", "exclude", "leaf"])
def test_a_pattern_that_matches_nothing_names_its_neighbours(field: str) -> None:
    net, _ = build("resnet20")
    assert "units.0" in refusal(net, QuantSpec(**{field: ("unit.0.*",)}))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="list of patterns"):
        QuantSpec(**{field: "unit"})  # type: ignore[arg-type]


def test_misspelt_layer_bits_and_values() -> None:
    net, _ = build("resnet20")
    assert "output" in refusal(net, QuantSpec(layer_bits={"ouput": 8}))
    values = ({"weight_bits": 9}, {"act_bits": 1}, {"layer_bits": {"*": 0}}, {"placement": "x"}, {"weight": nn.ReLU})
    for wrong in values:
        with pytest.raises(BadInput):
            QuantSpec(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="keys of QuantSpec"):
        QuantSpec.from_json({"weight_bit": 4})
    with pytest.raises(BadInput):
        QuantSpec.from_json({"weight": {"rule": "nn.ReLU"}})
    with pytest.raises(BadInput, match="network with quantizers"):
        quantized_weights(net)


def test_an_optional_argument_keeps_its_default() -> None:
    _, student, inputs, _ = calibrated("dict output", "paper")
    assert isinstance(student(*inputs)["features"], tuple)
    with pytest.raises(BadInput, match="labels"):
        student(*inputs, torch.ones(()))


def test_hooks_stay_with_the_model() -> None:
    net, inputs = build("adds")
    calls = []
    net.conv0.register_forward_hook(lambda *_: calls.append(1))
    student, report = quantize(net)
    student(*inputs)
    assert not calls and "conv0 (1)" in report.notes[0] and "hooks" in str(report)
    net(*inputs)
    assert calls == [1]


def test_a_student_is_not_pickled() -> None:
    student, _ = quantize(build("mlp")[0])
    with pytest.raises(TypeError, match="state_dict"):
        student.__reduce__()
