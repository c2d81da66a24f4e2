"""Where the error comes from: stage by stage, layer by layer, in decibels and in milliseconds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn

from tests.export.onnx_import.test_importer import CONV, HEAD, LABELS, WEIGHTS, network, save
from tests.export.onnx_import.test_importer import PREPROCESSING as FOREIGN
from tests.support.calibrating import IMAGES, small_graph
from tests.support.networks import PREPROCESSING, SIZE, write_checkpoint
from vit_edge.cli import main
from vit_edge.errors import DataRejected, EngineUnavailable, InputError, UsageError
from vit_edge.export import ExplanationOptions, QuantizationOptions, explain, export_onnx, quantize
from vit_edge.export.explanation.explainer import Explanation, Layer
from vit_edge.export.explanation.inputs import prepare_explanation
from vit_edge.export.explanation.layer_noise import scaled_columns, sqnr_by_op
from vit_edge.export.graph.macs import shapes_for_one_image
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.onnx_import.importer import import_onnx
from vit_edge.export.quantization.algorithms.cross_layer_equalization import equalize, find_mixings
from vit_edge.export.quantization.calibration.observers import observe_channels
from vit_edge.machine.int8_engines import lacks_int8_matmul
from vit_edge.model_file.artifact import open_model, reseal

ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Made:
    """A network's files and folders of images; `explained` with all that there is."""

    checkpoint: Path
    reference: Path
    model: Path
    calibration: Path
    data: Path
    explained: Explanation

    def explain(self, **options: Any) -> Explanation:
        return explain(self.model, **self.about, options=ExplanationOptions(**options))

    @property
    def about(self) -> dict[str, Path]:
        return {"reference": self.reference, "data": self.data}


def images(folder: Path, *, count: int, seed: int, size: Sequence[int] = SIZE) -> Path:
    """Write blurred noise, which networks take for different things, and return the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a small ViT, quantized with every algorithm there is, and its whole explanation."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint, reference, model = (folder / name for name in ("small.safetensors", "model.onnx", "int8.onnx"))
    write_checkpoint(checkpoint)
    export_onnx(checkpoint, out=reference)
    calibration, data = images(folder / "cal", count=12, seed=0), images(folder / "data", count=9, seed=1)
    every = ("repq", "cross-layer-equalization", "range-search", "gptq-rounding", "bias-correction", "mixed-precision")
    options = QuantizationOptions(algorithms=every, effort="fast", measure_speed=False, use_cache=False)
    quantize(reference, calibration=calibration, out=model, options=options)
    asked = ExplanationOptions(checkpoint=str(checkpoint), calibration=calibration, num_images=6)
    explained = explain(model, reference=reference, data=data, options=asked)
    return Made(checkpoint, reference, model, calibration, data, explained)


def test_the_stages_come_in_the_order_of_the_quantization(made: Made) -> None:
    stages = made.explained.stages
    assert [(stage.name, stage.engine) for stage in stages] == [
        ("PyTorch", "pytorch"),
        ("plain ONNX", "onnxruntime"),
        ("fused graph", "onnxruntime"),
        ("INT8, plain", "onnxruntime"),
        ("+ repq", "onnxruntime"),
        ("+ cross-layer-equalization", "onnxruntime"),
        ("+ range-search", "onnxruntime"),
        ("+ gptq-rounding", "onnxruntime"),
        ("+ bias-correction", "onnxruntime"),
        ("+ mixed-precision", "onnxruntime"),
        ("the file", "onnxruntime"),
        ("the file", "openvino"),
    ]
    assert stages[0].sqnr_db is None
    assert all(stage.sqnr_db is not None and stage.sqnr_db > 90 for stage in stages[1:3])
    assert all(stage.sqnr_db is not None and 5 < stage.sqnr_db < 60 for stage in stages[3:])
    assert all(stage.agreement is not None and 0 <= stage.agreement <= 100 for stage in stages[1:])
    assert made.explained.num_images == 6
    assert made.explained.notes == ()


def test_what_is_made_again_is_the_file_bit_for_bit(made: Made) -> None:
    file = next(stage for stage in made.explained.stages if stage.name == "the file")
    assert file.sqnr_before_db == math.inf
    assert "bit for bit" in file.note


def test_every_layer_has_its_noise_and_its_time(made: Made) -> None:
    ops = find_quantizable_ops(onnx.load(made.reference))
    layers = made.explained.layers
    assert [layer.node for layer in layers] == [op.node for op in ops]
    left = set((open_model(made.model).manifest.quantization or {})["float32_ops"])
    assert left
    for layer in layers:
        assert (layer.gmac or 0) > 0
        assert (layer.sqnr_db or 0) > 5
        assert (layer.noise_share is None) == (layer.alone_sqnr_db is None) == (layer.node in left)
    assert sum(layer.noise_share or 0 for layer in layers) == pytest.approx(100)
    measured = [layer for layer in layers if layer.node not in left]
    assert sorted(measured, key=_share) == sorted(measured, key=lambda layer: -(layer.alone_sqnr_db or 0))
    assert [entry.engine for entry in made.explained.engines] == list(ENGINES)
    for entry in made.explained.engines:
        # Without VNNI OpenVINO runs all of them in float32.
        in_float32 = {op.node for op in ops} if entry.engine == "openvino" and lacks_int8_matmul() else left
        assert {time.node for time in entry.layers if time.precision == "float32"} == in_float32
        for side in ("reference_ms", "candidate_ms"):
            parts = [getattr(part, side) for part in (*entry.layers, *entry.rest)]
            assert all(getattr(time, side) is not None for time in entry.layers)
            assert sum(part or 0.0 for part in parts) == pytest.approx(getattr(entry, side))
        operators = " ".join(other.operator for other in entry.rest if other.candidate_ms)
        assert "Softmax" in operators


def _share(layer: Layer) -> float:
    return layer.noise_share or 0.0


def test_without_checkpoint_and_calibration_the_file_is_still_explained(made: Made, tmp_path: Path) -> None:
    found = made.explain(engines=("onnxruntime",), num_images=1000)
    assert [stage.name for stage in found.stages] == ["fused graph", "the file"]
    assert found.num_images == 9
    assert all(layer.noise_share is None and layer.sqnr_db is not None for layer in found.layers)
    assert [note.split()[1] for note in found.notes] == ["--checkpoint,", "--calibration,"]
    assert [entry.engine for entry in found.engines] == ["onnxruntime"]


def test_a_damaged_layer_is_the_first_that_is_worse_and_the_file_is_not_what_was_made(
    made: Made, tmp_path: Path
) -> None:
    graph = onnx.load(made.model)
    layers = made.explained.layers
    bad_node = next(layer.node for layer in reversed(layers) if layer.noise_share is not None and ".fc" in layer.node)
    tensor = next(t for t in graph.graph.initializer if t.name == f"{bad_node}.weight.quantized")
    shuffled = np.random.default_rng(0).permutation(numpy_helper.to_array(tensor), axis=0)
    tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    onnx.save(graph, tmp_path / "bad.onnx")
    (tmp_path / "bad.onnx").write_bytes(reseal(tmp_path / "bad.onnx").data)
    bad = replace(made, model=tmp_path / "bad.onnx").explain(calibration=made.calibration, engines=("onnxruntime",))
    assert "another version or CPU made it" in bad.stages[-1].note
    assert min(bad.layers, key=lambda layer: layer.sqnr_db or 0).node == bad_node
    before = {layer.node: layer.sqnr_db for layer in made.explained.layers}
    worse = [layer.node for layer in bad.layers if (layer.sqnr_db or 0) < (before[layer.node] or 0) - 6]
    assert worse[0] == bad_node


def test_channels_at_another_scale_are_no_error_of_their_layer() -> None:
    graph = small_graph()
    shapes = {name: shape for name, shape in shapes_for_one_image(graph).items() if shape is not None}
    mixings = find_mixings(graph, shapes)
    ranges = observe_channels(graph, [mixing.input for mixing in mixings], IMAGES)
    scaled = equalize(graph, mixings, ranges)
    ops = find_quantizable_ops(graph)
    columns = scaled_columns(graph, ops)
    assert set(columns) == {"block.0.attention.qkv", "block.1.attention.key_value"}
    exact = sqnr_by_op(graph, scaled, ops, IMAGES[:4], scaled=columns)
    assert min(exact.values()) > 90
    plain = sqnr_by_op(graph, scaled, ops, IMAGES[:4], scaled={})
    assert {node for node, level in plain.items() if level < 60} == set(columns)


def test_other_calibration_images_are_refused_before_the_work(made: Made) -> None:
    with pytest.raises(DataRejected, match=r"12 of the 12 .* are missing, and the folder holds 9 others"):
        prepare_explanation(made.model, **made.about, options=ExplanationOptions(calibration=made.data))
    with pytest.raises(UsageError, match="does not say how the file was quantized"):
        prepare_explanation(made.reference, **made.about, options=ExplanationOptions(calibration=made.calibration))


@pytest.mark.parametrize(
    ("key", "value"), [("effort", "endless"), ("ranges", None), ("weights", {"bits": 3}), ("float32_ops", [["x"]])]
)
def test_a_manifest_that_does_not_say_how_the_file_was_quantized_is_refused(
    made: Made, tmp_path: Path, key: str, value: object
) -> None:
    model = open_model(made.model)
    quantization = {**(model.manifest.quantization or {}), key: value}
    (tmp_path / "m.onnx").write_bytes(model.with_manifest(replace(model.manifest, quantization=quantization)))
    with pytest.raises(UsageError, match="does not say how the file was quantized"):
        prepare_explanation(tmp_path / "m.onnx", **made.about, options=ExplanationOptions(calibration=made.calibration))


def test_what_is_no_checkpoint_of_the_reference_is_refused(made: Made, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", num_classes=5)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"checkpoint": str(other)}, InputError, "5 classes"),
        ({"checkpoint": str(made.reference)}, UsageError, "an ONNX file is not a checkpoint"),
        ({"checkpoint": str(tmp_path / "none.safetensors")}, InputError, "none"),
        ({"checkpoint": str(made.checkpoint), "weights": other}, UsageError, "package.module:factory"),
        ({"engines": ("null",)}, EngineUnavailable, "null"),
        ({"num_images": 0}, UsageError, "1 or more"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            prepare_explanation(made.model, **made.about, options=ExplanationOptions(**options))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Hardswish(), nn.Conv2d(16, 32, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7),
    )  # fmt: skip


def test_a_convolutional_network_is_explained(made: Made, tmp_path: Path) -> None:
    reference, model = tmp_path / "conv.onnx", tmp_path / "conv.int8.onnx"
    export_onnx(convolutional(), out=reference, preprocessing=PREPROCESSING, labels=tuple("abcdefg"))
    options = QuantizationOptions(effort="fast", measure_speed=False, use_cache=False)
    quantize(reference, calibration=made.calibration, out=model, options=options)
    asked = ExplanationOptions(calibration=made.calibration, checkpoint=f"{__name__}:convolutional")
    found = explain(model, reference=reference, data=made.data, options=asked)
    names = ["PyTorch", "plain ONNX", "float32 file", "INT8, plain", "the file", "the file"]
    assert [stage.name for stage in found.stages] == names
    assert found.stages[4].sqnr_before_db == math.inf
    assert [layer.operator for layer in found.layers] == ["Conv", "Conv", "Conv", "Gemm"]
    assert sum(_share(layer) for layer in found.layers) == pytest.approx(100)
    for entry in found.engines:
        assert all(time.reference_ms is not None and time.candidate_ms is not None for time in entry.layers)
        assert {time.precision for time in entry.layers} == {"int8"}


def test_a_third_party_network_is_explained(tmp_path: Path) -> None:
    path = save(tmp_path / "theirs.onnx", network(*CONV, *HEAD, **WEIGHTS))
    imported = import_onnx(path, preprocessing=FOREIGN, labels=LABELS)
    (tmp_path / "model.onnx").write_bytes(imported.model.data)
    folders = {name: images(tmp_path / name, count=8, seed=seed, size=FOREIGN.crop) for seed, name in enumerate("cd")}
    options = QuantizationOptions(effort="fast", measure_speed=False, use_cache=False)
    quantize(tmp_path / "model.onnx", calibration=folders["c"], out=tmp_path / "int8.onnx", options=options)
    asked = ExplanationOptions(calibration=folders["c"], engines=("onnxruntime",))
    about = {"reference": tmp_path / "model.onnx", "data": folders["d"]}
    found = explain(tmp_path / "int8.onnx", **about, options=asked)
    assert [stage.name for stage in found.stages] == ["float32 file", "INT8, plain", "the file"]
    assert found.stages[-1].sqnr_before_db == math.inf
    assert len(found.layers) == 2


def test_the_command_gives_json_tables_and_a_plot(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    command = ["explain", str(made.model), "--reference", str(made.reference), "--data", str(made.data),
               "--engine", "onnxruntime"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in found["stages"]] == ["fused graph", "the file"]
    assert found["stages"][0]["sqnr_db"] is None
    times = [layer["engines"]["onnxruntime"] for layer in found["layers"]]
    assert set(times[0]) == {"precision", "reference_ms", "candidate_ms"}
    entry = found["engines"][0]
    whole = sum(time["candidate_ms"] for time in times) + sum(rest["candidate_ms"] or 0 for rest in entry["rest"])
    assert whole == pytest.approx(entry["candidate_ms"])
    assert found["plot"] == "layers.png"
    with Image.open("layers.png") as image:
        assert image.format == "PNG"
        assert image.width > 900
    first = Path("layers.png").read_bytes()
    assert main(command) == 2
    assert "layers.png" in capsys.readouterr().err
    assert Path("layers.png").read_bytes() == first
    assert main([*command, "-o", str(tmp_path / "none" / "layers.png")]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SQNR ")
    assert "on 9 images" in printed.splitlines()[0]
    assert "the whole network" in printed
    assert 'layers.png is not drawn: the package matplotlib is not installed; pip install "vit-edge[train]"' in printed
