"""float16 halves any float32 file, at 50 dB, with norms and softmax in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from tests.conftest import vit_edge
from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.errors import UsageError, VerificationFailed
from vit_edge.export import ExportOptions, QuantizationOptions, export_onnx, quantize
from vit_edge.export.tracing import external_data
from vit_edge.metrics import Logits, sqnr_db
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

_ENGINES = ("onnxruntime", "openvino")
_FLOAT16 = QuantizationOptions(precision="float16")


def _exported(folder: Path, network: nn.Module | None = None, **options: Any) -> Path:
    network = network or random_network(small_config())
    export_onnx(network, out=folder / "m.onnx", preprocessing=PREPROCESSING, options=ExportOptions(**options))
    return folder / "m.onnx"


def _converted(source: Path) -> ModelFile:
    out = source.with_name("m.float16.onnx")
    quantize(source, out=out, options=_FLOAT16)
    return open_model(out)


def _logits(path: Path, engine: str) -> Logits:
    with load(path, engine=engine) as classifier:  # type: ignore[arg-type]
        return classifier.logits(golden_images(range(3), height=SIZE[0], width=SIZE[1]))


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": ("logits", "probabilities", "top5")},
        {"input": "float32-nchw", "batch_size": 3, "outputs": ("top5", "features", "attention")},
    ],
    ids=str,
)
def test_every_kind_of_file_is_halved_at_fifty_decibels(tmp_path: Path, options: dict[str, Any]) -> None:
    path = _exported(tmp_path, **options)
    half, source = _converted(path), open_model(path)
    assert half.manifest.precision == "float16"
    assert half.manifest.provenance["float_model_sha256"] == source.sha256
    assert half.manifest.macs == {"float16": (source.manifest.macs or {})["float32"]}
    assert len(half.data) < 0.7 * len(source.data)  # much of so small a network's file is no weights
    for engine in _ENGINES:
        assert sqnr_db(_logits(path, engine), _logits(tmp_path / "m.float16.onnx", engine)) >= 50
    with pytest.raises(UsageError, match="float16"):
        quantize(tmp_path / "m.float16.onnx", calibration=tmp_path, out=tmp_path / "q.onnx")


def test_norms_and_softmax_stay_float32_and_the_command_says_that_it_saves_storage_only(tmp_path: Path) -> None:
    _exported(tmp_path)
    done = vit_edge("quantize", "m.onnx", "--precision", "float16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "float16 saves storage on CPUs" in done.stderr
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.float16.onnx"), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
        if node.op_type in ("MatMul", "Gelu"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT16
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert types["logits"] == onnx.TensorProto.FLOAT


def test_a_bias_that_equals_the_shift_of_a_norm_is_float16_all_the_same(tmp_path: Path) -> None:
    network = random_network(small_config())
    for block in network.blocks:
        nn.init.zeros_(block.attn.proj.bias)  # type: ignore[union-attr, arg-type]
    path = _exported(tmp_path, network)
    _converted(path)
    assert sqnr_db(_logits(path, "onnxruntime"), _logits(tmp_path / "m.float16.onnx", "onnxruntime")) >= 50


def test_a_weight_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    network = random_network(small_config())
    with torch.no_grad():
        network.head.weight[0, 0] = 1e6
    path = _exported(tmp_path, network)
    with pytest.raises(VerificationFailed, match=r"'head.weight' has values over 65,504"):
        _converted(path)
    assert not (tmp_path / "m.float16.onnx").exists()


def test_weights_in_a_second_file_move_into_the_float16_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_data, "_MOST_INSIDE_BYTES", 10_000)
    path = _exported(tmp_path)
    assert open_model(path).weights is not None
    half = _converted(path)
    assert half.weights is None
    assert half.manifest.weights is None
    assert sqnr_db(_logits(path, "openvino"), _logits(tmp_path / "m.float16.onnx", "openvino")) >= 50
