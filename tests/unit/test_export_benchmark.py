"""The benchmark: turns, warm-up, medians, both files in one runtime, and what it says about itself."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from unit import onnx_files
from zsq.errors import BadInput
from zsq.export import benchmark
from zsq.export.words import in_words

IMAGE = (3, 16, 16)


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_smaller_file_is_faster_and_smaller(tmp_path: Path, runtime: str) -> None:
    small = onnx_files.convolution(tmp_path / "small.onnx", 4, image=IMAGE)
    large = onnx_files.convolution(tmp_path / "large.onnx", 256, image=IMAGE)
    result = benchmark.measure(small, large, runtime, batches=(1, 8), seconds=0.1)
    for batch in (1, 8):
        ours, theirs = result[f"latency_ms_batch{batch}"], result[f"latency_ms_float_batch{batch}"]
        assert result[f"speedup_batch{batch}"] == theirs / ours
        busy, floats = result[f"cpu_ms_batch{batch}"], result[f"cpu_ms_float_batch{batch}"]
        assert result[f"speedup_cpu_batch{batch}"] == floats / busy > 1
        assert 0 <= result[f"waited_batch{batch}"] < 1
        assert result[f"calls_batch{batch}"] >= benchmark.ROUNDS
        assert (f"latency_ms_float_bf16_batch{batch}" in result) == (runtime == "openvino")
    assert result["speedup_cpu_batch8"] > 1.5  # processor time: tests share the machine
    assert result["size_ratio"] == large.stat().st_size / small.stat().st_size > 3
    assert result["threads"] == 1 and result["cpu"] and result["vnni"] in (True, False, None)
    assert result["runtime"].split()[0] == {"ort": "onnxruntime", "openvino": "openvino"}[runtime]


def test_the_same_file_is_as_fast_as_itself(tmp_path: Path) -> None:
    path = onnx_files.convolution(tmp_path / "net.onnx", 64, image=IMAGE)
    result = benchmark.measure(path, path, "ort", batches=(4,), seconds=0.3)
    assert 0.5 < result["speedup_batch4"] < 2 and result["size_ratio"] == 1


def test_several_threads_have_no_processor_time_of_one(tmp_path: Path) -> None:
    path = onnx_files.convolution(tmp_path / "net.onnx", 64, image=IMAGE)
    result = benchmark.measure(path, path, "ort", batches=(2,), seconds=0.05, threads=2)
    assert result["speedup_batch2"] > 0
    assert result["speedup_cpu_batch2"] is result["cpu_ms_batch2"] is result["waited_batch2"] is None


def test_turns_are_shared_and_the_first_calls_do_not_count() -> None:
    calls: list[str] = []

    def first() -> None:
        calls.append("a")
        time.sleep(0.5 if calls.count("a") == 1 else 0.002)

    def second() -> None:
        calls.append("b")
        time.sleep(0.004)

    times = benchmark.interleave({"a": first, "b": second}, seconds=0.15)
    assert max(times["a"].wall) < 0.5  # the slow first call is not among them
    for name, least in (("a", 0.002), ("b", 0.004)):
        assert min(times[name].wall) >= least and len(times[name].wall) < calls.count(name)
        assert max(times[name].cpu) < least  # sleeping takes no processor
    # In turns, not one after the other; in either order.
    changes = [(x, y) for x, y in itertools.pairwise(calls) if x != y]
    assert len(changes) >= benchmark.ROUNDS and set(changes) == {("a", "b"), ("b", "a")}
    assert 0.1 < sum(times["a"].wall) / sum(times["b"].wall) < 10


def test_long_calls_still_get_their_turns() -> None:
    times = benchmark.interleave({"a": lambda: time.sleep(0.01), "b": lambda: time.sleep(0.01)}, seconds=0)
    assert all(len(own.wall) == len(own.cpu) >= benchmark.ROUNDS for own in times.values())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    net = onnx_files.convolution(tmp_path / "net.onnx", 4, image=IMAGE)
    fixed = onnx_files.convolution(tmp_path / "fixed.onnx", 4, image=IMAGE, batch=1)
    other = onnx_files.convolution(tmp_path / "other.onnx", 4, image=(3, 8, 8))
    with pytest.raises(BadInput, match="takes batches of 32, got batch 1"):
        benchmark.measure(net, fixed, "ort", batches=(32,), seconds=0)
    with pytest.raises(BadInput, match=r"same images, got \[3, 16, 16\] and \[3, 8, 8\]"):
        benchmark.measure(net, other, "ort", seconds=0)
    with pytest.raises(BadInput, match="no such file"):
        benchmark.measure(net, tmp_path / "absent.onnx", "ort")


def test_the_words_say_what_the_numbers_are() -> None:
    result = {"file": "m.onnx", "bytes": 2048, "size_ratio": 6.5, "runtime": "onnxruntime 1.32", "agreement": 0.9995,
              "images": 2000, "lsb_share": 0.0001, "max_lsb": 1, "integer_conv_share": 0.75, "convolutions": 4,
              "float_convolutions": ["a.b"], "operators": {"QLinearConv": 3, "Conv": 1}, "latency_ms_batch1": 2.0,
              "latency_ms_float_batch1": 5.0, "speedup_batch1": 2.5, "speedup_cpu_batch1": 3.0, "waited_batch1": 0.25,
              "threads": 1, "cpu": "some", "vnni": False}  # fmt: skip
    words = in_words(result)
    assert words["same decisions"].startswith("99.95 % of those of the student, on 2,000 images")
    assert words["codes, site by site"].startswith("1 step apart at most, 0.0100 % differ")
    assert words["convolutions on integers"] == "3 of 4" and words["in float"] == "a.b"
    assert words["latency, batch 1"] == (
        "2.00 ms, float 5.00 ms: 2.50 times as fast; on a busy machine, 25 % of the time was waiting: "
        "by processor time 3.00 times as fast"
    )
    assert "no 8-bit multiply-add" in words["measured on"]
    quiet = in_words(result | {"waited_batch1": 0.01, "vnni": True, "latency_ms_bf16_batch1": 2.0,
                               "latency_ms_float_bf16_batch1": 3.0})  # fmt: skip
    assert quiet["latency, batch 1"].endswith("2.50 times as fast (bf16 where float: 2.00 ms, float 3.00 ms)")
    assert quiet["measured on"] == "some, 1 thread; medians, both files in turns"
