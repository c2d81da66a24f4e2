"""What an engine does not compute in integers is named, whatever the file pretends."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.networks import PREPROCESSING
from vit_edge.errors import EngineUnavailable, ModelRejected
from vit_edge.export.graph.macs import macs_by_node, macs_per_image
from vit_edge.export.quantization.coverage import coverage
from vit_edge.model_file.artifact import Manifest, ModelFile, open_model, pack
from vit_edge.runtime.engines import ort

ENGINES = ("onnxruntime", "openvino")
pytestmark = pytest.mark.usefixtures("openvino_in_int8")
IN, OUT, TOKENS = 32, 16, 5


def _graph(
    nodes: list[onnx.NodeProto], shape: list[Any], *, batch: int | str = "batch", **tensors: Any
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (len(shape) + 1))
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "w": rng.normal(size=(IN, OUT)).astype(np.float32),
        "w.int8": rng.integers(-127, 128, (IN, OUT), dtype=np.int8),
        "w.s": rng.uniform(0.01, 0.02, OUT).astype(np.float32),
        "w.z": np.zeros(OUT, np.int8),
        "b": rng.normal(size=OUT).astype(np.float32),
        **tensors,
    }
    read = {name for node in nodes for name in node.input}
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in read]
    graph = helper.make_graph(nodes, "g", [x], [y], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"node of {output}", **attributes)


def _rounded(name: str = "x") -> list[onnx.NodeProto]:
    return [
        _node("QuantizeLinear", f"{name} s z", f"{name}.q"),
        _node("DequantizeLinear", f"{name}.q s z", f"{name}.d"),
    ]


def _weight(axis: int = 1) -> onnx.NodeProto:
    return _node("DequantizeLinear", "w.int8 w.s w.z", "w.d", axis=axis)


def _file(model: onnx.ModelProto) -> ModelFile:
    onnx.checker.check_model(model, full_check=True)
    shown = {"name": "x", "dtype": "float32", "layout": "NCHW"}
    manifest = Manifest(
        name="m",
        architecture={},
        preprocessing=PREPROCESSING,
        labels=("a",),
        precision="int8",
        provenance={},
        input=shown,
    )
    return open_model(pack(model.SerializeToString(), manifest))


def _right() -> onnx.ModelProto:
    return _graph([*_rounded(), _weight(), _node("MatMul", "x.d w.d", "y")], [TOKENS, IN])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_product_of_integers_is_counted_in_full(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    found = coverage(_file(_right()), engine)
    assert found.integer_gmac == found.weight_gmac == found.total_gmac == TOKENS * IN * OUT / 1e9
    assert (found.percent, found.percent_of_all) == (100, 100)
    assert (found.num_integer, found.num_ops, found.float32_ops, found.alone) == (1, 1, (), ())
    assert found.engine == engine
    assert found.version
    assert caplog.text == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_counts_among_all_products_only(engine: str) -> None:
    nodes = [*_rounded(), _weight(), _node("MatMul", "x.d w.d", "a"), _node("Transpose", "a", "t", perm=[0, 2, 1])]
    found = coverage(_file(_graph([*nodes, _node("MatMul", "a t", "y")], [TOKENS, IN])), engine)
    assert found.percent == 100
    assert found.num_ops == 1
    assert found.total_gmac - found.weight_gmac == pytest.approx(TOKENS * TOKENS * OUT / 1e9)
    assert found.percent_of_all == pytest.approx(100 * IN / (IN + TOKENS))


def _wrong_axis() -> onnx.ModelProto:
    scales = {"w.s": np.linspace(0.01, 0.02, IN, dtype=np.float32), "w.z": np.zeros(IN, np.int8)}
    return _graph([*_rounded(), _weight(axis=0), _node("MatMul", "x.d w.d", "y")], [TOKENS, IN], **scales)


def _weights_only() -> onnx.ModelProto:
    return _graph([_weight(), _node("MatMul", "x w.d", "y")], [TOKENS, IN])


def _inputs_only() -> onnx.ModelProto:
    return _graph([*_rounded(), _node("MatMul", "x.d w", "y")], [TOKENS, IN])


def _float() -> onnx.ModelProto:
    return _graph([_node("MatMul", "x w", "y")], [TOKENS, IN])


# ONNX Runtime does not look at the axis, and fails when it runs.
@pytest.mark.parametrize(
    ("make", "engine"),
    [(make, engine) for make in (_weights_only, _inputs_only, _float) for engine in ENGINES]
    + [(_wrong_axis, "openvino")],
)
def test_what_an_engine_cannot_compute_in_integers_is_named_and_warned_of(
    make: Any, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = coverage(_file(make()), engine)
    assert found.percent == 0
    assert [op.node for op in found.float32_ops] == ["node of y"]
    assert found.float32_ops[0].gmac == found.weight_gmac > 0
    assert "node of y" in caplog.text
    assert f"in {engine} 0.0 %" in caplog.text
    if make is _inputs_only:
        assert found.alone


def test_a_float_bias_in_a_gemm_is_what_onnxruntime_stumbles_over() -> None:
    model = _graph([*_rounded(), _weight(), _node("Gemm", "x.d w.d b", "y")], [IN])
    found = coverage(_file(model), "onnxruntime")
    assert found.num_integer == 0
    assert set(found.alone) == {"node of x.q", "node of x.d", "node of w.d"}


def test_the_settings_of_the_runtime_are_those_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this fusion on ONNX Runtime multiplies in float, without a word."""
    nodes = [*_rounded(), _weight(), _node("MatMul", "x.d w.d", "p"), _node("Add", "p b", "y")]
    file = _file(_graph(nodes, [IN]))
    assert coverage(file, "onnxruntime").percent == 100
    monkeypatch.setattr(ort, "_DISABLED_OPTIMIZERS", [])
    found = coverage(file, "onnxruntime")
    assert found.percent == 0
    assert [op.node for op in found.float32_ops] == ["node of p"]


def _convolution(*, rounded_after: bool) -> onnx.ModelProto:
    tensors = {"w.int8": np.ones((OUT, 4, 3, 3), np.int8)}
    after = [_node("QuantizeLinear", "c s z", "c.q"), _node("DequantizeLinear", "c.q s z", "c.d")]
    nodes = [*_rounded(), _weight(axis=0), _node("Conv", "x.d w.d", "c", kernel_shape=[3, 3])]
    last = _node("Sigmoid", "c.d" if rounded_after else "c", "y")
    return _graph([*nodes, *(after if rounded_after else []), last], [4, 9, 9], **tensors)


def test_onnxruntime_needs_integers_behind_a_convolution_and_openvino_does_not() -> None:
    with_both, inputs_only = _file(_convolution(rounded_after=True)), _file(_convolution(rounded_after=False))
    assert coverage(with_both, "onnxruntime").percent == 100
    assert coverage(inputs_only, "onnxruntime").percent == 0
    assert coverage(inputs_only, "openvino").percent == 100


@pytest.mark.parametrize("engine", ENGINES)
def test_each_of_two_products_of_one_weight_is_looked_up_by_itself(engine: str) -> None:
    nodes = [*_rounded(), _weight(), _node("MatMul", "x.d w.d", "a"), _node("MatMul", "x w.d", "f")]
    found = coverage(_file(_graph([*nodes, _node("Mul", "a f", "y")], [TOKENS, IN])), engine)
    assert (found.num_integer, found.num_ops) == (1, 2)
    assert [op.node for op in found.float32_ops] == ["node of f"]
    assert found.percent == pytest.approx(50)


@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_without_names_and_with_the_names_of_other_exporters_are_found(engine: str) -> None:
    for name in ("", "/model/layer.0/attention/query/MatMul", "a,b", "x_token_3"):
        model = _right()
        model.graph.node[-1].name = name
        assert coverage(_file(model), engine).percent == 100


def test_a_fixed_batch_counts_one_image_all_the_same() -> None:
    found = [macs_by_node(_graph([_node("MatMul", "x w", "y")], [TOKENS, IN], batch=n)) for n in ("batch", 1, 4)]
    assert found == [{"node of y": TOKENS * IN * OUT}] * 3


def test_where_shapes_are_not_known_every_product_counts_the_same() -> None:
    model = _right()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"
    assert macs_by_node(model) is None
    assert macs_per_image(model) is None
    assert coverage(_file(model), "onnxruntime").percent == 100


def test_a_malformed_list_of_what_openvino_skips_is_refused() -> None:
    manifest = replace(_file(_right()).manifest, quantization={"openvino_skips": [["x.d"]]})
    with pytest.raises(ModelRejected, match="OpenVINO"):
        coverage(open_model(pack(_right().SerializeToString(), manifest)), "openvino")


def test_what_cannot_be_looked_up_gets_one_sentence() -> None:
    with pytest.raises(EngineUnavailable, match="'null'"):
        coverage(_file(_right()), "null")
    broken = _right()
    broken.graph.node[-1].op_type = "MatMool"
    manifest = _file(_right()).manifest
    with pytest.raises(ModelRejected, match="MatMool"):
        coverage(open_model(pack(broken.SerializeToString(), manifest)), "onnxruntime")
