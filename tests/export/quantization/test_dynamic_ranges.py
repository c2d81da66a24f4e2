"""Other precisions: INT8 with ranges found at run time, alone or after calibration, and float16 from a float32 file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.conftest import vit_edge
from tests.support.networks import SIZE
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export import QuantizationOptions, quantize, verify
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.quantization.coverage import coverage
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import Manifest, open_model, pack
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.ort import make_session
from vit_edge.runtime.engines.protocol import EngineOptions

_ENGINES = ("onnxruntime", "openvino")
_JUDGING = golden_images(range(2000, 2016), height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A float file, 32 calibration images, and its dynamic INT8 files without and with these."""
    folder = tmp_path_factory.mktemp("dynamic")
    shutil.copytree(small_model, folder, dirs_exist_ok=True)
    (folder / "calibration").mkdir()
    for number, pixels in enumerate(golden_images(range(32), height=SIZE[0], width=SIZE[1])):
        Image.fromarray(pixels).save(folder / "calibration" / f"{number}.png")
    _quantize(folder, "plain.onnx")
    _quantize(folder, "near.onnx", calibration=folder / "calibration")
    return folder


def _quantize(folder: Path, name: str, *, calibration: Path | None = None, **options: Any) -> Any:
    told = {"precision": "int8-dynamic", "target": "x86-vnni", "measure_speed": False, "use_cache": False, **options}
    return quantize(
        folder / "m.onnx", calibration=calibration, out=folder / name, options=QuantizationOptions(**told), force=True
    )


def _logits(path: Path, engine: Any) -> Any:
    with load(path, engine=engine) as classifier:
        return classifier.logits(_JUDGING)


@pytest.mark.parametrize("name", ["plain.onnx", "near.onnx"])
@pytest.mark.parametrize("engine", _ENGINES)
def test_no_answer_depends_on_its_batch(folder: Path, name: str, engine: Any) -> None:
    with load(folder / name, engine=engine) as classifier:
        alone = np.concatenate([classifier.logits(image[None]) for image in _JUDGING])
        assert classifier.logits(_JUDGING).tobytes() == alone.tobytes()
    assert open_model(folder / name).manifest.batch == 1


@pytest.mark.parametrize("engine", _ENGINES)
def test_answers_are_near_the_float_ones_and_nearer_after_calibration(folder: Path, engine: str) -> None:
    expected = _logits(folder / "m.onnx", engine)
    found = {name: sqnr_db(expected, _logits(folder / name, engine)) for name in ("plain.onnx", "near.onnx")}
    assert found["near.onnx"] > found["plain.onnx"] + 1
    assert found["plain.onnx"] > 20


def test_onnxruntime_has_one_kernel_for_each_product_and_pixels_are_not_rounded(folder: Path, tmp_path: Path) -> None:
    ops = find_quantizable_ops(onnx.load(folder / "m.onnx"))
    for name in ("plain.onnx", "near.onnx"):
        make_session(open_model(folder / name), EngineOptions(threads=1), optimised=tmp_path / "optimised.onnx")
        counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        # The query, and keys with values, of the last block read the same tensor: it is measured once.
        assert counts["DynamicQuantizeMatMul"] + counts["MatMulIntegerToFloat"] == len(ops)
        assert counts["DynamicQuantizeMatMul"] >= len(ops) - 3
        assert not counts["MatMulInteger"] + counts["Cast"] + counts["DequantizeLinear"]
        assert coverage(open_model(folder / name), "onnxruntime").percent == 100
        assert coverage(open_model(folder / name), "openvino").num_ops == len(ops)


def test_the_manifest_says_what_was_done_and_the_bytes_repeat(folder: Path) -> None:
    first = (folder / "near.onnx").read_bytes()
    result = _quantize(folder, "again.onnx", calibration=folder / "calibration", batch_size=16)
    assert (folder / "again.onnx").read_bytes() == first
    assert result.algorithms == ("repq", "cross-layer-equalization", "gptq-rounding")
    manifest = open_model(folder / "near.onnx").manifest
    assert manifest.precision == "int8-dynamic"
    # Files from before the precision had a name of its own say int8 and scheme dynamic.
    earlier = manifest.to_json().replace('"precision": "int8-dynamic"', '"precision": "int8"')
    assert '"precision": "int8"' in earlier
    assert Manifest.from_json(earlier).precision == "int8-dynamic"
    assert manifest.quantization is not None
    assert (manifest.quantization["scheme"], manifest.quantization["batch"]) == ("dynamic", 1)
    assert len(manifest.quantization["images"]) == 32
    plain = open_model(folder / "plain.onnx").manifest.quantization
    assert plain is not None
    assert (plain["algorithms"], plain["images"]) == ([], [])


def test_images_that_calibrated_do_not_judge_and_the_file_can_be_inspected(folder: Path) -> None:
    with pytest.raises(DataRejected, match="calibrat"):
        verify(folder / "near.onnx", reference=folder / "m.onnx", data=folder / "calibration", unlabelled=True)
    done = vit_edge("inspect", folder / "plain.onnx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gmac_per_image"] > 0


@pytest.mark.parametrize(
    ("options", "calibrated", "told"),
    [
        ({}, False, "give --calibration, or --precision int8-dynamic"),
        ({"precision": "int8-dynamic", "ranges": "mse"}, True, "--ranges has no effect here"),
        ({"precision": "int8-dynamic", "recipe": "accurate"}, False, "--recipe has no effect here: without"),
        ({"precision": "int8-dynamic", "max_drop_points": 1.0}, False, "--max-drop has no effect here"),
        ({"precision": "int8-dynamic", "algorithms": ("range-search",)}, True, "for constant ranges"),
        ({"precision": "int8-dynamic", "target": "qnn"}, False, "use --precision int8, or the target of a CPU"),
        ({"precision": "float16"}, True, "float16 has no ranges"),
        ({"precision": "float16", "target": "x86-vnni"}, False, "--target has no effect here"),
        ({"precision": "int4"}, False, "choose int8, int8-dynamic, float16"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], calibrated: bool, told: str
) -> None:
    calibration = folder / "calibration" if calibrated else None
    with pytest.raises(UsageError) as caught:
        quantize(folder / "m.onnx", calibration=calibration, out=tmp_path / "q", options=QuantizationOptions(**options))
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_fixed_at_another_batch_is_refused(folder: Path, tmp_path: Path) -> None:
    model, batch = onnx.load(folder / "m.onnx"), 2
    fix_batch(model.graph, batch)
    manifest = open_model(folder / "m.onnx").manifest
    del model.metadata_props[:]
    fixed = replace(manifest, input={**manifest.input, "batch": batch})
    (tmp_path / "m.onnx").write_bytes(pack(model.SerializeToString(), fixed))
    for precision, target in (("int8-dynamic", "portable"), ("int8", "qnn")):
        options = QuantizationOptions(precision=precision, target=target)  # type: ignore[arg-type]
        calibration = folder / "calibration" if precision == "int8" else None
        with pytest.raises(UsageError, match="fixed batch of 2"):
            quantize(tmp_path / "m.onnx", calibration=calibration, out=tmp_path / "q.onnx", options=options)
