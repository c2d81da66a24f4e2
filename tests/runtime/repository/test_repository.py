"""Each server gets a repository that its own format accepts, with the model as it was sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.model_file.artifact import open_model
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.repository.builder import SERVERS, Repository, write_repository
from vit_edge.runtime.tuned_configuration import TunedConfiguration, save_configuration

# Options of a model in config.json of OpenVINO Model Server 2025 that a repository uses, and their types:
# https://docs.openvino.ai/2025/model-server/ovms_docs_parameters.html
OVMS_OPTIONS: dict[str, type] = {
    "name": str, "base_path": str, "target_device": str, "nireq": int, "plugin_config": dict, "batch_size": str,
    "shape": str, "layout": str, "model_version_policy": dict,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what other tests tuned out of these."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def triton_config() -> Any:
    """Return what parses Triton's configuration with the schema that its own client brings."""
    reason = "tritonclient[grpc] is not installed: its schema of config.pbtxt is missing"
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=reason)
    from google.protobuf import text_format

    return lambda path: text_format.Parse(path.read_text(), schema.ModelConfig())


def exported(folder: Path, **options: Any) -> Path:
    """Return a small network exported with these options; only these tests wait for torch."""
    from tests.support.networks import write_checkpoint
    from vit_edge.export import ExportOptions, export_onnx

    checkpoint = write_checkpoint(folder / "c.safetensors")
    export_onnx(checkpoint, out=folder / "m.onnx", options=ExportOptions(**options))
    return folder / "m.onnx"


def written(model: Path, folder: Path, server: Any, **options: Any) -> Repository:
    return write_repository(model, server=server, out=folder, **options)


@pytest.mark.parametrize("server", SERVERS)
def test_a_repository_holds_the_model_unchanged_and_what_clients_need(
    small_model: Path, tmp_path: Path, server: Any
) -> None:
    made = written(small_model / "m.onnx", tmp_path / "new" / "r", server)
    found = {path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()}
    assert found == {*made.files}
    (model,) = made.path.rglob("model.onnx")
    assert model.read_bytes() == (small_model / "m.onnx").read_bytes()
    manifest = open_model(model).manifest
    client = made.path / "client"
    assert (client / "labels.txt").read_text().splitlines() == list(manifest.labels)
    assert json.loads((client / "preprocessing.json").read_text()) == manifest.preprocessing.to_dict()
    assert (client / "manifest.json").read_text() == f"{manifest.to_json()}\n"
    assert (made.name, made.is_tuned, made.is_checked, made.threads) == ("small", False, True, 1)


def test_tritons_own_schema_reads_the_configuration(small_model: Path, tmp_path: Path, triton_config: Any) -> None:
    made = written(small_model / "m.onnx", tmp_path / "r", "triton", instances=3, threads=2)
    config = triton_config(made.path / "models" / "small" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("small", "onnxruntime", 64)
    (images,), (logits,), (group,) = config.input, config.output, config.instance_group
    assert (images.name, images.data_type, list(images.dims)) == ("images", config.input[0].data_type, [24, 16, 3])
    assert (
        images.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[images.data_type].name == "TYPE_UINT8"
    )
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [7], "labels.txt")
    assert (group.count, config.parameters["intra_op_thread_count"].string_value) == (3, "2")
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    (warm,) = config.model_warmup
    assert warm.inputs["images"].input_data_file == "golden"


def test_triton_warms_up_with_the_first_golden_input(small_model: Path, tmp_path: Path) -> None:
    made = written(small_model / "m.onnx", tmp_path / "r", "triton")
    manifest = open_model(small_model / "m.onnx").manifest
    assert manifest.golden is not None
    sent = np.frombuffer((made.path / "models" / "small" / "warmup" / "golden").read_bytes(), np.uint8)
    expected = golden_images(manifest.golden["seeds"][:1], height=24, width=16)
    np.testing.assert_array_equal(sent.reshape(expected.shape), expected)


def test_what_tune_measured_decides_threads_instances_and_delay(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vit_edge.runtime.repository.served_model.usable_threads", lambda: 8)
    best = TunedConfiguration(engine="openvino", threads=2, p50_ms=3.0)
    assert save_configuration(open_model(small_model / "m.onnx"), best)
    made = written(small_model / "m.onnx", tmp_path / "r", "triton")
    assert (made.engine, made.threads, made.instances, made.is_tuned) == ("openvino", 2, 4, True)
    config = (made.path / "models" / "small" / "config.pbtxt").read_text()
    assert 'backend: "openvino"' in config
    assert "max_queue_delay_microseconds: 1500" in config
    assert written(small_model / "m.onnx", tmp_path / "r", "triton", force=True, threads=1).instances == 8


def test_float32_input_is_declared_as_the_graph_takes_it(tmp_path: Path, triton_config: Any) -> None:
    made = written(exported(tmp_path, input="float32-nchw"), tmp_path / "r", "triton")
    (images,) = triton_config(made.path / "models" / "small" / "config.pbtxt").input
    assert list(images.dims) == [3, 24, 16]
    assert (made.path / "models" / "small" / "warmup" / "golden").stat().st_size == 4 * 3 * 24 * 16


def test_the_configuration_of_openvino_model_server_has_documented_options(small_model: Path, tmp_path: Path) -> None:
    made = written(small_model / "m.xml", tmp_path / "r", "openvino-model-server", instances=2)
    (entry,) = json.loads((made.path / "config.json").read_text())["model_config_list"]
    config = entry["config"]
    assert {key: type(value) for key, value in config.items()}.items() <= OVMS_OPTIONS.items()
    assert config["plugin_config"] == {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 2,
        "NUM_STREAMS": "2",
    }
    version = made.path / config["base_path"] / "1"
    assert open_ir(version / "model.xml").sha256 == open_ir(small_model / "m.xml").sha256


def test_kserve_gets_the_repository_of_triton_and_a_service(small_model: Path, tmp_path: Path) -> None:
    made = written(small_model / "m.onnx", tmp_path / "r", "kserve", storage_uri="s3://bucket/models", threads=2)
    service = yaml.safe_load((made.path / "inferenceservice.yaml").read_text())
    model = service["spec"]["predictor"]["model"]
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert (model["storageUri"], model["protocolVersion"]) == ("s3://bucket/models", "v2")
    assert model["resources"]["requests"] == model["resources"]["limits"]
    assert float(model["resources"]["limits"]["cpu"]) == made.instances * made.threads
    assert "models/small/config.pbtxt" in made.files


def test_ray_serve_finds_the_model_that_its_configuration_names(small_model: Path, tmp_path: Path) -> None:
    made = written(small_model / "m.onnx", tmp_path / "r", "ray-serve", instances=2)
    (application,) = yaml.safe_load((made.path / "serve_config.yaml").read_text())["applications"]
    assert (made.path / application["args"]["model"]).is_file()
    assert application["args"]["workers"] == 2
    module, _, function = application["import_path"].partition(":")
    assert f"def {function}(" in (made.path / f"{module}.py").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"server": "torchserve"}, "the server is 'torchserve'"),
        ({"server": "triton", "instances": 0}, "instances is 0"),
        ({"server": "triton", "storage_uri": "s3://x"}, "triton has no storage URI"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    small_model: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        write_repository(small_model / "m.onnx", out=tmp_path / "r", **options)
    assert not (tmp_path / "r" / "models").exists()


def test_a_file_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    model = exported(tmp_path, batch_size=2)
    with pytest.raises(ModelRejected, match="fixed batch size of 2"):
        written(model, tmp_path / "r", "triton")
    assert not (tmp_path / "r").exists()


def test_a_server_that_has_only_another_engine_is_refused(small_model: Path, tmp_path: Path) -> None:
    model = open_model(small_model / "m.onnx")
    golden = json.loads(model.manifest.to_json())
    for entry in golden["golden"]["expected"]:
        entry["engines"] = [name for name in entry["engines"] if name != "openvino"]
    only_ort = tmp_path / "m.onnx"
    only_ort.write_bytes(model.with_manifest(type(model.manifest).from_json(json.dumps(golden))))
    with pytest.raises(ModelRejected, match="validated in onnxruntime; this server runs openvino"):
        written(only_ort, tmp_path / "r", "openvino-model-server")


def test_files_of_another_kind_in_the_folder_stay(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        written(small_model / "m.onnx", tmp_path / "r", "triton")
    written(small_model / "m.onnx", tmp_path / "r", "triton", force=True)
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"
