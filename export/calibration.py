"""Ranges of activations from calibration pictures: one picture at a time, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from vit_edge.cpu import usable_threads
from vit_edge.runtime.engine import Array as Image

__all__ = ["ChannelRange", "Range", "observe_channels", "observe_ranges"]

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The values that a tensor is quantized over; always includes zero."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelRange:
    """The smallest and largest value of each channel of a tensor, float64 [channels]."""

    low_D: Array
    high_D: Array

    @property
    def varies(self) -> bool:
        """Return whether any channel varies within a picture: in a tensor of one token none does."""
        size = float(np.maximum(np.abs(self.low_D), np.abs(self.high_D)).max())
        return float((self.high_D - self.low_D).max()) > 1e-6 * size


def observe_ranges(model: onnx.ModelProto, tensors: Sequence[str], images: Iterable[Image]) -> Mapping[str, Range]:
    """Return the averaged min-max of each tensor: the means over pictures of their smallest and largest value.

    Averaging keeps one odd picture from widening the range for all (DeiT-tiny: SQNR 20.2 dB against 19.5 dB for the
    overall min-max; clipping by percentile ruins it at 10.5 dB, because a ViT's outliers carry information).
    Pictures run one by one, as the graph takes them, so the ranges do not depend on a batch size.
    """
    observed = _averaged_extremes(model, tensors, images, by_channel=False)
    return {name: Range(low=min(float(low), 0.0), high=max(float(high), 0.0)) for name, (low, high) in observed.items()}


def observe_channels(
    model: onnx.ModelProto, tensors: Sequence[str], images: Iterable[Image]
) -> Mapping[str, ChannelRange]:
    """Return the averaged min-max of each channel, the last axis, of each tensor."""
    observed = _averaged_extremes(model, tensors, images, by_channel=True)
    return {name: ChannelRange(low_D=low_D, high_D=high_D) for name, (low_D, high_D) in observed.items()}


def _averaged_extremes(
    model: onnx.ModelProto, tensors: Sequence[str], images: Iterable[Image], *, by_channel: bool
) -> dict[str, tuple[Array, Array]]:
    """Return the means over pictures of smallest and largest value, float64, of each tensor or of its channels."""
    session = _session_with_outputs(model, tensors)
    name = session.get_inputs()[0].name
    totals: list[tuple[Array, Array]] = []
    count = 0
    for image in images:
        # Without names a session would return every output.
        values = session.run(list(tensors), {name: image[None]}) if tensors else []
        rows = [value.reshape(-1, value.shape[-1] if by_channel else 1) for value in values]
        found = [(row.min(axis=0).astype(np.float64), row.max(axis=0).astype(np.float64)) for row in rows]
        totals = [(a + c, b + d) for (a, b), (c, d) in zip(totals, found, strict=True)] if totals else found
        count += 1
    means = [(low / count, high / count) for low, high in totals]
    if not by_channel:
        means = [(low[0], high[0]) for low, high in means]
    return dict(zip(tensors, means, strict=True))


def _session_with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    for value in (*observed.graph.input, *observed.graph.output):  # pictures come one by one, whatever was fixed
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = usable_threads()
    return onnxruntime.InferenceSession(observed.SerializeToString(), settings, providers=["CPUExecutionProvider"])
