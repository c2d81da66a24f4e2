"""Every channel of a normalised tensor gets one range, and the function stays the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.conftest import ROOT, Workspace
from vit_edge.data import find_images
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.quantization.algorithms.reparameterisation import find_norms, reparameterise
from vit_edge.export.quantization.calibration.observers import ChannelRange, observe_channels, observe_ranges
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import open_model


def _logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images})[0])


def test_the_function_stays_and_the_channels_get_one_range(workspace: Workspace) -> None:
    model = onnx.load(workspace.float_model)
    preprocessing = open_model(workspace.float_model).manifest.preprocessing
    images = np.stack([preprocessing.pixels(path) for path in find_images(ROOT / "calibration_data")[::4]])
    norms = find_norms(model)
    assert len(norms) == 2 * 2 + 1
    before = observe_channels(model, norms, images)
    aligned = reparameterise(model, before)
    onnx.checker.check_model(aligned, full_check=True)
    expected = _logits(model, images)
    assert np.abs(_logits(aligned, images) - expected).max() <= 1e-4 * np.abs(expected).max()
    after = observe_channels(aligned, norms, images)
    assert [name for name in norms if not before[name].varies] == norms[-2:]  # only the class token is left there
    for name in norms[:-2]:
        found = after[name]
        width_D = found.high_D - found.low_D
        np.testing.assert_allclose(width_D, width_D.mean(), rtol=0.01)
        np.testing.assert_allclose(found.low_D, -found.high_D, atol=0.01 * width_D.mean())
        uneven = before[name].high_D - before[name].low_D
        assert uneven.max() / uneven.min() > 1.2


def test_uneven_channels_lose_less_to_int8(workspace: Workspace) -> None:
    """The digits have even norms: some channels are widened, as in larger networks, and narrowed in the weights."""
    model = onnx.load(workspace.float_model)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    norms = find_norms(model)
    # Not those of the class token alone: `reparameterise` leaves them.
    wide = {name: _widened(found) for name, found in observe_channels(model, norms, images).items() if found.varies}
    uneven = reparameterise(model, wide)
    expected = _logits(model, images)
    found = {}
    aligned = reparameterise(uneven, observe_channels(uneven, norms, images))
    for name, graph in (("plain", uneven), ("aligned", aligned)):
        tensors = [op.input for op in find_quantizable_ops(graph) if not op.takes_pixels]
        quantized = insert_qdq(
            graph, observe_ranges(graph, tensors, images), scheme=Scheme(weight_bits=7)
        )  # no CPU saturates
        found[name] = sqnr_db(expected, _logits(quantized, images))
    assert found["aligned"] > found["plain"] + 3, found


def _widened(observed: ChannelRange) -> ChannelRange:
    """Return ranges that make `reparameterise` widen every 16th channel twentyfold."""
    factor_D = np.where(np.arange(len(observed.low_D)) % 16, 1.0, 0.05)
    return ChannelRange(low_D=observed.low_D * factor_D, high_D=observed.high_D * factor_D)


def test_a_constant_channel_does_not_divide_by_zero(workspace: Workspace) -> None:
    model = onnx.load(workspace.float_model)
    name = find_norms(model)[0]
    flat = {name: ChannelRange(low_D=np.zeros(192), high_D=np.zeros(192))}
    for tensor in reparameterise(model, flat).graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all()


@pytest.mark.parametrize("reader", ["Relu", "MatMul"])
def test_a_norm_that_something_else_reads_is_left_alone(workspace: Workspace, reader: str) -> None:
    model = onnx.load(workspace.float_model)
    first = find_norms(model)[0]
    if reader == "Relu":
        model.graph.node.append(onnx.helper.make_node("Relu", [first], ["unused"], name="reader"))
    else:
        model.graph.node.append(onnx.helper.make_node("MatMul", [first, first], ["unused"], name="reader"))
    assert first not in find_norms(model)
