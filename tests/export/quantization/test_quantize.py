"""INT8 where it pays, from images that never judge, recorded and proven."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.conftest import ROOT, Workspace, vit_edge
from tests.support.kernels import run_as_defined, sums_exactly
from vit_edge.data import find_images
from vit_edge.errors import DataRejected, GoldenMismatch, ModelRejected, UsageError
from vit_edge.export import QuantizationOptions, quantize
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.quantization.algorithms.recipes import ALGORITHMS
from vit_edge.export.quantization.calibration.observers import Range, observe_ranges
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import open_model, reseal

CALIBRATION = ROOT / "calibration_data"


def test_the_file_is_at_most_three_tenths_of_the_float_file(workspace: Workspace) -> None:
    model, float_bytes = open_model(workspace.int8_model), workspace.float_model.stat().st_size
    printed = workspace.printed["quantize"]["size_ratio"]
    assert printed == pytest.approx(workspace.int8_model.stat().st_size / float_bytes)
    # The manifest lists the hashes of all 1,437 calibration images, a tenth of so small a file.
    assert model.manifest.quantization is not None
    without = {**model.manifest.quantization, "images": [], "fingerprints": []}
    data = model.with_manifest(replace(model.manifest, quantization=without))
    assert len(data) <= 0.30 * float_bytes


def test_integers_enter_every_constant_weight_product_and_nothing_else(workspace: Workspace) -> None:
    source, graph = onnx.load(workspace.float_model), onnx.load(workspace.int8_model).graph
    ops = {op.node for op in find_quantizable_ops(source)}
    assert len(ops) == 1 + 4 + 5 + 1  # patches, a whole block, one with its query apart, the head
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        integer = [makers[name].op_type for name in node.input if name in makers].count("DequantizeLinear")
        assert integer == (2 if node.name in ops else 0), node.name
    counts = Counter(node.op_type for node in graph.node)
    assert counts["QuantizeLinear"] == len({p.input for p in find_quantizable_ops(source) if not p.takes_pixels}) == 10
    assert "Cast" not in counts


def test_weights_are_int8_with_a_scale_for_each_channel(workspace: Workspace) -> None:
    source = {t.name: numpy_helper.to_array(t) for t in onnx.load(workspace.float_model).graph.initializer}
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(workspace.int8_model).graph.initializer}
    for name, weight in source.items():
        if not name.endswith(".weight"):
            continue
        integers, scales = stored[f"{name}.quantized"], stored[f"{name}.scale"]
        assert integers.dtype == np.int8
        assert np.abs(integers).max() <= 63  # portable: 7 bits
        assert scales.shape == weight.shape[1:]
        assert name not in stored
        if name == "patches.weight" or name.endswith(".fc2.weight"):  # the others took a norm's or the values' scale
            assert np.abs(integers * scales - weight).mean() <= 0.5 * scales.mean()


def test_pixels_enter_the_first_product_as_they_are(workspace: Workspace) -> None:
    graph = onnx.load(workspace.int8_model).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    assert stored["pixels.scale"] == 1
    assert stored["pixels.zero_point"] == 0


def test_onnxruntime_computes_every_product_in_integers(workspace: Workspace, tmp_path: Path) -> None:
    from vit_edge.runtime.engines.ort import _DISABLED_OPTIMIZERS

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(
        workspace.int8_model, settings, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED_OPTIMIZERS
    )
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["MatMulIntegerToFloat"] == 11
    assert counts["DequantizeLinear"] == 0


def test_the_recipe_is_in_the_manifest(workspace: Workspace) -> None:
    float_model, model = open_model(workspace.float_model), open_model(workspace.int8_model)
    quantization = model.manifest.quantization
    assert quantization is not None
    assert quantization["target"] == "portable"
    assert quantization["weights"]["bits"] == 7
    assert len(quantization["images"]) == 1437
    assert model.manifest.precision == "int8"
    assert model.manifest.provenance["float_model_sha256"] == float_model.sha256
    assert model.manifest.labels == float_model.manifest.labels
    golden = model.manifest.golden
    assert golden is not None
    assert [entry["engines"] for entry in golden["expected"]] == [["onnxruntime"], ["openvino"]]


def test_with_labelled_images_the_figures_are_in_the_file_and_the_bytes_repeat(
    workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(workspace.test_images, tmp_path / "elsewhere")
    for name, data in (("a.onnx", workspace.test_images), ("b.onnx", tmp_path / "elsewhere")):
        result = quantize(workspace.float_model, calibration=CALIBRATION, data=data, out=tmp_path / name)
    assert str(tmp_path).encode() not in (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert result.num_calibration_images == 128
    evaluation = open_model(tmp_path / "a.onnx").manifest.evaluation
    assert evaluation is not None
    assert {entry["engine"] for entry in evaluation["results"]} == {"onnxruntime", "openvino"}
    assert all(entry["agreement"] >= 98 and entry["images"] == 360 for entry in evaluation["results"])


def test_eight_bits_come_nearer_than_seven(workspace: Workspace, tmp_path: Path) -> None:
    found = {}
    preprocessing = open_model(workspace.float_model).manifest.preprocessing
    images = np.stack([preprocessing.pixels(path) for path in find_images(workspace.test_images)[::9]])
    expected = run_as_defined(onnx.load(workspace.float_model), images)
    for target in ("portable", "x86-vnni"):
        out, options = tmp_path / f"{target}.onnx", QuantizationOptions(target=target, without=ALGORITHMS)
        quantize(workspace.float_model, calibration=CALIBRATION, out=out, options=replace(options, measure_speed=False))
        found[target] = sqnr_db(expected, run_as_defined(onnx.load(out), images))
    assert found["x86-vnni"] > found["portable"] > 25


def test_calibration_images_that_judge_are_refused_and_nothing_is_written(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "cal").mkdir()
    for path in find_images(CALIBRATION)[:40]:
        shutil.copy(path, tmp_path / "cal" / f"{path.parent.name}-{path.name}")
    leaked = find_images(workspace.test_images)[100]
    shutil.copy(leaked, tmp_path / "cal" / "innocent.png")
    with pytest.raises(DataRejected, match=leaked.name):
        quantize(
            workspace.float_model,
            calibration=tmp_path / "cal",
            data=workspace.test_images,
            out=tmp_path / "model.int8.onnx",
        )
    assert not (tmp_path / "model.int8.onnx").exists()
    quantize(workspace.float_model, calibration=tmp_path / "cal", out=tmp_path / "model.int8.onnx")
    done = vit_edge(
        "verify", tmp_path / "model.int8.onnx", "--reference", workspace.float_model, "--data", workspace.test_images
    )
    assert done.returncode == 3
    assert leaked.name in done.stderr


def test_few_or_equal_images_are_warned_of_or_refused(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = find_images(CALIBRATION)[0]
    (tmp_path / "cal" / "3").mkdir(parents=True)
    shutil.copy(image, tmp_path / "cal" / "3" / "0.png")
    quantize(workspace.float_model, calibration=tmp_path / "cal", out=tmp_path / "m.onnx")
    assert "few calibration images (1)" in caplog.text
    assert "all 1 calibration images are of the class '3'" in caplog.text
    shutil.copy(image, tmp_path / "cal" / "3" / "1.png")
    with pytest.raises(DataRejected, match="all 2 images are the same"):
        quantize(workspace.float_model, calibration=tmp_path / "cal", out=tmp_path / "n.onnx")


def test_an_int8_file_is_not_quantized_again(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float32"):
        quantize(workspace.int8_model, calibration=CALIBRATION, out=tmp_path / "m.onnx")


def _one_op(weight: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="p")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", len(weight)])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", weight.shape[1]])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("low", [-3.0, 0.0])
def test_a_quantized_product_is_near_the_float_one(low: float, bits: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 16)).astype(np.float32)
    weight[:, 3] = 0  # a dead channel has no range of its own
    x = rng.uniform(low, 3, (10, 64)).astype(np.float32)
    model = insert_qdq(_one_op(weight), {"x": Range(low=low, high=3.0)}, scheme=Scheme(weight_bits=bits))
    onnx.checker.check_model(model, full_check=True)
    found = [run_as_defined(model, x)]
    if sums_exactly(bits):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": x})[0])
    for y in found:
        assert np.abs(y - x @ weight).max() < 0.02 * np.abs(x @ weight).max()


def test_a_constant_activation_does_not_divide_by_zero() -> None:
    weight = np.ones((4, 2), dtype=np.float32)
    model = insert_qdq(_one_op(weight), {"x": Range(low=0.0, high=0.0)}, scheme=Scheme(weight_bits=7))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"x": np.zeros((1, 4), np.float32)})[0]).all()


def test_ranges_are_means_over_images_and_include_zero(workspace: Workspace) -> None:
    model = onnx.load(workspace.float_model)
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    tensors = [op.input for op in find_quantizable_ops(model) if not op.takes_pixels]
    alone = [observe_ranges(model, tensors, [image]) for image in images]
    together = observe_ranges(model, tensors, images)
    for name in tensors:
        assert together[name].low <= 0 <= together[name].high
        assert together[name].high == pytest.approx(float(np.mean([one[name].high for one in alone])))


def test_a_damaged_or_hostile_float_file_is_not_quantized(workspace: Workspace, tmp_path: Path) -> None:
    model = onnx.load(workspace.float_model)
    weight = next(t for t in model.graph.initializer if t.name == "block.1.fc1.weight")
    shuffled = np.random.default_rng(0).permutation(numpy_helper.to_array(weight), axis=0)
    weight.CopyFrom(numpy_helper.from_array(shuffled, weight.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    (tmp_path / "damaged.onnx").write_bytes(reseal(tmp_path / "damaged.onnx").data)
    with pytest.raises(GoldenMismatch):
        quantize(tmp_path / "damaged.onnx", calibration=CALIBRATION, out=tmp_path / "m.onnx")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    (tmp_path / "external.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "external.onnx").write_bytes(reseal(tmp_path / "external.onnx").data)
    with pytest.raises(ModelRejected, match="another file"):
        quantize(tmp_path / "external.onnx", calibration=CALIBRATION, out=tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
