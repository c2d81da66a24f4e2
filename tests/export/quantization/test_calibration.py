"""Calibration is streamed, the same for any batch, and takes any classifier's graph."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import ROOT
from tests.support.calibrating import IMAGES, inputs_of_ops, small_graph, start_child
from tests.support.networks import PREPROCESSING
from vit_edge.data import find_images, pixel_hashes
from vit_edge.errors import DataRejected, ModelRejected, UsageError
from vit_edge.export.graph.intermediate_tensors import Activations
from vit_edge.export.quantization.algorithms.reparameterisation import find_norms
from vit_edge.export.quantization.calibration import observers
from vit_edge.export.quantization.calibration.cache import CalibrationCache
from vit_edge.export.quantization.calibration.histograms import (
    BINS,
    Histogram,
    entropy_range,
    mse_range,
    percentile_range,
)
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.calibration.observers import (
    METHODS,
    Range,
    observe_channels,
    observe_ranges,
    range_of,
)
from vit_edge.model_file.artifact import Manifest

MANIFEST = Manifest(
    name="small", architecture={}, preprocessing=PREPROCESSING, labels=("a", "b"), precision="float32", provenance={}
)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return small_graph()


@pytest.fixture(scope="module")
def tensors(graph: onnx.ModelProto) -> list[str]:
    return inputs_of_ops(graph)


@pytest.fixture(scope="module")
def saved_graph(graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    onnx.save(graph, path)
    return path


def values_of(graph: onnx.ModelProto, names: Sequence[str], image: np.ndarray) -> list[np.ndarray]:
    """Return the tensors of one image, asked of the engine itself."""
    asked = onnx.ModelProto.FromString(graph.SerializeToString())
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(asked.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(list(names), {session.get_inputs()[0].name: image[None]})
    return found


def classifier(
    nodes: Sequence[onnx.NodeProto], *, shape: Sequence[int | str], **weights: np.ndarray
) -> onnx.ModelProto:
    """Return a graph from float32 `x` to `y`."""
    value = helper.make_tensor_value_info
    inputs, outputs = [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, None)]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(
        helper.make_graph(nodes, "graph", inputs, outputs, constants), opset_imports=opset, ir_version=8
    )


def random_images(count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_changes_no_bit_of_the_ranges(
    graph: onnx.ModelProto, tensors: list[str], method: observers.Method
) -> None:
    alone = observe_ranges(graph, tensors, IMAGES, method=method)
    assert len(alone) == len(set(tensors)) > 5
    assert all(r.low <= 0 <= r.high and r.low < r.high for r in alone.values())
    for batch_size in (2, 16, 100):
        assert observe_ranges(graph, tensors, iter(IMAGES), method=method, batch_size=batch_size) == alone


def test_sixteen_images_do_run_at_once(graph: onnx.ModelProto, tensors: list[str]) -> None:
    activations = Activations(graph, tensors)
    found = [list(values) for start in (0, 16) for values in activations.of(IMAGES[start : start + 16])]
    assert activations.num_at_once == 16
    for image, values in zip(IMAGES, found, strict=True):
        expected = values_of(graph, tensors, image)
        assert all(np.array_equal(a, b) for a, b in zip(expected, values, strict=True))


def test_ranges_are_the_mean_or_the_overall_extremes_of_the_images(graph: onnx.ModelProto, tensors: list[str]) -> None:
    values = [values_of(graph, tensors, image) for image in IMAGES]
    averaged, overall = (observe_ranges(graph, tensors, IMAGES, method=m) for m in ("moving-average", "min-max"))  # type: ignore[arg-type]
    for position, name in enumerate(tensors):
        lows, highs = ([float(end(v[position])) for v in values] for end in (np.min, np.max))
        assert averaged[name] == Range(low=min(sum(lows) / len(lows), 0), high=max(sum(highs) / len(highs), 0))
        assert overall[name] == Range(low=min(*lows, 0), high=max(*highs, 0))


def test_channels_have_ranges_of_their_own_along_any_axis(graph: onnx.ModelProto) -> None:
    norms = find_norms(graph)
    values = [values_of(graph, norms, image) for image in IMAGES]
    for batch_size in (1, 16):
        averaged = observe_channels(graph, norms, IMAGES, batch_size=batch_size)
        overall = observe_channels(graph, norms, IMAGES, method="min-max", batch_size=batch_size)
        tokens = observe_channels(graph, norms, IMAGES, method="min-max", axis=1, batch_size=batch_size)
        for position, name in enumerate(norms):
            lows = np.array([v[position].reshape(-1, 24).min(axis=0) for v in values], np.float64)
            assert np.allclose(averaged[name].low_D, lows.mean(axis=0), rtol=1e-12)
            assert np.array_equal(overall[name].low_D, lows.min(axis=0))
            assert np.array_equal(tokens[name].high_D, np.max([v[position].max(axis=(0, 2)) for v in values], axis=0))


def test_what_the_graph_takes_itself_has_a_range_too() -> None:
    model = classifier([helper.make_node("Relu", ["x"], ["y"], name="relu")], shape=["batch", 3, 4, 4])
    images = random_images(20, 3, 4, 4)
    ranges = observe_ranges(model, ["x", "y"], images, method="min-max", batch_size=16)
    assert ranges["x"] == Range(low=float(np.min(images)), high=float(np.max(images)))
    assert ranges["y"] == Range(low=0.0, high=float(np.max(images)))


def test_a_graph_that_mixes_the_images_of_a_batch_is_calibrated_one_by_one() -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1)
    nodes = [mean, helper.make_node("Sub", ["x", "m"], ["d"]), helper.make_node("Add", ["d", "x"], ["y"])]
    model, images = classifier(nodes, shape=["batch", 6]), random_images(40, 6)
    alone = observe_ranges(model, ["d", "y"], images)
    assert alone["d"] == Range(low=0.0, high=0.0)
    assert observe_ranges(model, ["d", "y"], images, batch_size=16) == alone


@pytest.mark.parametrize("num_tokens", [5, 16, 32])
def test_tensors_whose_first_axis_is_not_the_batch_are_divided_by_image(num_tokens: int) -> None:
    turned = helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])  # [tokens, batch, channels]
    rows = helper.make_node("Reshape", ["x", "s"], ["w"])  # [batch x tokens, channels]
    nodes = [turned, rows, helper.make_node("Relu", ["x"], ["y"])]
    model = classifier(nodes, shape=["batch", num_tokens, 3], s=np.array([-1, 3]))
    images = random_images(35, num_tokens, 3)
    alone = observe_channels(model, ["t", "w", "x", "y"], images)
    for batch_size in (2, 16):
        found = observe_channels(model, ["t", "w", "x", "y"], images, batch_size=batch_size)
        assert all(np.array_equal(alone[name].low_D, found[name].low_D) for name in alone)
    assert np.array_equal(alone["t"].low_D, alone["x"].low_D)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("fixed", [1, 4])
def test_a_batch_fixed_in_the_graph_is_respected(fixed: int, inside: bool) -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("Relu", ["r"], ["y"])]
    shape = np.array([fixed if inside else -1, 12])
    model, images = classifier(nodes, shape=[fixed, 3, 4], s=shape), random_images(10, 3, 4)
    low, high = (np.mean([end(image) for image in images], dtype=np.float64) for end in (np.min, np.max))
    for batch_size in (1, 3):
        found = observe_ranges(model, ["r"], images, batch_size=batch_size)["r"]
        assert found.low == pytest.approx(low, rel=1e-12)
        assert found.high == pytest.approx(high, rel=1e-12)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    model = classifier([helper.make_node("Log", ["x"], ["y"])], shape=["batch", 4])
    images = [np.ones(4, np.float32), -np.ones(4, np.float32)]
    for method in METHODS:
        with pytest.raises(ModelRejected, match="image 2 the tensor 'y' holds values that are not finite"):
            observe_ranges(model, ["y"], images, method=method)


def test_what_cannot_be_done_is_refused(graph: onnx.ModelProto, tensors: list[str]) -> None:
    for options in ({"method": "median"}, {"batch_size": 0}, {"percentile": 20.0}, {"levels": 1}):
        with pytest.raises(UsageError):
            observe_ranges(graph, tensors, IMAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="moving-average"):
        range_of(Histogram(), "moving-average")
    with pytest.raises(DataRejected, match="no calibration images"):
        observe_ranges(graph, tensors, [])
    with pytest.raises(ModelRejected, match="cannot load"):
        observe_ranges(graph, ["nothing"], IMAGES)
    with pytest.raises(TypeError, match="more than once"):
        observe_ranges(graph, tensors, iter(IMAGES), cache=CalibrationCache(folder=Path("unused")))


# Histograms

VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


@given(VALUES, st.integers(0, 40), st.randoms(use_true_random=False))
def test_a_histogram_is_that_of_its_values_in_any_order_and_division(
    values: list[float], cut: int, random: Any
) -> None:
    whole, divided = Histogram(), Histogram()
    whole.add(np.array(values, np.float32))
    random.shuffle(values)
    for part in filter(None, (values[:cut], values[cut:])):
        divided.add(np.array(part, np.float32))
    assert all(np.array_equal(value, divided.state()[key]) for key, value in whole.state().items())
    assert np.array_equal(whole.counts, np.histogram(np.array(values, np.float32), whole.edges)[0])
    assert len(whole.counts) <= BINS
    assert whole.edges[0] <= min(values)
    assert max(values) < whole.edges[-1]


def test_a_histogram_has_many_bins_for_each_step_of_eight_bits() -> None:
    for high in (0.3, 1.0, 17.0, 4095.9, 1e30):
        histogram = Histogram()
        histogram.add(np.linspace(-high / 10, high, 1000, dtype=np.float32))
        assert BINS // 2 <= len(histogram.counts) <= BINS


def normal_with_an_outlier() -> Histogram:
    histogram = Histogram()
    histogram.add(np.random.default_rng(0).normal(size=3_000_000).astype(np.float32))
    histogram.add(np.array([60.0], np.float32))
    return histogram


def test_a_percentile_leaves_half_of_the_rest_on_each_side() -> None:
    histogram = Histogram()
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    histogram.add(values)
    for percentile in (90.0, 99.0, 99.9):
        low, high = percentile_range(histogram, percentile)
        expected = np.percentile(values, [(100 - percentile) / 2, (100 + percentile) / 2])
        assert np.allclose([low, high], expected, atol=4 * histogram.width)
    assert percentile_range(histogram, 100) == (histogram.low, histogram.high) == (values.min(), values.max())


def test_entropy_and_mse_leave_a_far_outlier_out_and_keep_what_is_even() -> None:
    for choose in (entropy_range, mse_range):
        low, high = choose(normal_with_an_outlier(), 255)
        assert 2 < high < 20
        assert -6 < low < -2
        even = Histogram()
        even.add(np.linspace(-1, 3, 100_000, dtype=np.float32))
        assert np.allclose(choose(even, 255), (-1, 3), atol=0.05)


def test_mse_is_as_small_as_any_range_tried_by_hand() -> None:
    values = np.random.default_rng(1).standard_t(4, size=50_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        return float(np.mean(((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale - values) ** 2))

    reaches = np.linspace(2, np.abs(values).max(), 60)
    best = min(error(max(-r, values.min()), min(r, values.max())) for r in reaches)
    assert error(*mse_range(histogram, 255)) <= 1.01 * best


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_constant_tensor_has_a_range(value: float) -> None:
    histogram = Histogram()
    histogram.add(np.full(100, value, np.float32))
    for method in ("percentile", "entropy", "mse", "min-max"):
        found = range_of(histogram, method)  # type: ignore[arg-type]
        assert (found.low, found.high) == pytest.approx((min(value, 0), max(value, 0)), rel=1e-2)


def test_memory_does_not_grow_with_the_images(saved_graph: Path, tensors: list[str]) -> None:
    children = [start_child(saved_graph, tensors, "", method="mse", count=count) for count in (20, 600)]
    few, many = (int(process.communicate()[0].split("|")[1]) for process in children)
    assert many <= 1.10 * few


def test_corrupt_images_are_skipped_named_and_refused_past_one_percent(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = find_images(ROOT / "calibration_data")[:110]
    for number, path in enumerate(good):
        shutil.copy(path, tmp_path / f"{number:03}.png")
    bad = tmp_path / "050x.png"
    bad.write_bytes(good[0].read_bytes()[:60])
    seen: list[tuple[str, int, int]] = []
    images = CalibrationImages(find_images(tmp_path), MANIFEST, progress=lambda *told: seen.append(told))
    with caplog.at_level(logging.WARNING):
        found = observe_ranges(graph, tensors, images, batch_size=16)
    assert "1 of 111 images were skipped" in caplog.text
    assert "050x.png" in caplog.text
    assert len(images.hashes) == len(good)
    assert seen[-1] == ("calibrating", 111, 111)
    bad.unlink()
    assert observe_ranges(graph, tensors, CalibrationImages(find_images(tmp_path), MANIFEST)) == found
    for number in range(2):
        (tmp_path / f"bad{number}.png").write_bytes(b"no image")
    with pytest.raises(DataRejected, match=r"2 or more of 112 images cannot be used, over 1 %.*bad0\.png"):
        observe_ranges(graph, tensors, CalibrationImages(find_images(tmp_path), MANIFEST))


def test_a_image_that_judges_is_refused(tmp_path: Path) -> None:
    paths = find_images(ROOT / "calibration_data")[:5]
    judging = pixel_hashes(paths[3:4], PREPROCESSING)
    images_ = CalibrationImages(paths, MANIFEST, judging=judging)
    with pytest.raises(DataRejected, match=paths[3].name):
        list(itertools.chain(images_))
