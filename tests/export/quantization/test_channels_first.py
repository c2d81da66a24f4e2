"""1x1 convolutions over channels-first activations: the same function, in the kernels that CPUs without VNNI have."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.conftest import ROOT
from tests.support.masked_cpu import CannotMaskError, build_mask, masked_environment
from tests.support.networks import SIZE
from vit_edge.cli import main
from vit_edge.errors import UsageError
from vit_edge.export import QuantizationOptions, quantize
from vit_edge.export.explanation.layer_noise import sqnr_by_op
from vit_edge.export.graph.intermediate_tensors import logits_of
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.graph.preparation import prepare
from vit_edge.export.quantization.coverage import coverage
from vit_edge.export.quantization.qdq.channels_first import channels_first
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.machine.int8_engines import lacks_int8_matmul
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import load
from vit_edge.runtime.checks.golden import golden_images

_IMAGES = golden_images(range(100, 116), height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """Return a folder with `m.onnx` in float32, and that quantized: `portable.onnx` and `openvino-avx2.onnx`."""
    folder = tmp_path_factory.mktemp("channels_first")
    shutil.copy(small_model / "m.onnx", folder)
    (folder / "cal").mkdir()
    for number, pixels in enumerate(golden_images(range(32), height=SIZE[0], width=SIZE[1])):
        Image.fromarray(pixels).save(folder / "cal" / f"{number:02}.png")
    for target in ("portable", "openvino-avx2"):
        options = QuantizationOptions(target=target, effort="fast", measure_speed=False, use_cache=False)
        quantize(folder / "m.onnx", calibration=folder / "cal", out=folder / f"{target}.onnx", options=options)
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Return an environment in which a process sees a CPU without AVX-512 and VNNI; skips where that cannot be."""
    try:
        return masked_environment(build_mask(tmp_path_factory.mktemp("mask")))
    except CannotMaskError as error:
        pytest.skip(str(error))


def _float_graph(folder: Path) -> onnx.ModelProto:
    graph = prepare(open_model(folder / "m.onnx").graph())
    fix_batch(graph.graph, 1)
    return graph


def _of_each_rank() -> onnx.ModelProto:
    """Return products over tensors of rank 2, 3 and 4, with all between them that moves tokens or reads both forms."""
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (8, 8), "c": (8, 4), "bias": (8,), "grid": (3, 8), "gamma": (8,), "beta": (8,)}
    tensors: dict[str, Any] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {
        "pads": np.array([0, 1, 0, 0, 1, 0]),
        "from": np.array([1]),
        "to": np.array([2]),
        "axis": np.array([-2]),
    }
    tensors |= {"as_grid": np.array([1, 2, 2, 8]), "as_tokens": np.array([1, 4, 8]), "flat": np.array([1, 8])}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["x1"], name="first"),
        helper.make_node("Add", ["bias", "x1"], ["x2"]),
        helper.make_node("LayerNormalization", ["x2", "gamma", "beta"], ["x3"], epsilon=1e-3),
        helper.make_node("Slice", ["x3", "from", "to", "axis"], ["one"]),
        helper.make_node("Softmax", ["x3"], ["soft"], axis=-1),
        helper.make_node("Mul", ["soft", "x3"], ["x4"]),
        helper.make_node("Sub", ["x4", "grid"], ["x5"]),
        helper.make_node("Pad", ["x5", "pads"], ["x6"]),
        helper.make_node("Slice", ["x6", "from", "five", "axis"], ["x7"]),
        helper.make_node("Reshape", ["x7", "as_grid"], ["x8"]),
        helper.make_node("MatMul", ["x8", "b"], ["x9"], name="grid product"),
        helper.make_node("Relu", ["x9"], ["x10"]),
        helper.make_node("Reshape", ["x10", "as_tokens"], ["x11"]),
        helper.make_node("Add", ["x11", "one"], ["x12"]),
        helper.make_node("Slice", ["x12", "from", "to", "axis"], ["x13"]),
        helper.make_node("Reshape", ["x13", "flat"], ["x14"]),
        helper.make_node("Add", ["x14", "bias"], ["x15"]),
        helper.make_node("MatMul", ["x15", "c"], ["logits"], name="head"),
    ]
    tensors["five"] = np.array([5])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])
    constants = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [x], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)


@pytest.mark.parametrize("opset", [17, 20])
def test_products_over_tensors_of_any_rank_are_convolutions_of_the_same_values(opset: int) -> None:
    graph = _of_each_rank()
    graph.opset_import[0].version = opset
    moved = channels_first(graph)
    onnx.checker.check_model(moved, full_check=True)
    products = {node.name: node.op_type for node in moved.graph.node if node.op_type in ("Conv", "MatMul")}
    assert products == {"first": "Conv", "grid product": "Conv", "head": "Conv"}
    images = [np.random.default_rng(1).normal(size=(1, 3, 6)).astype(np.float32)]
    assert sqnr_db(logits_of(graph, images), logits_of(moved, images)) > 100


def test_a_whole_network_gives_the_same_logits_and_each_op_keeps_its_name(folder: Path) -> None:
    graph = _float_graph(folder)
    moved = channels_first(graph)
    images = [image[None] for image in _IMAGES[:4]]
    assert sqnr_db(logits_of(graph, images), logits_of(moved, images)) > 90
    ops = find_quantizable_ops(graph)
    assert {node.name for node in moved.graph.node if node.op_type == "Conv"} == {op.node for op in ops}
    assert len([node for node in moved.graph.node if node.op_type == "LayerNormalization"]) == 0
    noise = sqnr_by_op(graph, moved, ops, [image[0] for image in images], scaled={})
    assert noise.keys() == {op.node for op in ops}
    assert min(noise.values()) > 90


def test_the_file_is_as_accurate_as_the_portable_one_in_both_engines(folder: Path) -> None:
    with load(folder / "m.onnx") as whole:
        expected = whole.logits(_IMAGES)
    for engine in ("onnxruntime", "openvino"):
        with load(folder / "openvino-avx2.onnx", engine=engine) as moved, load(folder / "portable.onnx") as portable:
            assert moved.describe()["batch_size"] == 1
            assert sqnr_db(expected, moved.logits(_IMAGES)) > sqnr_db(expected, portable.logits(_IMAGES)) - 1.5


def test_openvino_runs_every_op_in_integers_and_is_chosen(folder: Path) -> None:
    model = open_model(folder / "openvino-avx2.onnx")
    found = coverage(model, "openvino")
    assert (found.percent, found.float32_ops) == (100, ())
    with load(folder / "openvino-avx2.onnx") as chosen, load(folder / "portable.onnx") as other:
        assert (chosen.describe()["engine"], chosen.describe()["int8_fallback"]) == ("openvino", None)
        assert other.describe()["engine"] == "onnxruntime"
    with load(folder / "openvino-avx2.onnx", engine="onnxruntime") as elsewhere:
        assert "float32" in elsewhere.describe()["int8_fallback"]


def test_inspect_and_quantize_say_which_engine_to_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target, advice in (("portable", "onnxruntime on those without"), ("openvino-avx2", "openvino on x86 CPUs")):
        assert main(["inspect", str(folder / f"{target}.onnx"), "--json"]) == 0
        assert advice in json.loads(capsys.readouterr().out)["engine_advice"]
    assert main(["inspect", str(folder / "m.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine_advice"] is None


def test_ranges_at_run_time_are_refused(folder: Path) -> None:
    options = QuantizationOptions(precision="int8-dynamic", target="openvino-avx2")
    with pytest.raises(UsageError, match="constant ranges"):
        quantize(folder / "m.onnx", out=folder / "dynamic.onnx", options=options)


_SAYS = """
import json, sys
from vit_edge.machine.doctor import examine
from vit_edge.machine.targets import resolve_target
from vit_edge.runtime import load
from vit_edge.runtime.engines.ov import compile_model
from vit_edge.runtime.engines.protocol import EngineOptions
from vit_edge.model_file.artifact import open_model
said = {"auto": resolve_target("auto").target.name, "findings": [f["advice"] for f in examine()["findings"]]}
for path in sys.argv[1:]:
    nodes = compile_model(open_model(path), EngineOptions(threads=1)).get_runtime_model().get_ops()
    with load(path, engine="openvino", threads=1) as classifier:
        about = classifier.describe()
    kernels = sorted({str(n.get_rt_info()["primitiveType"].value if hasattr(n.get_rt_info()["primitiveType"], "value")
                      else n.get_rt_info()["primitiveType"]) for n in nodes
                      if n.get_type_name() in ("Convolution", "FullyConnected", "ExecutionNode")})
    said[path] = {"verified": about["verified"], "int8_fallback": about["int8_fallback"], "kernels": kernels}
print(json.dumps(said))
"""


def test_without_vnni_openvino_runs_matmul_in_float32_and_convolutions_in_int8(
    folder: Path, masked: Mapping[str, str]
) -> None:
    files = [str(folder / f"{target}.onnx") for target in ("portable", "openvino-avx2")]
    command = [sys.executable, "-c", _SAYS, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=masked, timeout=600)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["auto"] == "openvino-avx2"
    assert any("--target openvino-avx2" in advice for advice in said["findings"])
    portable, moved = (said[file] for file in files)
    assert (portable["verified"], moved["verified"]) == ("full", "full")
    assert "no VNNI" in portable["int8_fallback"]
    assert not any(kernel.endswith("gemm_I8") for kernel in portable["kernels"])
    assert moved["int8_fallback"] is None
    assert any(kernel.startswith("jit_avx2") and kernel.endswith("I8") for kernel in moved["kernels"])


def test_with_vnni_the_portable_file_runs_in_int8(folder: Path) -> None:
    if lacks_int8_matmul():
        pytest.skip("this CPU has no VNNI")
    with load(folder / "portable.onnx", engine="openvino") as classifier:
        assert classifier.describe()["int8_fallback"] is None
