"""Every channel of a normalised tensor gets one range, and the function stays the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.conftest import ROOT, Workspace
from vit_edge.data import find_images
from vit_edge.export.graph.intermediate_tensors import logits_of
from vit_edge.export.graph.matmuls import find_quantizable_ops
from vit_edge.export.graph.preparation import prepare
from vit_edge.export.quantization.algorithms.reparameterisation import find_norms, norms_left_alone, reparameterise
from vit_edge.export.quantization.calibration.observers import ChannelRange, observe_channels, observe_ranges
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq
from vit_edge.export.tracing.tracer import trace
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


class _Windows(nn.Module):
    """A shifted window as Swin has it, a product without a bias, one on one token, and channels that change places."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        self.inner, self.shuffled, self.head = nn.Linear(12, 12, bias=False), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x_BHWC = images.reshape(-1, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, 12)
        rolled = torch.roll(self.norms[0](x_BHWC), (-1, -1), (1, 2))
        windows = rolled.reshape(-1, 2, 2, 2, 2, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 12)
        x_BTC = x_BHWC.reshape(-1, 16, 12) + self.inner(windows).reshape(-1, 16, 12)
        shuffled = self.norms[1](x_BTC).reshape(-1, 16, 3, 4).transpose(2, 3).reshape(-1, 16, 12)
        logits: Tensor = self.head(self.norms[2](x_BTC + self.shuffled(shuffled))[:, 0])
        return logits


def test_norms_are_followed_through_windows_and_get_biases_where_there_are_none() -> None:
    torch.manual_seed(0)
    network = _Windows().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=0.5, std=0.3)
    graph = prepare(trace(network, height=8, width=8, pixels=False))
    names = [node.output[0] for node in graph.graph.node if node.op_type == "LayerNormalization"]
    assert find_norms(graph) == [names[0], names[2]]
    assert norms_left_alone(graph) == {names[1]: "feed a Reshape"}
    random = np.random.default_rng(0)
    low_D = random.normal(size=12)
    ranges = {name: ChannelRange(low_D=low_D, high_D=low_D + random.uniform(0.1, 5, 12)) for name in find_norms(graph)}
    aligned = reparameterise(graph, ranges)
    onnx.checker.check_model(aligned, full_check=True)
    images = [random.normal(size=(1, 3, 8, 8)).astype(np.float32) for _ in range(4)]
    assert sqnr_db(logits_of(graph, images), logits_of(aligned, images)) > 100
    assert len(aligned.graph.node) == len(graph.graph.node) + 1
