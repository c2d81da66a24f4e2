"""Each algorithm does what it says: the exact ones leave the function alone, the others bring the outputs nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.support.networks import FAMILIES, SIZE, write_checkpoint
from vit_edge.errors import UsageError
from vit_edge.export import export_onnx
from vit_edge.export.graph.intermediate_tensors import logits_of
from vit_edge.export.graph.macs import macs_by_node, shapes_for_one_image
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.graph.preparation import prepare
from vit_edge.export.quantization.algorithms.cross_layer_equalization import count_attentions, equalize, find_mixings
from vit_edge.export.quantization.algorithms.gptq_rounding import output_error, round_weights
from vit_edge.export.quantization.algorithms.mixed_precision import choose_float
from vit_edge.export.quantization.algorithms.range_search import search_range
from vit_edge.export.quantization.algorithms.recipes import ALGORITHMS, EFFORTS, RECIPES, Algorithm, choose_algorithms
from vit_edge.export.quantization.algorithms.reconstruction import reconstruct
from vit_edge.export.quantization.algorithms.segments import SegmentRunner, divide
from vit_edge.export.quantization.calibration.observers import ChannelRange, Range, observe_channels, observe_min_max
from vit_edge.export.quantization.qdq.integers import quantize_weight
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq, tensors_to_observe
from vit_edge.export.tracing.tracer import trace
from vit_edge.metrics import sqnr_db
from vit_edge.runtime.checks.golden import golden_images

Array = npt.NDArray[Any]
IMAGES = golden_images(range(300, 324), height=SIZE[0], width=SIZE[1])


def exported(folder: Path, **changes: Any) -> onnx.ModelProto:
    """Return the float graph of a small network in which nothing is zero or one."""
    export_onnx(write_checkpoint(folder / "c.safetensors", **changes), out=folder / "m.onnx")
    model = onnx.load(folder / "m.onnx")
    del model.metadata_props[:]
    return model


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return exported(tmp_path_factory.mktemp("graph"), depth=3)


def outputs(model: onnx.ModelProto, images: Array = IMAGES) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in images])


def known_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {name: shape for name, shape in shapes_for_one_image(model).items() if shape is not None}


def ranges_of(model: onnx.ModelProto) -> tuple[Mapping[str, Range], Mapping[str, Range]]:
    return observe_min_max(model, tensors_to_observe(model), IMAGES)


def fitted(model: onnx.ModelProto, *algorithms: Algorithm, bits: int = 8, images: Array = IMAGES) -> onnx.ModelProto:
    start, limits = ranges_of(model)
    scheme = Scheme(weight_bits=bits)
    found = reconstruct(
        model,
        start,
        limits,
        find_quantizable_ops(model),
        [image[None] for image in images],
        scheme=scheme,
        algorithms=frozenset(algorithms),
        effort=EFFORTS["balanced"],
    )
    return insert_qdq(found.model, found.ranges, scheme=scheme, weights=found.weights)


def test_segments_are_the_residual_blocks_and_together_the_network(graph: onnx.ModelProto) -> None:
    segments = divide(graph, {op.node for op in find_quantizable_ops(graph)})
    assert [node.name for segment in segments for node in segment.nodes] == [node.name for node in graph.graph.node]
    assert segments[0].input == "images"
    assert segments[-1].output == "logits"
    assert all(left.output == right.input for left, right in pairwise(segments))
    holding = [
        {p.node for p in find_quantizable_ops(graph) if any(n.name == p.node for n in s.nodes)} for s in segments
    ]
    assert {"block.1.fc1", "block.1.fc2"} in holding
    assert {"block.1.attention.qkv", "block.1.attention.proj"} in holding
    value: Array = IMAGES[:1]
    for segment in segments:
        value = SegmentRunner(graph, segment).run(value, {})[0]
    np.testing.assert_allclose(value, outputs(graph, IMAGES[:1]), rtol=1e-4, atol=1e-4)


def test_a_graph_that_never_narrows_is_one_segment() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="a"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="b"),
        helper.make_node("Add", ["a", "x"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["logits"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "logits"))
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]))
    segments = divide(model, {"a", "b"})
    assert [(segment.input, segment.output) for segment in segments] == [("x", "logits")]


@pytest.mark.parametrize("family", ["class_token", "mean_beside_class_token", "deit_distilled", "registers", "clip"])
def test_cross_layer_equalization_leaves_the_function_alone_and_evens_the_channels(tmp_path: Path, family: str) -> None:
    model = exported(tmp_path, **FAMILIES[family])
    mixings = find_mixings(model, known_shapes(model))
    assert len(mixings) == 2
    ranges = observe_channels(model, [mixing.input for mixing in mixings], IMAGES)
    changed = equalize(model, mixings, ranges)
    assert sqnr_db(outputs(model), outputs(changed)) > 90
    first = mixings[0].input
    before, after = (observe_channels(m, [first], IMAGES)[first] for m in (model, changed))
    assert _unevenness(after) < 0.8 * _unevenness(before)
    middle_D = (after.low_D + after.high_D) / 2
    assert np.abs(middle_D).max() < 1e-3 * (after.high_D - after.low_D).max()


def _unevenness(observed: ChannelRange) -> float:
    width_D = observed.high_D - observed.low_D
    return float(width_D.max() / width_D.min())


def test_values_that_someone_else_reads_are_left_alone(graph: onnx.ModelProto) -> None:
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    first = find_mixings(graph, known_shapes(graph))[0]
    watched.graph.node.append(helper.make_node("Relu", [first.input], ["unused"], name="reader"))
    assert first not in find_mixings(watched, known_shapes(graph))
    assert len(find_mixings(watched, known_shapes(graph))) == 2


class _Attention(nn.Module):
    """Attention as timm, torchvision and others write it: one projection, taken apart in several ways."""

    def __init__(self, form: str, *, bias: bool = True) -> None:
        super().__init__()
        self.form, self.qkv, self.proj = form, nn.Linear(24, 72, bias=bias), nn.Linear(24, 24)

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = self.qkv(x_BTD)
        shape = (*x_BTD.shape[:2], 2, 12)
        if self.form == "chunks":
            q, k, v = (part.reshape(shape).transpose(1, 2) for part in parts.chunk(3, dim=-1))
        else:
            turned = parts.reshape(*x_BTD.shape[:2], 3, 2, 12).permute(2, 0, 3, 1, 4)
            q, k, v = turned.unbind(0) if self.form == "unbind" else (turned[0], turned[1], turned[2])
        q = q + 0.1 * v if self.form == "values in queries" else q
        mixed_BNTD = (q @ k.transpose(-2, -1) * 12**-0.5).softmax(-1) @ v
        found: Tensor = x_BTD + self.proj(mixed_BNTD.transpose(1, 2).reshape(x_BTD.shape))
        return found


def test_cross_layer_equalization_finds_the_values_of_one_projection_in_traced_networks() -> None:
    torch.manual_seed(0)
    forms = ("unbind", "index", "chunks", "values in queries")
    attentions = [_Attention(form) for form in forms] + [_Attention("unbind", bias=False)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(24 * 16, 5))
    for parameter in nn.ModuleList(attentions).parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.zeros_(attentions[1].proj.bias)  # exporters keep equal biases once
    nn.init.zeros_(attentions[2].proj.bias)
    network = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.Flatten(2), _Turned(), *attentions, head).eval()
    graph = prepare(trace(network, height=16, width=16, pixels=False))
    mixings = find_mixings(graph, known_shapes(graph))
    assert (len(mixings), count_attentions(graph)) == (4, 5)
    assert [mixing.value.bias is None for mixing in mixings] == [False, False, False, True]
    assert all({*mixing.columns_D} == {*range(48, 72)} for mixing in mixings)
    random = np.random.default_rng(0)
    low_D = random.normal(size=24)
    ranges = {mixing.input: ChannelRange(low_D=low_D, high_D=low_D + random.uniform(0.1, 5, 24)) for mixing in mixings}
    images = [random.normal(size=(1, 3, 16, 16)).astype(np.float32) for _ in range(4)]
    found = [logits_of(model, images) for model in (graph, equalize(graph, mixings, ranges))]
    assert sqnr_db(*found) > 100
    assert not np.array_equal(*found)


class _Turned(nn.Module):
    def forward(self, x_BDT: Tensor) -> Tensor:
        return x_BDT.transpose(1, 2)


def test_optimised_rounding_errs_less_than_the_nearest_and_sweeps_only_help() -> None:
    random = np.random.default_rng(0)
    mixing_II = random.normal(size=(48, 48)) * np.exp(random.normal(size=48))
    inputs_RI = random.normal(size=(500, 48)) @ mixing_II
    weight_IO, moments_II = random.normal(size=(48, 20)), inputs_RI.T @ inputs_RI
    nearest = quantize_weight(weight_IO.astype(np.float32), axis=1, bits=7)
    errors = [output_error(weight_IO - nearest.integers * nearest.scales, moments_II).sum()]
    for sweeps in (0, 1, 4, 16):
        found = round_weights(weight_IO, moments_II, bits=7, sweeps=sweeps)
        assert np.abs(found.integers).max() <= 63
        errors.append(output_error(weight_IO - found.integers * found.scales.astype(np.float64), moments_II).sum())
    assert errors[1] < 0.5 * errors[0]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors[1:]))


def test_rounding_survives_inputs_that_never_vary_and_dead_outputs() -> None:
    weight_IO = np.random.default_rng(0).normal(size=(8, 4))
    weight_IO[:, 1] = 0
    moments_II = np.zeros((8, 8))
    moments_II[2, 2] = 1.0
    for moments in (moments_II, np.zeros((8, 8))):
        found = round_weights(weight_IO, moments, bits=8, sweeps=4)
        assert np.isfinite(found.scales).all()
        assert (found.integers[:, 1] == 0).all()


def test_a_range_search_finds_a_narrow_and_a_wide_best_and_never_leaves_the_limit() -> None:
    limit = Range(low=-2.0, high=8.0)
    for best in (0.5, 3.0, 7.9):
        found = search_range(lambda r, b=best: abs(r.high - b), Range(low=-0.5, high=2.0), limit=limit, steps=30)  # type: ignore[misc]
        assert found.high == pytest.approx(best, rel=0.1)
        assert limit.low <= found.low <= 0 <= found.high <= limit.high
    start = Range(low=-0.5, high=2.0)
    assert search_range(lambda r: float(r != start), start, limit=limit, steps=8) == start


@pytest.mark.parametrize("bits", [8, 7])
def test_each_algorithm_brings_the_logits_nearer(graph: onnx.ModelProto, bits: int) -> None:
    others = golden_images(range(400, 432), height=SIZE[0], width=SIZE[1])
    expected = outputs(graph, others)
    sets: Sequence[tuple[Algorithm, ...]] = [
        (),
        ("range-search",),
        ("gptq-rounding",),
        ("range-search", "gptq-rounding"),
    ]
    found = {chosen: sqnr_db(expected, outputs(fitted(graph, *chosen, bits=bits), others)) for chosen in sets}
    assert found["range-search", "gptq-rounding"] > found[()] + 0.5, found
    assert found[("gptq-rounding",)] > found[()] - 0.3, found
    corrected = sqnr_db(expected, outputs(fitted(graph, "bias-correction", bits=bits), others))
    assert corrected > found[()] - 0.5


def test_bias_correction_takes_away_what_is_wrong_on_average(graph: onnx.ModelProto) -> None:
    expected = outputs(graph)
    plain, corrected = (outputs(fitted(graph, *chosen, bits=7)) for chosen in ((), ("bias-correction",)))  # type: ignore[arg-type]
    off_K, left_K = (np.abs((found - expected).mean(axis=0)) for found in (plain, corrected))
    assert left_K.mean() < 0.5 * off_K.mean()


def test_products_that_err_most_for_their_cost_stay_float(graph: onnx.ModelProto) -> None:
    ops, macs = find_quantizable_ops(graph), macs_by_node(graph)
    assert macs is not None
    noise = {op.node: 1e-6 for op in ops}
    noise["head"], noise["block.0.fc2"] = 1e-3, 1e-2
    left = choose_float(graph, ops, noise)
    assert {"head", "block.0.fc2"} <= left
    assert "patches" not in left
    total = sum(macs[op.node] for op in ops)
    assert sum(macs[node] for node in left) <= 0.15 * total


def test_recipes_are_lists_of_algorithms_that_can_be_changed() -> None:
    assert choose_algorithms("fast") == RECIPES["fast"]
    assert "mixed-precision" in choose_algorithms("accurate")
    assert choose_algorithms("fast", algorithms=["gptq-rounding", "repq"]) == ("repq", "gptq-rounding")
    assert choose_algorithms("fast", without=["attention-scores"]) == choose_algorithms(
        "accurate", without=["mixed-precision"]
    )
    assert choose_algorithms("fast", without=ALGORITHMS) == ()
    with pytest.raises(UsageError, match="adaround"):
        choose_algorithms("fast", algorithms=["adaround"])
    with pytest.raises(UsageError, match="slow"):
        choose_algorithms("slow")  # type: ignore[arg-type]
