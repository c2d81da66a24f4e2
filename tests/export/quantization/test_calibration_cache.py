"""A calibration goes on where it was stopped, with the same result, and no damage to the cache changes one."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.support.calibrating import IMAGES, inputs_of_ops, small_graph, start_child
from tests.support.networks import SIZE
from vit_edge.export.graph.intermediate_tensors import Activations
from vit_edge.export.quantization.algorithms.reparameterisation import find_norms
from vit_edge.export.quantization.calibration import observers
from vit_edge.export.quantization.calibration.cache import CalibrationCache, default_folder
from vit_edge.export.quantization.calibration.observers import (
    METHODS,
    observe_channels,
    observe_histograms,
    observe_ranges,
)
from vit_edge.files import sha256_hex
from vit_edge.image import Preprocessing


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


class Stopping:
    """Images that raise `error` before image `at`; `passes` counts how often they were begun."""

    def __init__(self, images: Sequence[np.ndarray], at: int, error: BaseException) -> None:
        self.images, self.at, self.error, self.passes = images, at, error, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.passes += 1
        yield from self.images[: self.at]
        raise self.error


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every image that the network runs."""
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
    method: observers.Method,
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


def test_another_model_preprocessing_or_image_is_another_calibration(
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


def test_a_killed_calibration_goes_on_to_the_same_ranges(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, saved_graph: Path, runs: list[int]
) -> None:
    process = start_child(saved_graph, tensors, tmp_path, stop=13)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL
    found = observe_ranges(graph, tensors, IMAGES, method="entropy", cache=CalibrationCache(folder=tmp_path))
    assert len(runs) == len(IMAGES) - 12  # three batches of four were kept
    assert found == observe_ranges(graph, tensors, IMAGES, method="entropy")


def test_two_processes_share_a_cache_without_harm(
    graph: onnx.ModelProto, tensors: list[str], tmp_path: Path, saved_graph: Path
) -> None:
    both = [start_child(saved_graph, tensors, tmp_path) for _ in range(2)]
    expected = str(observe_ranges(graph, tensors, IMAGES, method="entropy"))
    assert [process.communicate()[0].split("|")[0] for process in both] == [expected, expected]
    assert len(list(tmp_path.iterdir())) == 1
