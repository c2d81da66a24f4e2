"""How far a float32 file may be from PyTorch: right networks pass whatever their logits' scale, 1 % off does not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tests.support.networks import PREPROCESSING, SIZE, small_config
from vit_edge.checkpoint import Checkpoint
from vit_edge.export.parity.golden_vectors import choose_seeds
from vit_edge.export.parity.parity import float32_tolerance
from vit_edge.export.tracing.network import exact_logits, from_checkpoint, reference_logits, traced_form
from vit_edge.export.tracing.options import ExportOptions
from vit_edge.export.tracing.outputs import finish
from vit_edge.export.tracing.tracer import trace
from vit_edge.image import Pixels
from vit_edge.metrics import Logits
from vit_edge.model_file.artifact import Manifest, open_model, pack
from vit_edge.runtime.checks.golden import Tolerance, differences, golden_images
from vit_edge.runtime.engines.protocol import EngineOptions, make_engine
from vit_edge.vit import VisionTransformer

ENGINES = ("onnxruntime", "openvino")
SEEDS = range(20)


def network(seed: int) -> VisionTransformer:
    """Return a network of 1 to 3 blocks whose logits spread over 0.1 to 100, its weights of a trained one's size."""
    random = np.random.default_rng(seed)
    heads = int(random.integers(1, 4))
    config = small_config(width=8 * heads * int(random.integers(1, 4)), depth=1 + seed % 3, num_heads=heads)
    torch.manual_seed(seed)
    model = VisionTransformer(config).eval()
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name and name.endswith("weight")
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, mean=1.0 if is_gain else 0.0, std=size)
    spread = np.ptp(reference_logits(model, PREPROCESSING)(golden_images(range(8), height=24, width=16)), axis=1).mean()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(10 ** (-1 + 3 * seed / (len(SEEDS) - 1)) / float(spread))
    return model


@cache
def case(seed: int) -> tuple[onnx.ModelProto, Pixels, Logits, Tolerance]:
    """Return a network's graph, golden inputs, PyTorch's logits of these, and the tolerance that export gives it."""
    model, (height, width), options = network(seed), SIZE, ExportOptions()
    reference = reference_logits(model, PREPROCESSING)
    images = golden_images(choose_seeds(reference, height=height, width=width), height=height, width=width)
    checkpoint = Checkpoint(name="small", model=model, preprocessing=PREPROCESSING, labels=tuple("abcdefg"))
    graph = trace(
        traced_form(from_checkpoint(checkpoint), options), height=height, width=width, pixels=True, outputs=["logits"]
    )
    expected = reference(images)
    tolerance = float32_tolerance(expected, exact_logits(model, PREPROCESSING, images))
    return finish(graph, options), images, expected, tolerance


def answers(graph: onnx.ModelProto, images: Pixels, engine: str) -> Logits:
    told = {"name": "small", "architecture": {}, "provenance": {}, "labels": tuple("abcdefg"), "precision": "float32"}
    manifest = Manifest(preprocessing=PREPROCESSING, **told)  # type: ignore[arg-type]
    running = make_engine(engine, open_model(pack(graph.SerializeToString(), manifest)), EngineOptions(threads=1))
    try:
        return running.run(images)
    finally:
        running.close()


def weights(graph: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and np.prod(tensor.dims) >= 32:
            yield tensor


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_network_passes_whatever_the_scale_of_its_logits(seed: int, engine: str) -> None:
    graph, images, expected, tolerance = case(seed)
    assert differences(expected, answers(graph, images, engine), tolerance) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_layer_off_by_1_percent_is_found(seed: int, engine: str) -> None:
    graph, images, expected, tolerance = case(seed)
    planted = onnx.ModelProto()
    planted.CopyFrom(graph)
    candidates = list(weights(planted))
    tensor = candidates[seed % len(candidates)]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    assert differences(expected, answers(planted, images, engine), tolerance), tensor.name


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_swapped_channels_and_axes_are_found(seed: int) -> None:
    graph, images, expected, tolerance = case(seed)
    for wrong in (images[..., ::-1], images.transpose(0, 2, 1, 3).reshape(images.shape)):
        assert differences(expected, answers(graph, np.ascontiguousarray(wrong), "onnxruntime"), tolerance)


def test_logits_that_lie_close_on_one_image_are_judged_by_the_others() -> None:
    expected = np.array([[5.0, -5.0], [0.001, 0.0]], np.float32)
    tolerance = float32_tolerance(expected)
    assert differences(expected, expected + np.float32(1e-4), tolerance) == []
    assert differences(expected, expected * np.float32(1.01), tolerance)


def test_files_with_a_bound_for_each_logit_are_checked_as_before() -> None:
    expected = np.array([[10.0, 0.0]], np.float32)
    old = Tolerance(absolute=1e-4, relative=1e-3, top1_gap=2e-4)
    assert differences(expected, expected + np.float32([[5e-3, 5e-5]]), old) == []
    assert "off by" in differences(expected, expected + np.float32([[0, 2e-4]]), old)[0]
