"""ONNX classifiers as exporters of others write them: weights beside the file, free axes, float16, integers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.export.onnx_import.test_importer import CONV, HEAD, LABELS, PREPROCESSING, WEIGHTS, network, node, save
from vit_edge.errors import ModelRejected, UsageError
from vit_edge.runtime import Classifier, installed_engines, load
from vit_edge.runtime.checks.golden import golden_images

IMAGES = golden_images(range(5), height=12, width=10)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))


def loaded(source: Path | bytes, engine: Any = "onnxruntime") -> Classifier:
    return load(source, engine=engine, preprocessing=PREPROCESSING, labels=LABELS, threads=1)


def expected() -> np.ndarray[Any, Any]:
    """Return the logits that numpy computes for the network of these tests."""
    pixels = PREPROCESSING.normalise(IMAGES)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
    pooled = np.einsum("bchwij,ocij->bohw", windows, WEIGHTS["filters"]).clip(min=0).mean(axis=(2, 3))
    return pooled @ WEIGHTS["w"].T + WEIGHTS["b"]


def free_axes() -> onnx.ModelProto:
    """All four axes have a name, as Optimum writes them."""
    return network(*CONV, *HEAD, shape=["batch_size", "num_channels", "height", "width"], **WEIGHTS)


def channels_last_behind_a_transpose() -> onnx.ModelProto:
    turn = node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])
    return network(turn, node("Conv", ["t", "filters"], ["c"]), *CONV[1:], *HEAD, shape=["n", "h", "w", "c"], **WEIGHTS)


def float16() -> onnx.ModelProto:
    halves = {name: values.astype(np.float16) for name, values in WEIGHTS.items()}
    model = network(*CONV, *HEAD, dtype=TensorProto.FLOAT16, **halves)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 5]))
    return model


def dynamic_integers() -> onnx.ModelProto:
    """What `quantize_dynamic` makes of a convolution."""
    scale = np.abs(WEIGHTS["filters"]).max() / 127
    integers = (WEIGHTS["filters"] / scale).round().astype(np.int8)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("ConvInteger", ["q", "i", "z"], ["sum"]),
        node("Cast", ["sum"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["s", "scale"], ["both"]),
        node("Mul", ["floats", "both"], ["c"]),
    ]
    rest = {name: values for name, values in WEIGHTS.items() if name != "filters"}
    return network(*nodes, *CONV[1:], *HEAD, i=integers, scale=np.float32(scale), **rest)


KINDS: dict[Callable[[], onnx.ModelProto], tuple[str, float]] = {
    free_axes: ("float32", 1e-4),
    channels_last_behind_a_transpose: ("float32", 1e-4),
    float16: ("float16", 0.02),
    dynamic_integers: ("int8", 0.2),
}


@pytest.mark.parametrize("engine", installed_engines())
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_the_shape_does_not_show_the_graph_does(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], engine: str
) -> None:
    precision, tolerance = KINDS[make]
    with loaded(save(tmp_path / "theirs.onnx", make()), engine) as classifier:
        np.testing.assert_allclose(classifier.logits(IMAGES), expected(), atol=tolerance)
        assert (classifier.describe()["precision"], classifier.describe()["verified"]) == (precision, "probe")


def test_axes_that_nothing_shows_are_asked_for(tmp_path: Path) -> None:
    flat = [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w"], ["y"], transB=1)]
    model = network(*flat, shape=["n", "a", "b", "c"], w=np.ones((5, 360), np.float32))
    with pytest.raises(UsageError, match=r"(?s)does not show whether the 3 channels come first or last.*--layout NCHW"):
        loaded(save(tmp_path / "theirs.onnx", model))


# Weights beside the file


def beside(folder: Path, *, one_file: bool = True) -> Path:
    """Write the network as `torch.onnx.export` does by default: its weights in a file of their own, or one for each."""
    path = folder / "theirs.onnx"
    model = network(*CONV, *HEAD, **WEIGHTS)
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=one_file, location="theirs.onnx.data"
              if one_file else None, size_threshold=0)  # fmt: skip
    return path


@pytest.mark.parametrize("one_file", [True, False])
def test_weights_beside_the_file_are_read_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_file: bool
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = beside(tmp_path / "model", one_file=one_file)
    monkeypatch.chdir(tmp_path / "elsewhere")  # engines would look for them here
    for engine in installed_engines():
        with loaded(path, engine) as classifier:
            np.testing.assert_allclose(classifier.logits(IMAGES), expected(), atol=1e-4)
            assert len(classifier.manifest.provenance["source_weights_sha256"]) == (1 if one_file else 3)
    with pytest.raises(ModelRejected, match="which bytes cannot name"):
        loaded(path.read_bytes())


def test_a_cache_of_a_hub_is_read_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    beside(tmp_path / "blobs")
    (tmp_path / "blobs" / "theirs.onnx").rename(tmp_path / "blobs" / "0a1b")
    (tmp_path / "blobs" / "theirs.onnx.data").rename(tmp_path / "blobs" / "2c3d")
    (tmp_path / "snapshot" / "theirs.onnx").symlink_to("../blobs/0a1b")
    (tmp_path / "snapshot" / "theirs.onnx.data").symlink_to("../blobs/2c3d")
    with loaded(tmp_path / "snapshot" / "theirs.onnx") as classifier:
        np.testing.assert_allclose(classifier.logits(IMAGES), expected(), atol=1e-4)


def told(path: Path, **values: str) -> None:
    """Change what the file says of where its first tensor lies."""
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = values.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())


def linked(path: Path, make: Callable[[Path, Path], None]) -> None:
    """Put the weights outside, and a link to them in their place."""
    weights, outside = path.with_name("theirs.onnx.data"), path.parent.parent / "outside"
    weights.rename(outside)
    make(outside, weights)


DANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "fault 16, above": (lambda path: told(path, location="../theirs.onnx.data"), "not in a file next to the model"),
    "fault 16, absolute": (lambda path: told(path, location="/etc/passwd"), "not in a file next to the model"),
    "fault 16, below and above": (lambda path: told(path, location="sub/../../x"), "not in a file next to the model"),
    "fault 16, hidden": (lambda path: told(path, location=".hidden"), "not in a file next to the model"),
    "fault 16, a folder": (
        lambda path: (told(path, location="sub"), (path.parent / "sub").mkdir()),
        "the path is a folder",
    ),
    "fault 16, a device": (
        lambda path: linked(path, lambda _, link: link.symlink_to("/dev/zero")),
        "a link to another folder",
    ),
    "fault 16, a pipe": (
        lambda path: (told(path, location="pipe"), os.mkfifo(path.parent / "pipe")),
        "not a regular file",
    ),
    "fault 16, a link": (
        lambda path: linked(path, lambda outside, link: link.symlink_to(outside)),
        "a link to another folder",
    ),
    "fault 16, missing": (lambda path: path.with_name("theirs.onnx.data").unlink(), "no such file"),
    "fault 16, short": (lambda path: os.truncate(path.with_name("theirs.onnx.data"), 100), "does not hold the tensor"),
    "fault 16, a negative offset": (lambda path: told(path, offset="-4"), "does not hold the tensor"),
    "fault 16, a huge offset": (lambda path: told(path, offset=str(2**62)), "does not hold the tensor"),
    "fault 16, another length": (lambda path: told(path, length="8"), "does not hold the tensor"),
    "fault 17, a hard link": (lambda path: linked(path, os.link), "a hard link"),
    "fault 18": (lambda path: told(path, location="*/_ORT_MEM_ADDR_/*"), "not in a file next to the model"),
}


@pytest.mark.parametrize("kind", DANGERS)
def test_weights_that_are_not_what_and_where_they_should_be_are_refused(tmp_path: Path, kind: str) -> None:
    make, reason = DANGERS[kind]
    (tmp_path / "model").mkdir()
    path = beside(tmp_path / "model")
    make(path)
    with pytest.raises(ModelRejected, match=reason) as caught:
        loaded(path)
    assert str(path.parent) in str(caught.value)


def test_a_constant_that_lies_outside_is_refused(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(WEIGHTS["filters"], "filters")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    rest = {name: values for name, values in WEIGHTS.items() if name != "filters"}
    model = network(node("Constant", [], ["filters"], value=tensor), *CONV, *HEAD, **rest)
    (tmp_path / "theirs.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelRejected, match="lies in another file"):
        loaded(tmp_path / "theirs.onnx")
