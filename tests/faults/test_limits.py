"""Limits that hold before any work: each row is a file that is sealed as ours, and the sentence that refuses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.faults.hostile_models import appended, resealed, resealed_ir
from vit_edge.errors import ModelRejected
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import open_model
from vit_edge.model_file.onnx_schema import parse
from vit_edge.runtime import installed_engines, load
from vit_edge.runtime.checks import tensor_sizes
from vit_edge.runtime.checks.tensor_sizes import size_problems

Change = Callable[[onnx.ModelProto], object]


def doubled(times: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        name = "logits"
        for number in range(times):
            node = helper.make_node("Concat", [name, name], [f"d{number}"], axis=1)
            model.graph.node.append(node)
            name = f"d{number}"

    return change


def listed(*entries: tuple[str, int]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        del model.opset_import[:]
        for domain, version in entries:
            model.opset_import.add(domain=domain, version=version)

    return change


def filled(model: onnx.ModelProto) -> None:
    tensors = (numpy_helper.from_array(np.zeros(1, np.float32), f"t{i}") for i in range(20_001))
    model.graph.initializer.extend(tensors)


def wide_convolution(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((8, 7, 1, 1), np.float32), "filters"))
    appended("Unsqueeze", "logits", axes=np.array([2, 3]), output="four")(model)
    node = helper.make_node("Conv", ["four", "filters"], ["wide"], pads=[4096, 4096, 4096, 4096])
    model.graph.node.append(node)


def named(tensor: str, inputs: list[str], kind: str) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(kind, inputs, [tensor], name=tensor))


def with_a_graph_inside(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["x"], name="n", body=inner))


def with_a_constant_outside(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    model.graph.node.append(helper.make_node("Constant", [], ["x"], name="n", value=tensor))


def with_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


GRAPHS: dict[str, tuple[Change, str]] = {
    "24 doubling Concats": (doubled(25), "Concat.* values for one image"),
    "Pad of 2^14": (appended("Pad", "logits", pads=np.array([0, 0, 2**14, 2**14])), "Pad.*values for one"),
    "Pad of 2^62": (appended("Pad", "logits", pads=np.array([0, 0, 2**62, 0])), "Pad.*values for one image"),
    "Expand": (appended("Expand", "logits", shape=np.array([2**40, 1, 7])), "Expand.*values for one image"),
    "Tile": (appended("Tile", "logits", repeats=np.array([1, 2**30])), "Tile.*values for one image"),
    "ConstantOfShape": (appended("ConstantOfShape", shape=np.array([2**20, 2**20])), "ConstantOfShape.*values for one"),
    "Range": (appended("Range", a=np.array(0), b=np.array(2**60), c=np.array(1)), "Range.*values for one image"),
    "Conv with pads": (wide_convolution, "Conv.*values for one image"),
    "domain twice": (listed(("", 20), ("ai.onnx", 20)), "operator set is listed twice"),
    "domain twice, hostile first": (listed(("ai.onnx", 2**62), ("", 20)), "operator set is listed twice"),
    "version of another domain": (listed(("", 20), ("com.microsoft", 2**62)), "has the version 4611686018427387904"),
    "opset entries": (listed(("", 20), *((f"d{i}", 1) for i in range(16))), "17 opset entries; at most 16"),
    "initializers": (filled, "initializers; at most 20,000"),
    "inputs": (lambda m: m.graph.input.extend([m.graph.input[0]] * 3), "4 inputs; at most 1"),
    "inputs of nodes": (named("wide", ["logits"] * 60_000, "Sum"), "inputs of nodes; at most 50,000"),
    "empty bias": (named("n", ["logits", "logits", ""], "LayerNormalization"), "no input 2, which is required"),
    "empty weight": (named("n", ["logits", ""], "MatMul"), "no input 1, which is required"),
    "two inputs": (named("n", ["logits", "logits"], "LayerNormalization"), "2 inputs; at least 3 are needed"),
    "an input from nowhere": (named("n", ["nowhere"], "Relu"), "reads what no node before it makes"),
    "a graph inside a node": (with_a_graph_inside, "node 'n' holds a graph of its own"),
    "a constant in another file": (with_a_constant_outside, "a constant of node 'n' lies in another file"),
    "another output": (lambda m: setattr(m.graph.output[0], "name", "x"), "the manifest says otherwise"),
    "an output without a shape": (lambda m: m.graph.output[0].type.tensor_type.ClearField("shape"), "has no shape"),
    "a fixed batch": (with_batch, "the batch is fixed at 4"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_graph_over_a_limit_is_refused_before_any_engine_sees_it(small_model: Path, fault: str) -> None:
    change, reason = GRAPHS[fault]
    data = resealed(small_model / "m.onnx", change)
    before = time.process_time()
    for engine in installed_engines():
        with pytest.raises(ModelRejected, match=reason):
            load(data, engine=engine)  # type: ignore[arg-type]
    assert time.process_time() - before < 5


def in_xml(old: str, new: str) -> Callable[[str], str]:
    return lambda xml: xml.replace(old, new, 1)


_LAYER = '<layer id="9" name="n" type="{}" version="opset1">{}</layer>'
_PORT = '<port id="0" precision="FP32"><dim>{}</dim><dim>7</dim></port>'
_DATA = '<data element_type="{}" shape="{}" offset="{}" size="{}" />'


def layer(text: str, times: int = 1) -> Callable[[str], str]:
    return in_xml("<layers>", f"<layers>{text * times}")


def ports(dim: str, times: int = 1) -> Callable[[str], str]:
    return layer(_LAYER.format("ReLU", f"<output>{_PORT.format(dim) * times}</output>"))


def constant(kind: str = "f32", shape: str = "2", offset: str = "0", size: str = "8") -> Callable[[str], str]:
    return layer(_LAYER.format("Const", _DATA.format(kind, shape, offset, size)))


IRS: dict[str, tuple[Callable[[str], str], str]] = {
    "tags": (in_xml("</edges>", "</edges>" + "<a/>" * 1_000_000), "tags; at most 1,000,000 are read"),
    "layers": (layer(_LAYER.format("ReLU", ""), 20_000), r"20,\d+ layers; at most 20,000"),
    "edges": (in_xml("<edges>", "<edges>" + "<edge />" * 40_000), r"40,\d+ edges; at most 40,000"),
    "inputs": (layer(_LAYER.format("Parameter", "")), "2 inputs; at most 1"),
    "outputs": (layer(_LAYER.format("Result", ""), 6), "7 outputs; at most 6"),
    "another layer": (layer(_LAYER.format("ReadValue", "")), "opset1.ReadValue, which is not allowed"),
    "an extension": (in_xml('version="opset1"', 'version="extension"'), "extension.*which is not allowed"),
    "a loop": (layer(_LAYER.format("ReLU", "<body/>")), "which is not allowed"),
    "ports": (ports("1", 1001), "'n' has 1,001 ports; at most 1,000"),
    "a large port": (ports("99999999"), "a port of 699,999,993 values for one image"),
    "a shape of text": (ports("x"), r"a port of the shape \['x', '7'\]"),
    "a shape of many digits": (ports("9" * 5000), "a port of the shape"),
    "a constant over the end": (constant(offset="99999999"), "8 bytes at 99999999 for the shape"),
    "a constant before the start": (constant(offset="-8"), "8 bytes at -8 for the shape"),
    "a constant too short for its shape": (constant(shape="1024,1024"), r"8 bytes at 0 for the shape \[1024, 1024\]"),
    "a constant of an unknown type": (constant(kind="string"), "no known type, place or shape"),
    "a constant without a place": (constant(offset=""), "no known type, place or shape"),
}  # fmt: skip


@pytest.mark.parametrize("fault", IRS)
def test_an_ir_over_a_limit_is_refused_before_the_engine_sees_it(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("the sandbox was started"))
    change, reason = IRS[fault]
    weights = (small_model / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(weights)
    (tmp_path / "m.xml").write_bytes(resealed_ir(change((small_model / "m.xml").read_text()).encode(), weights))
    with pytest.raises(ModelRejected, match=reason) as caught:
        load(tmp_path / "m.xml")
    assert caught.value.exit_code == 3


def test_an_ir_that_is_changed_back_still_loads(small_model: Path, tmp_path: Path) -> None:
    weights = (small_model / "m.bin").read_bytes() + bytes(64)  # more than any constant needs
    (tmp_path / "m.bin").write_bytes(weights)
    (tmp_path / "m.xml").write_bytes(resealed_ir((small_model / "m.xml").read_bytes(), weights))
    with load(tmp_path / "m.xml") as classifier:
        assert classifier.describe()["engine"] == "openvino"


GOLDEN: dict[str, tuple[dict[str, Any], str]] = {
    "no engines": ({"expected": [{"engines": None}]}, r"golden.expected\[0\].engines is None"),
    "engines are a number": ({"expected": [{"engines": -1}]}, r"golden.expected\[0\].engines is -1"),
    "an engine is a list": ({"expected": [{"engines": [[]]}]}, r"golden.expected\[0\].engines\[0\] is \[\]"),
    "no list": ({"expected": {"a": 1}}, "golden.expected is {'a': 1}; a list is needed"),
    "seeds": ({"seeds": [0, True]}, r"golden.seeds\[1\] is True"),
    "a seed of 2^80": ({"seeds": [2**80]}, r"golden.seeds\[0\] is 12089"),
    "65 seeds": ({"seeds": [*range(65)]}, "golden.seeds has 65 inputs; 1 to 64"),
    "images": ({"images": [{}] * 9}, "golden.images has 9 images; at most 8"),
    "an image": ({"images": [{"format": 3}]}, r"golden.images\[0\].format is 3"),
    "a large image": (
        {"images": [{"format": "PNG", "data": "A" * 1_000_001, "pixels_sha256": ""}]},
        r"golden.images\[0\].data has 1,000,001 characters",
    ),
    "a tolerance": (
        {"expected": [{"engines": [], "logits": "", "tolerance": {"absolute": "x"}}]},
        r"golden.expected\[0\].tolerance.absolute is 'x'",
    ),
}


@pytest.mark.parametrize("fault", GOLDEN)
def test_malformed_golden_vectors_are_refused_by_field(small_model: Path, fault: str) -> None:
    changes, reason = GOLDEN[fault]
    model = open_model(small_model / "m.onnx", warn=False)
    data = model.with_manifest(replace(model.manifest, golden={**(model.manifest.golden or {}), **changes}))
    with pytest.raises(ModelRejected, match=reason) as caught:
        load(data)
    assert caught.value.exit_code == 3


def test_golden_inputs_of_too_many_pixels_are_refused(small_model: Path) -> None:
    model = open_model(small_model / "m.onnx", warn=False)
    large = Preprocessing(resize=(4000, 4000), crop=(4000, 4000))
    data = model.with_manifest(replace(model.manifest, preprocessing=large))
    with pytest.raises(ModelRejected, match=r"golden\.seeds makes 128,000,000 pixels"):
        load(data)


def test_shape_inference_agrees_with_onnx_on_every_tensor(small_model: Path) -> None:
    """A model of ours with a batch of one: what is inferred here is what onnx infers."""
    model = onnx.load(small_model / "m.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    expected = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    }
    graph = parse(model.SerializeToString()).graph
    sizes = tensor_sizes._Sizes(graph)
    for node in graph.node:
        shapes, _ = tensor_sizes._inferred(tensor_sizes._Node(node, sizes))
        sizes.shapes |= dict(zip(node.output, shapes, strict=True))
    assert {name: sizes.shapes[name] for name in expected if all(expected[name])} == {
        name: shape for name, shape in expected.items() if all(shape)
    }
    assert list(size_problems(graph)) == []


# Input shape, operator, attributes, constant inputs: what small networks of ours do not hold.
OPERATORS: dict[str, tuple[tuple[int, ...], str, dict[str, Any], tuple[Any, ...]]] = {
    "average pool": ((1, 3, 9, 8), "AveragePool", {"kernel_shape": [2, 3], "strides": [2, 1]}, ()),
    "average pool, rounded up": (
        (1, 3, 9, 8), "AveragePool", {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}, ()
    ),
    "max pool": (
        (1, 3, 9, 8), "MaxPool", {"kernel_shape": [2, 2], "pads": [1, 0, 1, 1], "dilations": [2, 1]}, ()
    ),
    "global pool": ((1, 3, 9, 8), "GlobalAveragePool", {}, ()),
    "gather": ((1, 5, 4), "Gather", {"axis": 1}, (np.zeros((2, 3), np.int64),)),
    "mean": ((1, 5, 4), "ReduceMean", {}, (np.array([-1]),)),
    "mean of all": ((1, 5, 4), "ReduceMean", {"keepdims": 0}, ()),
    "arg max": ((1, 5, 4), "ArgMax", {"axis": 1, "keepdims": 0}, ()),
    "flatten": ((1, 5, 4), "Flatten", {"axis": 2}, ()),
    "squeeze": ((1, 5, 1, 4), "Squeeze", {}, (np.array([2]),)),
    "squeeze all": ((1, 5, 1, 4), "Squeeze", {}, ()),
    "gemm, both transposed": ((5, 4), "Gemm", {"transA": 1, "transB": 1}, (np.zeros((6, 5), np.float32),)),
    "largest": ((1, 5, 4), "TopK", {"axis": 1}, (np.array([2]),)),
    "tile": ((1, 5, 4), "Tile", {}, (np.array([1, 2, 3]),)),
    "expand": ((1, 5, 1), "Expand", {}, (np.array([2, 1, 7]),)),
    "pad of some axes": ((1, 5, 4), "Pad", {}, (np.array([1, 2]), np.float32(0), np.array([2]))),
    "convolution": ((1, 3, 9, 8), "Conv", {"strides": [2, 2]}, (np.zeros((6, 3, 3, 3), np.float32),)),
    "normalization": ((1, 5, 4), "LayerNormalization", {}, (np.zeros(4, np.float32), np.zeros(4, np.float32))),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_the_shape_of_an_operator_is_that_of_onnx(name: str) -> None:
    shape, operator, attributes, constants = OPERATORS[name]
    outputs = ["y", "z"] if operator == "TopK" else ["y"]
    names = [f"c{number}" for number in range(len(constants))]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], outputs, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.ValueInfoProto(name=output) for output in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in zip(names, constants, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
    expected = [tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in found]
    ours = parse(model.SerializeToString()).graph
    assert tensor_sizes._inferred(tensor_sizes._Node(ours.node[0], tensor_sizes._Sizes(ours)))[0] == expected


def test_values_whose_bytes_do_not_fill_their_shape_are_not_folded(small_model: Path) -> None:
    """The fuzzer found it: a shape's bytes that end in the middle of a number."""

    def cut(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64:
                tensor.raw_data = tensor.raw_data[:-3]

    with pytest.raises(ModelRejected):
        load(resealed(small_model / "m.onnx", cut), engine="onnxruntime")
