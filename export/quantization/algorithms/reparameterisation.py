"""LayerNorm re-parameterisation (RepQ-ViT, arXiv:2212.08254): exact, and free at run time.

The channels of a normalised tensor differ in range by tens of times, and one scale for all leaves the narrow ones few
steps. LayerNorm's own scale and shift bring every channel to one range, and the products after it undo that in their
constant weights and biases. DeiT-tiny, 8-bit weights, 550 photographs: SQNR 19.8 dB against 18.4 dB, agreement 99.1 %
against 97.8 %. Scaling without the shift gains nothing, nor does aligning the norms of the class token alone, over
images instead of tokens (18.5 dB).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from vit_edge.export.quantization.calibration.observers import ChannelRange

__all__ = ["alignment", "find_norms", "reparameterise"]

# What keeps the last axis, channels, as it is on the way from a norm to its products.
_KEEPS_CHANNELS = ("Slice", "Reshape")
# A channel that never varies has no range to divide by.
_SMALLEST_RATIO, _SMALLEST_WIDTH = 1e-3, 1e-12

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Use:
    """One product after a norm: its constant weight [in, out] and the bias added to it."""

    weight: str
    bias: str


def find_norms(model: onnx.ModelProto) -> list[str]:
    """Return the output of every LayerNormalization that only feeds products with constant weights and biases."""
    constants = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    norms = []
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and set(node.input[1:]) <= constants.keys() and len(node.input) == 3:
            uses = list(_uses(node.output[0], model, constants))
            # Two tokens side by side, as a distilled network's heads read them, are no longer the norm's channels.
            fits = all(use and constants[use.weight][0] == constants[node.input[1]][-1] for use in uses)
            if uses and fits:
                norms.append(node.output[0])
    return norms


def reparameterise(model: onnx.ModelProto, ranges: Mapping[str, ChannelRange]) -> onnx.ModelProto:
    """Return a copy of `model` in which all channels of each of `ranges`, outputs of norms, have one range.

    Norms whose channels do not vary within an image, those of the class token alone, are left as they are. The
    function stays the same up to float32 rounding: everything is folded in float64 and rounded once.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        observed = ranges.get(node.output[0])
        if observed is None or not observed.varies:
            continue
        ratio_D, middle_D = alignment(observed, smallest_ratio=_SMALLEST_RATIO)
        gamma_D, beta_D = (_array(tensors[name]) for name in node.input[1:])
        # Norms share one tensor of ones and one of zeros: each gets its own.
        node.input[1:] = [f"{node.name}.gamma", f"{node.name}.beta"]
        for name, values in zip(node.input[1:], (gamma_D / ratio_D, (beta_D - middle_D) / ratio_D), strict=True):
            tensors[name] = _tensor(name, values)
        for use in _uses(node.output[0], changed, constants):
            assert use is not None
            weight_DO = _array(tensors[use.weight])
            tensors[use.bias] = _tensor(use.bias, _array(tensors[use.bias]) + middle_D @ weight_DO)
            tensors[use.weight] = _tensor(use.weight, ratio_D[:, None] * weight_DO)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for name, tensor in tensors.items() if name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return changed


def alignment(observed: ChannelRange, *, smallest_ratio: float) -> tuple[Array, Array]:
    """Return each channel's range relative to the mean range, no less than `smallest_ratio`, and its middle."""
    low_D, high_D = observed.low_D, observed.high_D
    width_D = high_D - low_D
    mean = max(float(width_D.mean()), _SMALLEST_WIDTH)
    return np.maximum(width_D / mean, smallest_ratio), (low_D + high_D) / 2


def _uses(tensor: str, model: onnx.ModelProto, constants: Mapping[str, list[int]]) -> Iterator[_Use | None]:
    """Yield every product that reads `tensor`; None for a reader that is none, or whose weight or bias is shared."""
    readers = [node for node in model.graph.node if tensor in node.input]
    if not readers or any(value.name == tensor for value in model.graph.output):
        yield None
    for node in readers:
        if node.op_type in _KEEPS_CHANNELS and node.input[0] == tensor:
            yield from _uses(node.output[0], model, constants)
        elif node.op_type == "MatMul" and node.input[0] == tensor and len(constants.get(node.input[1], ())) == 2:
            yield _use(node, model, constants)
        else:
            yield None


def _use(op: onnx.NodeProto, model: onnx.ModelProto, constants: Mapping[str, list[int]]) -> _Use | None:
    added = [node for node in model.graph.node if op.output[0] in node.input]
    if len(added) != 1 or added[0].op_type != "Add":
        return None
    bias = next((name for name in added[0].input if len(constants.get(name, ())) == 1), None)
    counts = [name for node in model.graph.node for name in node.input]
    if bias is None or counts.count(bias) != 1 or counts.count(op.input[1]) != 1:
        return None
    return _Use(weight=op.input[1], bias=bias)


def _array(tensor: onnx.TensorProto) -> Array:
    return numpy_helper.to_array(tensor).astype(np.float64)


def _tensor(name: str, values: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(values.astype(np.float32), name)
