"""Every product with a constant weight becomes integer, however the graph was written, and pixels enter exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.support.kernels import needs_vnni, run_as_defined, sums_exactly
from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.errors import UsageError
from vit_edge.export.graph.preparation import prepare
from vit_edge.export.quantization.calibration.observers import Range, observe_ranges
from vit_edge.export.quantization.coverage import coverage
from vit_edge.export.quantization.qdq.integer_chains import only_for_onnxruntime
from vit_edge.export.quantization.qdq.placement import (
    QuantizedWeight,
    Scheme,
    find_quantizable_ops,
    insert_qdq,
    quantize_weight,
    tensors_to_observe,
)
from vit_edge.export.tracing.fused_vit import DeployedViT
from vit_edge.export.tracing.network import PlainNetwork
from vit_edge.export.tracing.tracer import IR_VERSION, OPSET, trace
from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import Manifest, ModelFile, open_model, pack
from vit_edge.runtime.checks.operators import check_graph
from vit_edge.runtime.engines.protocol import EngineOptions, make_engine

Array = npt.NDArray[Any]
ENGINES = ("onnxruntime", "openvino")
pytestmark = pytest.mark.usefixtures("openvino_in_int8")
RNG = np.random.default_rng(0)
WIDE, OUT = 32, 24


def _weight(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def _graph(
    nodes: list[onnx.NodeProto], tensors: Mapping[str, Array], shape: list[Any], dtype: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", dtype, ["batch", *shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (len(shape) + 1))
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def _run(model: onnx.ModelProto, x: Array, engine: str = "onnxruntime") -> Array:
    if engine == "openvino":
        loaded = make_engine("openvino", _file(model), EngineOptions(threads=1))
        found = loaded.tensors(x, [model.graph.output[0].name])[0]
        loaded.close()
        return found
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def _file(model: onnx.ModelProto, *, skips: bool = True) -> ModelFile:
    name = model.graph.input[0].name
    manifest = Manifest(
        name="m",
        architecture={},
        preprocessing=PREPROCESSING,
        labels=("a",),
        precision="int8",
        provenance={},
        input={"name": name, "dtype": "uint8", "layout": "NHWC"},
        quantization={"openvino_skips": only_for_onnxruntime(model) if skips else []},
    )
    return open_model(pack(model.SerializeToString(), manifest))


def _quantized(model: onnx.ModelProto, images: Array, scheme: Scheme | None = None) -> onnx.ModelProto:
    """Return the INT8 form, calibrated on these very images."""
    prepared, scheme = prepare(model), scheme or Scheme()
    alone = [observe_ranges(prepared, tensors_to_observe(prepared, scheme), [image]) for image in images]
    ranges = {
        name: Range(low=min(one[name].low for one in alone), high=max(one[name].high for one in alone))
        for name in alone[0]
    }
    quantized = insert_qdq(prepared, ranges, scheme=scheme)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _in_engines(model: onnx.ModelProto, images: Array, bits: int) -> list[Array]:
    """Return what both engines compute from weights of so many bits; nothing if this CPU saturates."""
    return [_run(model, images, engine) for engine in ENGINES] if sums_exactly(bits) else []


def _check_numbers(model: onnx.ModelProto, images: Array, *, least_db: float) -> None:
    """Check that the INT8 form is near float by ONNX's definition, and that the engines compute what is defined."""
    expected = _run(model, images)
    for bits in (7, 8):
        quantized = _quantized(model, images, Scheme(weight_bits=bits))
        defined = run_as_defined(quantized, images)
        assert _sqnr_db(expected, defined) > least_db
        for found in _in_engines(quantized, images, bits):
            assert _sqnr_db(expected, found) > least_db
            assert _sqnr_db(defined, found) > 60


def _sqnr_db(reference: Array, found: Array) -> float:
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10((reference**2).sum() / ((reference - found) ** 2).sum()))


def _shared_by_matmul_and_gemm() -> onnx.ModelProto:
    nodes = [_node("MatMul", "x w", "a"), _node("Gemm", "a w", "b", transB=1), _node("MatMul", "b w", "y")]
    return _graph(nodes, {"w": _weight(WIDE, OUT)}, [WIDE])


# How exporters write a product with a constant weight; each takes [batch, tokens, 32] or [batch, 32].
FORMS: dict[str, Callable[[], onnx.ModelProto]] = {
    "matmul": lambda: _graph([_node("MatMul", "x w", "y")], {"w": _weight(WIDE, OUT)}, [5, WIDE]),
    "matmul and bias": lambda: _graph(
        [_node("MatMul", "x w", "a"), _node("Add", "b a", "y")],
        {"w": _weight(WIDE, OUT), "b": _weight(OUT)},
        [5, WIDE],
    ),
    "weight turned by a node": lambda: _graph(
        [_node("Transpose", "w", "t", perm=[1, 0]), _node("MatMul", "x t", "y")], {"w": _weight(OUT, WIDE)}, [5, WIDE]
    ),
    "weight behind an identity": lambda: _graph(
        [_node("Identity", "w", "t"), _node("MatMul", "x t", "y")], {"w": _weight(WIDE, OUT)}, [5, WIDE]
    ),
    "weight in a node": lambda: _graph(
        [_node("Constant", "", "w", value=numpy_helper.from_array(_weight(WIDE, OUT))), _node("MatMul", "x w", "y")],
        {},
        [5, WIDE],
    ),
    "a number without axes in a node": lambda: _graph(
        [
            _node("Constant", "", "i", value=numpy_helper.from_array(np.array(2))),
            _node("Gather", "x i", "g", axis=1),
            _node("MatMul", "g w", "m"),
            _node("Unsqueeze", "m one", "y"),
        ],
        {"w": _weight(WIDE, OUT), "one": np.array([1])},
        [5, WIDE],
    ),
    "weight reshaped by a node": lambda: _graph(
        [_node("Reshape", "w s", "t"), _node("MatMul", "x t", "y")],
        {"w": _weight(2, WIDE // 2, OUT), "s": np.array([WIDE, OUT])},
        [5, WIDE],
    ),
    "weight on the left": lambda: _graph([_node("MatMul", "w x", "y")], {"w": _weight(OUT, 5)}, [5, WIDE]),
    "weight of three axes": lambda: _graph([_node("MatMul", "x w", "y")], {"w": _weight(1, WIDE, OUT)}, [5, WIDE]),
    "gemm": lambda: _graph([_node("Gemm", "x w", "y")], {"w": _weight(WIDE, OUT)}, [WIDE]),
    "gemm, turned, with bias": lambda: _graph(
        [_node("Gemm", "x w b", "y", transB=1)], {"w": _weight(OUT, WIDE), "b": _weight(OUT)}, [WIDE]
    ),
    "gemm with factors": lambda: _graph(
        [_node("Gemm", "x w b", "y", transB=1, alpha=0.5, beta=2.0)],
        {"w": _weight(OUT, WIDE), "b": _weight(1, OUT)},
        [WIDE],
    ),
    "gemm with one number for a bias": lambda: _graph(
        [_node("Gemm", "x w b", "y")], {"w": _weight(WIDE, OUT), "b": np.float32(3)}, [WIDE]
    ),
    "gemm that adds a tensor": lambda: _graph(
        [_node("Slice", "x zero out one", "c"), _node("Gemm", "x w c", "y", alpha=0.5)],
        {"w": _weight(WIDE, OUT), "zero": np.array([0]), "out": np.array([OUT]), "one": np.array([1])},
        [WIDE],
    ),
    "two products of one tensor": lambda: _graph(
        [_node("MatMul", "x w", "a"), _node("MatMul", "x v", "b"), _node("Mul", "a b", "y")],
        {"w": _weight(WIDE, OUT), "v": _weight(WIDE, OUT)},
        [5, WIDE],
    ),
    "one weight for a MatMul and a turned Gemm": _shared_by_matmul_and_gemm,
}


@pytest.mark.parametrize("form", FORMS)
def test_however_a_product_is_written_both_engines_compute_it_in_integers(form: str) -> None:
    model = FORMS[form]()
    num_ops = sum(node.op_type in ("MatMul", "Gemm") for node in model.graph.node)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    images = RNG.normal(size=(6, *shape)).astype(np.float32)
    expected = _run(model, images)
    prepared = prepare(model)
    assert np.abs(_run(prepared, images) - expected).max() < 1e-4
    assert len(find_quantizable_ops(prepared)) == num_ops
    _check_numbers(model, images, least_db=28)
    quantized = _quantized(model, images)
    for engine in ENGINES:
        found = coverage(_file(quantized), engine)
        assert (found.num_integer, found.num_ops, found.alone) == (num_ops, num_ops, ())


def _traced(network: nn.Module, *, pixels: bool = True, size: tuple[int, int] = SIZE) -> onnx.ModelProto:
    wrapped = PlainNetwork(network.eval(), Preprocessing(resize=size, crop=size), pixels=pixels)
    return trace(wrapped, height=size[0], width=size[1], pixels=pixels)


def _random_images(number: int, size: tuple[int, int] = SIZE) -> Array:
    return np.random.default_rng(1).integers(0, 256, (number, *size, 3), dtype=np.uint8)


# Weight of the second convolution over 16 channels, and its attributes.
CONVOLUTIONS: dict[str, tuple[Array, dict[str, Any]]] = {
    "3 x 3": (_weight(24, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strides": (_weight(24, 16, 3, 3), {"strides": [2, 2]}),
    "pointwise": (_weight(24, 16, 1, 1), {}),
    "depthwise": (_weight(16, 1, 5, 5), {"pads": [2, 2, 2, 2], "group": 16}),
    "groups": (_weight(32, 4, 3, 3), {"group": 4}),
    "dilations": (_weight(24, 16, 3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
}


def _chain(kind: str) -> onnx.ModelProto:
    weight, attributes = CONVOLUTIONS[kind]
    nodes = [
        _node("Conv", "x first", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        _node("Relu", "a", "b"),
        _node("Conv", "b second bias", "c", kernel_shape=list(weight.shape[2:]), **attributes),
        _node("Clip", "c zero six", "d"),
        _node("MaxPool", "d", "e", kernel_shape=[2, 2], strides=[2, 2]),
        _node("ReduceMean", "e axes", "f", keepdims=0),
        _node("Gemm", "f head", "g"),
        _node("Reshape", "g shape", "y"),
    ]
    tensors = {
        "first": _weight(16, 3, 3, 3),
        "second": weight,
        "bias": _weight(len(weight)),
        "zero": np.float32(0),
        "six": np.float32(6),
        "axes": np.array([2, 3]),
        "head": _weight(len(weight), 7),
        "shape": np.array([0, 7, 1, 1]),
    }
    return _graph(nodes, tensors, [3, 24, 16])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_integers_go_from_one_convolution_to_the_next(kind: str) -> None:
    model = _chain(kind)
    images = RNG.normal(size=(6, 3, 24, 16)).astype(np.float32)
    _check_numbers(model, images, least_db=25)
    quantized = _quantized(model, images)
    for engine in ENGINES:
        found = coverage(_file(quantized), engine)
        assert (found.num_integer, found.num_ops, found.alone) == (3, 3, ())
        assert found.percent == 100


class _Residual(nn.Module):
    """Sums of integers, a squeeze and excitation, and functions that engines have in float only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.norm(self.first(images)))
        x = x + self.second(x)
        x = x * nn.functional.hardsigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        pooled: torch.Tensor = self.head(x.mean((2, 3)))
        return pooled


@pytest.mark.parametrize("pixels", [True, False])
def test_sums_and_poolings_stay_integers_and_openvino_leaves_out_what_it_does_not_need(pixels: bool) -> None:
    torch.manual_seed(0)
    model = _traced(_Residual(), pixels=pixels)
    pixels_NHWC = _random_images(6)
    images = pixels_NHWC if pixels else PREPROCESSING.normalise(pixels_NHWC)
    quantized = _quantized(model, images, Scheme(weight_bits=7))
    assert min(_with_and_without_skips(model, quantized, images)) > 20
    operators = {node.op_type for node in prepare(model).graph.node}
    assert operators >= {"GlobalAveragePool"}
    for name in ENGINES:
        found = coverage(_file(quantized), name)
        assert (found.num_integer, found.num_ops) == (4, 4)
        assert (found.alone == ()) == (name == "openvino")  # before HardSwish ONNX Runtime goes back to float
    skipped = only_for_onnxruntime(quantized)
    assert "first.dequantized" in skipped
    assert not {f"{op.input}.dequantized" for op in find_quantizable_ops(prepare(model))} & set(skipped)


@needs_vnni
@pytest.mark.parametrize("pixels", [True, False])
def test_what_openvino_leaves_out_brings_it_nearer(pixels: bool) -> None:
    """With 7 bits the error of the weights hides that of what is left out."""
    torch.manual_seed(0)
    model = _traced(_Residual(), pixels=pixels)
    images = _random_images(6) if pixels else PREPROCESSING.normalise(_random_images(6))
    every, fewer = _with_and_without_skips(model, _quantized(model, images), images)
    assert fewer > every > 20


def _with_and_without_skips(model: onnx.ModelProto, quantized: onnx.ModelProto, images: Array) -> list[float]:
    """Return the SQNR of OpenVINO when it rounds everywhere, and when it leaves out what it need not round."""
    found_db = []
    for skips in (False, True):
        engine = make_engine("openvino", _file(quantized, skips=skips), EngineOptions(threads=1))
        found_db.append(_sqnr_db(_run(model, images), engine.tensors(images, ["logits"])[0]))
        engine.close()
    return found_db


def test_mobilenet_is_integer_in_both_engines_and_may_be_loaded() -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(num_classes=5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    size = (64, 64)
    model = _traced(network, size=size)
    images = _random_images(2, size)
    quantized = _quantized(model, images, Scheme(weight_bits=7))
    for engine in ENGINES:
        assert coverage(_file(quantized), engine).percent >= 95
        assert _sqnr_db(_run(model, images), _run(quantized, images, engine)) > 12
    preprocessing = Preprocessing(resize=64, crop=size)
    plain = Manifest(
        name="m",
        architecture={},
        preprocessing=preprocessing,
        labels=tuple("abcde"),
        precision="int8",
        provenance={"form": "plain"},
    )
    check_graph(open_model(pack(quantized.SerializeToString(), plain)))
    assert quantized.opset_import[0].version <= OPSET
    assert quantized.ir_version == IR_VERSION


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("activation", ["uint8", "int8"])
@pytest.mark.parametrize("kind", ["matmul", "convolution", "gemm", "padded convolution"])
def test_pixels_enter_the_first_product_without_error(kind: str, activation: str, bits: int) -> None:
    """Weights that are whole numbers have no error of their own: what is left would be the pixels'."""
    largest = 2 ** (bits - 1) - 1
    weight = RNG.integers(-largest, largest + 1, (2, 3, 4, 4)).astype(np.float32)
    weight[:, 0, 0, 0] = largest
    matrix = weight.reshape(2, 48).T
    cut = [_node("Cast", "x", "c", to=TensorProto.FLOAT)]
    if kind == "matmul":
        nodes, tensors, shape = [*cut, _node("MatMul", "c w", "y")], {"w": matrix}, [9, 48]
    elif kind == "gemm":
        nodes, shape = [*cut, _node("Gemm", "c w b", "y")], [48]
        tensors = {"w": matrix, "b": np.array([1000, -3], np.float32)}
    else:
        pads = [1, 1, 1, 1] if kind == "padded convolution" else [0, 0, 0, 0]
        nodes = [*cut, _node("Conv", "c w", "y", kernel_shape=[4, 4], pads=pads)]
        tensors, shape = {"w": weight}, [3, 8, 8]
    # Without another product that rounds its input OpenVINO takes the network for one whose weights alone are integers.
    last = {"padded convolution": 7, "convolution": 5}.get(kind, 2)
    model = _graph([*nodes, _node("MatMul", "y v", "z")], {**tensors, "v": _weight(last, 8)}, shape, TensorProto.UINT8)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * (len(shape) + 1)))
    images = RNG.integers(0, 256, (4, *shape), dtype=np.uint8)
    images[0] = 255
    scheme = Scheme(activation=activation, weight_bits=bits)  # type: ignore[arg-type]
    prepared = prepare(model)
    exact = kind != "padded convolution" or activation == "uint8"  # int8 zeros around the image would be grey
    assert tensors_to_observe(prepared, scheme) == (["y"] if exact else ["c", "y"])
    if not exact:
        return
    quantized = insert_qdq(prepared, {"y": Range(low=-1e5, high=1e5)}, scheme=scheme)
    expected = _run(model, images)
    for found in (run_as_defined(quantized, images), *_in_engines(quantized, images, bits)):
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_convolution_over_patches_takes_pixels_as_they_are_whatever_normalises_them() -> None:
    torch.manual_seed(0)
    model = _traced(nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(), nn.Linear(192, 400), nn.Linear(400, 5)))
    prepared = prepare(model)
    first = find_quantizable_ops(prepared)[0]
    assert first.takes_pixels
    assert first.operator == "MatMul"
    images = _random_images(5)
    assert _sqnr_db(_run(model, images), _run(prepared, images)) > 100
    quantized = _quantized(model, images)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    assert (tensors["pixels.scale"], tensors["pixels.zero_point"]) == (1, 0)
    for engine in ENGINES:
        assert coverage(_file(quantized), engine).percent == 100


def test_pixels_divided_and_shifted_in_another_order_are_folded_as_exactly() -> None:
    tensors = {
        "s": np.float32(255),
        "m": np.array([0.5, 0.4, 0.3], np.float32).reshape(1, 3, 1, 1),
        "d": np.array([0.2, 0.3, 0.4], np.float32).reshape(3, 1, 1),
        "w": _weight(8, 3, 4, 4),
        "v": _weight(4, 100),
    }
    nodes = [
        _node("Cast", "x", "c", to=TensorProto.FLOAT),
        _node("Div", "c s", "p"),
        _node("Sub", "p m", "q"),
        _node("Div", "q d", "n"),
        _node("Conv", "n w", "f", kernel_shape=[4, 4], strides=[4, 4]),
        _node("MatMul", "f v", "y"),
    ]
    model = _graph(nodes, tensors, [3, 16, 16], TensorProto.UINT8)
    prepared = prepare(model)
    images = RNG.integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    assert _sqnr_db(_run(model, images), _run(prepared, images)) > 100
    assert [op.takes_pixels for op in find_quantizable_ops(prepared)] == [True, False]


def test_batch_normalisation_goes_into_the_convolution_before_it() -> None:
    tensors = {"w": _weight(8, 3, 3, 3), **{name: np.abs(_weight(8)) + 0.1 for name in ("g", "b", "m", "v")}}
    nodes = [_node("Conv", "x w", "c", kernel_shape=[3, 3]), _node("BatchNormalization", "c g b m v", "y")]
    model = _graph(nodes, tensors, [3, 9, 9])
    prepared = prepare(model)
    images = RNG.normal(size=(2, 3, 9, 9)).astype(np.float32)
    assert [node.op_type for node in prepared.graph.node] == ["Conv"]
    assert np.abs(_run(prepared, images) - _run(model, images)).max() < 1e-4


@pytest.mark.parametrize("bits", [7, 8])
def test_a_weight_is_rounded_to_the_nearest_along_any_axis(bits: int) -> None:
    array = _weight(6, 5, 4)
    array[3] = 0
    found = quantize_weight(array, axis=0, bits=bits)
    largest = 2 ** (bits - 1) - 1
    assert np.abs(found.integers).max() == largest
    assert (found.integers[3] == 0).all()
    restored = found.integers * found.scales.reshape(6, 1, 1)
    assert (np.abs(restored - array) <= found.scales.reshape(6, 1, 1) * 0.5001).all()
    other = quantize_weight(np.moveaxis(array, 0, 2), axis=2, bits=bits)
    assert (np.moveaxis(other.integers, 2, 0) == found.integers).all()
    assert (other.scales == found.scales).all()


@pytest.mark.parametrize("operator", ["Gemm", "Conv"])
def test_a_channel_that_is_all_bias_keeps_its_bias(operator: str) -> None:
    weight = _weight(4, 3, 1, 1)
    weight[1], weight[2] = 0, weight[2] * 1e-12
    bias = np.array([1, 2, 3, 4], np.float32)
    if operator == "Gemm":
        model = _graph([_node("Gemm", "x w b", "y", transB=1)], {"w": weight.reshape(4, 3), "b": bias}, [3])
        images = RNG.normal(size=(5, 3)).astype(np.float32)
    else:
        nodes = [_node("Conv", "x w b", "c", kernel_shape=[1, 1]), _node("Relu", "c", "r"), _node("Sigmoid", "r", "y")]
        model = _graph(nodes, {"w": weight, "b": bias}, [3, 4, 4])
        images = RNG.normal(size=(5, 3, 4, 4)).astype(np.float32)
    quantized = _quantized(model, images, Scheme(weight_bits=7))
    expected = _run(model, images)
    for engine in ENGINES:
        assert np.abs(_run(quantized, images, engine) - expected).max() < 0.05


def test_activations_as_small_as_those_of_an_untrained_network_keep_their_steps() -> None:
    model = FORMS["matmul and bias"]()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "b")
    weight.CopyFrom(numpy_helper.from_array(np.zeros(OUT, np.float32), "b"))
    images = RNG.normal(size=(4, 5, WIDE)).astype(np.float32) * np.float32(1e-12)
    _check_numbers(model, images, least_db=28)


def test_weights_rounded_elsewhere_and_ranges_of_ones_own_are_taken() -> None:
    model = prepare(FORMS["matmul"]())
    weight = QuantizedWeight(
        integers=RNG.integers(-9, 9, (WIDE, OUT)).astype(np.int8), scales=np.full(OUT, 0.5, np.float32)
    )
    quantized = insert_qdq(model, {"x": Range(low=-1.0, high=254.0)}, weights={"w": weight})
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    assert (tensors["w.quantized"] == weight.integers).all()
    assert (tensors["w.scale"] == 0.5).all()
    assert (tensors["x.scale"], tensors["x.zero_point"]) == (1, 1)
    images = RNG.integers(-1, 255, (2, 5, WIDE)).astype(np.float32)
    assert np.allclose(_run(quantized, images), images @ (weight.integers * np.float32(0.5)))


def test_symmetric_activations_have_zero_in_the_middle() -> None:
    images = RNG.normal(size=(4, 5, WIDE)).astype(np.float32)
    quantized = _quantized(FORMS["matmul and bias"](), images, Scheme(activation="int8"))
    points = [t for t in quantized.graph.initializer if t.name.endswith("zero_point")]
    assert {t.data_type for t in points} == {TensorProto.INT8}
    assert all((numpy_helper.to_array(t) == 0).all() for t in points)
    for engine in ENGINES:
        assert coverage(_file(quantized), engine).percent == 100


def test_what_is_excluded_stays_float_and_the_rest_does_not() -> None:
    model = FORMS["two products of one tensor"]()
    images = RNG.normal(size=(4, 5, WIDE)).astype(np.float32)
    quantized = _quantized(model, images, Scheme(exclude=frozenset(["a"])))
    for engine in ENGINES:
        found = coverage(_file(quantized), engine)
        assert [op.node for op in found.float32_ops] == ["a"]
        assert found.percent == pytest.approx(50)
    everything = _quantized(model, images, Scheme(exclude=frozenset(["a", "b"])))
    assert {node.op_type for node in everything.graph.node} == {"MatMul", "Mul"}


def test_what_cannot_be_quantized_gets_one_sentence() -> None:
    model = FORMS["matmul"]()
    with pytest.raises(UsageError, match="no quantizable op has the name nothing"):
        tensors_to_observe(model, Scheme(exclude=frozenset(["nothing"])))
    with pytest.raises(UsageError, match="no MatMul, Gemm or Conv"):
        tensors_to_observe(_graph([_node("Relu", "x", "y")], {}, [3]))
    old = FORMS["matmul"]()
    old.opset_import[0].version = 11
    with pytest.raises(UsageError, match="the file has opset 11"):
        tensors_to_observe(old)
    with pytest.raises(UsageError, match="weight_bits is 4"):
        Scheme(weight_bits=4)
    with pytest.raises(UsageError, match="'float8'"):
        Scheme(activation="float8")  # type: ignore[arg-type]


def test_the_fused_graph_of_a_vision_transformer_needs_no_preparation() -> None:
    deployed = DeployedViT(random_network(small_config()), PREPROCESSING, pixels=True)
    model = trace(deployed.eval(), height=SIZE[0], width=SIZE[1])
    assert prepare(model).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    ops = find_quantizable_ops(model)
    assert [op.takes_pixels for op in ops] == [True, *[False] * (len(ops) - 1)]
    inputs = dict.fromkeys(op.input for op in ops[1:])
    assert tensors_to_observe(model) == list(inputs)
    quantized = _quantized(model, _random_images(4))
    assert _quantized(model, _random_images(4)).SerializeToString() == quantized.SerializeToString()
    for engine in ENGINES:
        found = coverage(_file(quantized), engine)
        assert (found.percent, found.alone) == (100, ())
        assert found.total_gmac > found.weight_gmac  # attention has no weights
