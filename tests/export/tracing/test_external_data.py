"""A network over 2 GiB has one file of weights beside it, under the same seal; here the limit is lowered."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config, write_checkpoint
from vit_edge.errors import ModelRejected, NotTrusted, UsageError
from vit_edge.export import ExportOptions, export_onnx, quantize
from vit_edge.export.tracing import external_data
from vit_edge.export.tracing.network import reference_logits
from vit_edge.model_file.artifact import open_model, pack
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.model_file.weights import weights_entry
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

ENGINES = ("onnxruntime", "openvino")
IMAGES = golden_images(range(5), height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_checkpoint(folder / "c.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "_MOST_INSIDE_BYTES", 10_000)
        result = export_onnx(folder / "c.safetensors", out=folder / "m.onnx")
        export_onnx(folder / "c.safetensors", out=folder / "m.xml", options=ExportOptions(format="openvino"))
    sizes = [(folder / name).stat().st_size for name in ("m.onnx", "m.onnx.data")]
    assert result.size_bytes == sum(sizes)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for name in ("m.onnx", "m.onnx.data"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("engine", ENGINES)
def test_both_files_together_are_the_network(
    copy: Path, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # engines given bytes look in the current folder
    Path("m.onnx.data").write_bytes(b"\1" * (copy / "m.onnx.data").stat().st_size)
    expected = reference_logits(random_network(small_config()), PREPROCESSING)(IMAGES)
    with load(copy / "m.onnx", engine=engine) as classifier:  # type: ignore[arg-type]
        np.testing.assert_allclose(classifier.logits(IMAGES), expected, atol=1e-4)


def test_the_onnx_package_reads_both_files(copy: Path) -> None:
    onnx.checker.check_model(copy / "m.onnx", full_check=True)
    assert (copy / "m.onnx").stat().st_size < (copy / "m.onnx.data").stat().st_size


def test_the_ir_of_such_a_network_holds_its_weights(folder: Path) -> None:
    assert len(open_ir(folder / "m.xml").weights) > (folder / "m.onnx.data").stat().st_size * 0.9


def test_a_file_that_is_not_the_one_sealed_is_refused(copy: Path) -> None:
    data = bytearray((copy / "m.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "m.onnx.data").write_bytes(data)
    with pytest.raises(NotTrusted, match=r"m\.onnx\.data is not the file that was sealed"):
        load(copy / "m.onnx")
    (copy / "m.onnx.data").unlink()
    with pytest.raises(ModelRejected, match="there is no such file"):
        load(copy / "m.onnx")
    with pytest.raises(ModelRejected, match="which was not given"):
        load((copy / "m.onnx").read_bytes())


def test_links_are_followed_because_the_hash_decides(folder: Path, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).symlink_to(folder / name)
    load(tmp_path / "m.onnx").close()


@pytest.mark.parametrize(
    "name", ["../m.onnx.data", "/etc/passwd", "a/b", "C:x", "..", ".hidden", "", "*/_ORT_MEM_ADDR_/*"]
)
def test_only_a_plain_name_beside_the_file_is_read(copy: Path, name: str) -> None:
    model = open_model(copy / "m.onnx")
    weights = model.weights or b""
    with pytest.raises(ValueError, match="not in a file of the same folder"):
        replace(model.manifest, weights=weights_entry(name, weights))


@pytest.mark.parametrize(
    ("key", "value"), [("location", "other.data"), ("offset", "99999999999"), ("length", "4"), ("offset", "-4")]
)
def test_a_tensor_that_points_elsewhere_is_refused(copy: Path, key: str, value: str) -> None:
    model = open_model(copy / "m.onnx")
    proto = onnx.load_model_from_string(model.data)
    del proto.metadata_props[:]
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    (copy / "m.onnx").write_bytes(pack(proto.SerializeToString(), model.manifest))
    with pytest.raises(ModelRejected, match="lies in another file"):
        load(copy / "m.onnx")


def test_quantization_says_that_it_needs_one_file(copy: Path) -> None:
    with pytest.raises(UsageError, match="weights are in a second file"):
        quantize(copy / "m.onnx", calibration=copy, out=copy / "q.onnx")
