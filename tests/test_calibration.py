"""Calibration is streamed, the same for any batch, goes on where it was stopped, and takes any classifier's graph."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
from tests.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.artifact import Manifest
from vit_edge.data import find_images, pixel_hashes
from vit_edge.errors import DataRejected, ModelRejected, UsageError
from vit_edge.export import calibration
from vit_edge.export.activations import Activations
from vit_edge.export.calibration import METHODS, Range, observe_channels, observe_histograms, observe_ranges, range_of
from vit_edge.export.calibration_cache import CalibrationCache, default_folder
from vit_edge.export.histograms import BINS, Histogram, entropy_range, mse_range, percentile_range
from vit_edge.export.pictures import CalibrationPictures
from vit_edge.export.placement import find_products
from vit_edge.export.algorithms.reparameterisation import find_norms
from vit_edge.export.tracing import trace
from vit_edge.files import sha256_hex
from vit_edge.image import Preprocessing
from vit_edge.runtime.golden import golden_images

MANIFEST = Manifest(
    name="small", architecture={}, preprocessing=PREPROCESSING, labels=("a", "b"), precision="float32", provenance={}
)
IMAGES = list(golden_images(range(21), height=SIZE[0], width=SIZE[1]))


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """Return the graph of a small ViT that takes pixels."""
    from vit_edge.export.deploy import DeployedViT

    network = DeployedViT(random_network(small_config()), PREPROCESSING, pixels=True, extras=[]).eval()
    return trace(network, height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def tensors(graph: onnx.ModelProto) -> list[str]:
    return [product.input for product in find_products(graph) if not product.takes_pixels]


def values_of(graph: onnx.ModelProto, names: Sequence[str], image: np.ndarray) -> list[np.ndarray]:
    """Return the tensors of one picture, asked of the engine itself."""
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


def pictures(count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_changes_no_bit_of_the_ranges(
    graph: onnx.ModelProto, tensors: list[str], method: calibration.Method
) -> None:
    alone = observe_ranges(graph, tensors, IMAGES, method=method)
    assert len(alone) == len(set(tensors)) > 5
    assert all(r.low <= 0 <= r.high and r.low < r.high for r in alone.values())
    for batch_size in (2, 16, 100):
        assert observe_ranges(graph, tensors, iter(IMAGES), method=method, batch_size=batch_size) == alone


def test_sixteen_pictures_do_run_at_once(graph: onnx.ModelProto, tensors: list[str]) -> None:
    activations = Activations(graph, tensors)
    found = [list(values) for start in (0, 16) for values in activations.of(IMAGES[start : start + 16])]
    assert activations.num_at_once == 16
    for image, values in zip(IMAGES, found, strict=True):
        expected = values_of(graph, tensors, image)
        assert all(np.array_equal(a, b) for a, b in zip(expected, values, strict=True))


def test_ranges_are_the_mean_or_the_overall_extremes_of_the_pictures(
    graph: onnx.ModelProto, tensors: list[str]
) -> None:
    values = [values_of(graph, tensors, image) for image in IMAGES]
    averaged, overall = (observe_ranges(graph, tensors, IMAGES, method=m) for m in ("averaged min-max", "min-max"))  # type: ignore[arg-type]
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
    images = pictures(20, 3, 4, 4)
    ranges = observe_ranges(model, ["x", "y"], images, method="min-max", batch_size=16)
    assert ranges["x"] == Range(low=float(np.min(images)), high=float(np.max(images)))
    assert ranges["y"] == Range(low=0.0, high=float(np.max(images)))


def test_a_graph_that_mixes_the_pictures_of_a_batch_is_calibrated_one_by_one() -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1)
    nodes = [mean, helper.make_node("Sub", ["x", "m"], ["d"]), helper.make_node("Add", ["d", "x"], ["y"])]
    model, images = classifier(nodes, shape=["batch", 6]), pictures(40, 6)
    alone = observe_ranges(model, ["d", "y"], images)
    assert alone["d"] == Range(low=0.0, high=0.0)
    assert observe_ranges(model, ["d", "y"], images, batch_size=16) == alone


@pytest.mark.parametrize("num_tokens", [5, 16, 32])
def test_tensors_whose_first_axis_is_not_the_batch_are_divided_by_picture(num_tokens: int) -> None:
    turned = helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])  # [tokens, batch, channels]
    rows = helper.make_node("Reshape", ["x", "s"], ["w"])  # [batch x tokens, channels]
    nodes = [turned, rows, helper.make_node("Relu", ["x"], ["y"])]
    model = classifier(nodes, shape=["batch", num_tokens, 3], s=np.array([-1, 3]))
    images = pictures(35, num_tokens, 3)
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
    model, images = classifier(nodes, shape=[fixed, 3, 4], s=shape), pictures(10, 3, 4)
    low, high = (np.mean([end(image) for image in images], dtype=np.float64) for end in (np.min, np.max))
    for batch_size in (1, 3):
        found = observe_ranges(model, ["r"], images, batch_size=batch_size)["r"]
        assert found.low == pytest.approx(low, rel=1e-12)
        assert found.high == pytest.approx(high, rel=1e-12)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    model = classifier([helper.make_node("Log", ["x"], ["y"])], shape=["batch", 4])
    images = [np.ones(4, np.float32), -np.ones(4, np.float32)]
    for method in METHODS:
        with pytest.raises(ModelRejected, match="picture 2 the tensor 'y' holds values that are not finite"):
            observe_ranges(model, ["y"], images, method=method)


def test_what_cannot_be_done_is_refused(graph: onnx.ModelProto, tensors: list[str]) -> None:
    for options in ({"method": "median"}, {"batch_size": 0}, {"percentile": 20.0}, {"levels": 1}):
        with pytest.raises(UsageError):
            observe_ranges(graph, tensors, IMAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="averaged"):
        range_of(Histogram(), "averaged min-max")
    with pytest.raises(DataRejected, match="no picture"):
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


# The cache


class Stopping:
    """Pictures that raise `error` before picture `at`; `passes` counts how often they were begun."""

    def __init__(self, images: Sequence[np.ndarray], at: int, error: BaseException) -> None:
        self.images, self.at, self.error, self.passes = images, at, error, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.passes += 1
        yield from self.images[: self.at]
        raise self.error


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every picture that the network runs."""
    counted: list[int] = []
    real = Activations.of

    def of(self: Activations, images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        counted.extend(range(len(images)))
        return real(self, images)

    monkeypatch.setattr(Activations, "of", of)
    return counted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_interrupted_calibration_goes_on_to_the_same_ranges(
    graph: onnx.ModelProto,
    tensors: list[str],
    method: calibration.Method,
    batch_size: int,
    tmp_path: Path,
    runs: list[int],
) -> None:
    cache = CalibrationCache(folder=tmp_path / "new" / "cache")
    expected = observe_ranges(graph, tensors, IMAGES, method=method)
    runs.clear()
    stopping = Stopping(IMAGES, 12, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        observe_ranges(graph, tensors, stopping, method=method, batch_size=batch_size, cache=cache)
    assert len(runs) == 12
    assert observe_ranges(graph, tensors, IMAGES, method=method, batch_size=batch_size, cache=cache) == expected
    assert len(runs) == len(IMAGES)
    assert observe_ranges(graph, tensors, IMAGES, method=method, cache=cache) == expected  # whole: nothing is run
    assert len(runs) == len(IMAGES)


def test_channels_are_kept_too_and_methods_share_what_they_can(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, runs: list[int]
) -> None:
    cache = CalibrationCache(folder=tmp_path)
    norms = find_norms(graph)
    first = observe_channels(graph, norms, IMAGES, cache=cache)
    again = observe_channels(graph, norms, IMAGES, cache=cache)
    assert all(np.array_equal(first[name].high_D, again[name].high_D) for name in norms)
    assert len(runs) == len(IMAGES)
    for method in METHODS:
        observe_ranges(graph, tensors, IMAGES, method=method, cache=cache)
    observe_histograms(graph, tensors, IMAGES, cache=cache)
    assert len(runs) == 3 * len(IMAGES)  # channels, extremes, histograms


def test_another_model_preprocessing_or_picture_is_another_calibration(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, runs: list[int]
) -> None:
    def observed(model: onnx.ModelProto, images: Sequence[np.ndarray], **how: Any) -> Any:
        runs.clear()
        return observe_ranges(model, tensors, images, cache=CalibrationCache(folder=tmp_path, **how))

    observed(graph, IMAGES)
    other = onnx.ModelProto.FromString(graph.SerializeToString())
    weight = next(tensor for tensor in other.graph.initializer if len(tensor.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    other_preprocessing = Preprocessing(resize=SIZE, crop=SIZE, interpolation="nearest")
    changed = [*IMAGES[:5], 255 - IMAGES[5], *IMAGES[6:]]
    for model, images, how in (
        (other, IMAGES, {}),
        (graph, IMAGES, {"preprocessing": other_preprocessing}),
        (graph, IMAGES[1:], {}),
        (graph, changed, {}),
        (graph, IMAGES[:4] + IMAGES[5:], {}),
        (graph, IMAGES[:7], {}),
    ):
        found = observed(model, images, **how)
        assert len(runs) == len(images)
        assert found == observe_ranges(model, tensors, images)
    assert observed(graph, IMAGES) == observe_ranges(graph, tensors, IMAGES)  # goes on after the 7 that it knows
    runs.clear()
    observed(graph, IMAGES)
    assert not runs


def _sealed(data: bytes) -> bytes:
    magic, _, body = data.split(b"\n", 2)
    return b"\n".join([magic, sha256_hex(body).encode(), body])


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "a flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a foreign file": lambda _: b"PK\x03\x04 something else",
    "text": lambda _: b"vit-edge calibration cache\n" + 64 * b"0" + b"\n{}",
    "another calibration's": lambda data: _sealed(data.replace(b'{"name": "', b'{"name": "f')),
    "counted wrongly": lambda data: _sealed(data.replace(b'"num_images": 21', b'"num_images": 20')),
    "other tensors": lambda data: _sealed(data.replace(b"0 counts", b"9 counts")),
    "impossible place": lambda data: _sealed(data.replace(b"0 place", b"0 plaza")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, runs: list[int], damage: str
) -> None:
    cache = CalibrationCache(folder=tmp_path)
    expected = observe_ranges(graph, tensors, IMAGES, method="mse", cache=cache)
    (entry,) = tmp_path.iterdir()
    data = entry.read_bytes()
    assert DAMAGES[damage](data) != data
    entry.write_bytes(DAMAGES[damage](data))
    runs.clear()
    assert observe_ranges(graph, tensors, IMAGES, method="mse", cache=cache) == expected
    assert len(runs) == len(IMAGES)
    assert entry.read_bytes() == data


def test_the_cache_holds_the_newest_32(graph: onnx.ModelProto, tensors: list[str], tmp_path: Path) -> None:
    cache = CalibrationCache(folder=tmp_path)
    for number in range(34):
        (tmp_path / f"{number}.calibration").write_bytes(b"old")
        os.utime(tmp_path / f"{number}.calibration", (number, number))
    observe_ranges(graph, tensors[:1], IMAGES[:1], cache=cache)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 32
    assert "0.calibration" not in names
    assert "33.calibration" in names


def test_a_cache_that_cannot_be_written_is_warned_of_and_done_without(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = CalibrationCache(folder=tmp_path / "file" / "folder", snapshot_s=0)
    with caplog.at_level(logging.WARNING):
        assert observe_ranges(graph, tensors, IMAGES, cache=cache) == observe_ranges(graph, tensors, IMAGES)
    assert caplog.text.count("not kept in the cache") == 1


def test_the_folder_is_told_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("VIT_EDGE_CACHE", raising=False)
    assert default_folder() == tmp_path / "xdg" / "vit-edge" / "calibration"
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "own"))
    assert default_folder() == CalibrationCache().folder == tmp_path / "own" / "calibration"
    monkeypatch.delenv("VIT_EDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "vit-edge" / "calibration"


# Calibrates on `count` pictures in a process of its own; says its ranges, or kills itself before picture `stop`.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np, onnx
from vit_edge.export.calibration import observe_ranges
from vit_edge.export.calibration_cache import CalibrationCache
from vit_edge.runtime.golden import golden_images
model, tensor, folder, method, count, stop = sys.argv[1:]

class Images:
    def __iter__(self):
        for number in range(int(count)):
            if number == int(stop):
                os.kill(os.getpid(), signal.SIGKILL)
            yield golden_images([number % 21], height=24, width=16)[0]

cache = CalibrationCache(folder=Path(folder), snapshot_s=0) if folder else None
found = observe_ranges(onnx.load(model), tensor.split(","), Images(), method=method, batch_size=4, cache=cache)
print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sep="|")
"""


@pytest.fixture(scope="module")
def child(graph: onnx.ModelProto, tensors: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    onnx.save(graph, path)

    def started(folder: str | Path, *, method: str = "entropy", count: int = 21, stop: int = -1) -> Any:
        arguments = [str(path), ",".join(tensors), str(folder), method, str(count), str(stop)]
        return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE)

    return started


def test_a_killed_calibration_goes_on_to_the_same_ranges(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, child: Any, runs: list[int]
) -> None:
    process = child(tmp_path, stop=13)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL
    found = observe_ranges(graph, tensors, IMAGES, method="entropy", cache=CalibrationCache(folder=tmp_path))
    assert len(runs) == len(IMAGES) - 12  # three batches of four were kept
    assert found == observe_ranges(graph, tensors, IMAGES, method="entropy")


def test_two_processes_share_a_cache_without_harm(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, child: Any
) -> None:
    both = [child(tmp_path) for _ in range(2)]
    expected = str(observe_ranges(graph, tensors, IMAGES, method="entropy"))
    assert [process.communicate()[0].split("|")[0] for process in both] == [expected, expected]
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_does_not_grow_with_the_pictures(child: Any) -> None:
    few, many = (int(child("", method="mse", count=count).communicate()[0].split("|")[1]) for count in (20, 600))
    assert many <= 1.10 * few


def test_corrupt_pictures_are_skipped_named_and_refused_past_one_percent(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = find_images(ROOT / "calibration_data")[:110]
    for number, path in enumerate(good):
        shutil.copy(path, tmp_path / f"{number:03}.png")
    bad = tmp_path / "050x.png"
    bad.write_bytes(good[0].read_bytes()[:60])
    seen: list[tuple[str, int, int]] = []
    images = CalibrationPictures(find_images(tmp_path), MANIFEST, progress=lambda *told: seen.append(told))
    with caplog.at_level(logging.WARNING):
        found = observe_ranges(graph, tensors, images, batch_size=16)
    assert "1 of 111 pictures were skipped" in caplog.text
    assert "050x.png" in caplog.text
    assert len(images.hashes) == len(good)
    assert seen[-1] == ("calibrating", 111, 111)
    bad.unlink()
    assert observe_ranges(graph, tensors, CalibrationPictures(find_images(tmp_path), MANIFEST)) == found
    for number in range(2):
        (tmp_path / f"bad{number}.png").write_bytes(b"no picture")
    with pytest.raises(DataRejected, match=r"2 or more of 112 pictures cannot be used, over 1 %.*bad0\.png"):
        observe_ranges(graph, tensors, CalibrationPictures(find_images(tmp_path), MANIFEST))


def test_a_picture_that_judges_is_refused(tmp_path: Path) -> None:
    paths = find_images(ROOT / "calibration_data")[:5]
    judging = pixel_hashes(paths[3:4], PREPROCESSING)
    pictures_ = CalibrationPictures(paths, MANIFEST, judging=judging)
    with pytest.raises(DataRejected, match=paths[3].name):
        list(itertools.chain(pictures_))
