"""Real numbers as integers: weights rounded with a scale for each output channel, scale and zero point of a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.export.quantization.calibration.observers import Range

__all__ = [
    "Activation",
    "QuantizedWeight",
    "activation_parameters",
    "dequantized",
    "quantize_weight",
    "rounded_bias",
    "with_room",
]

Activation: TypeAlias = Literal["uint8", "int8"]
Float32: TypeAlias = npt.NDArray[np.float32]
# A tensor that is constant, or a channel of zeros, has no range to divide by.
_NO_RANGE_SCALE = 1e-8
# Networks that are not trained have activations of 1e-9; two scales of 1e-18 still multiply to a normal float32.
_SMALLEST_SCALE = 1e-18
# Biases are added as int32 in steps of input scale times weight scale; half of them are left for the sum itself.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """A weight as int8 in its own layout, and the float32 scale of each output channel."""

    integers: npt.NDArray[np.int8]
    scales: Float32


def quantize_weight(array: Float32, *, axis: int, bits: int) -> QuantizedWeight:
    """Return the weight rounded to the nearest signed integers of `bits` bits, a scale for each index of `axis`."""
    largest = 2 ** (bits - 1) - 1
    others = tuple(other for other in range(array.ndim) if other != axis % array.ndim)
    peaks_O = np.abs(array).max(axis=others) / largest
    scales_O = np.where(peaks_O > 0, np.maximum(peaks_O, _SMALLEST_SCALE), _NO_RANGE_SCALE).astype(np.float32)
    integers = np.clip(np.rint(array / _along(scales_O, axis, array.ndim)), -largest, largest)
    return QuantizedWeight(integers=integers.astype(np.int8), scales=scales_O)


def with_room(weight: QuantizedWeight, biases_O: Float32, *, input_scale: np.float32, axis: int) -> QuantizedWeight:
    """Return the weight with larger scales where a bias over its channel's scale would not fit into 32 bits.

    That is where a channel has hardly any weights compared with its bias: of those, fewer steps are no loss.
    """
    needed_O = (np.abs(biases_O, dtype=np.float64) / (float(input_scale) * _LARGEST_BIAS)).astype(np.float32)
    if (needed_O <= weight.scales).all():
        return weight
    scales_O = np.maximum(weight.scales, needed_O)
    ratio = _along(weight.scales / scales_O, axis, weight.integers.ndim)
    return QuantizedWeight(integers=np.rint(weight.integers * ratio).astype(np.int8), scales=scales_O)


def rounded_bias(biases_O: Float32, scales_O: Float32) -> npt.NDArray[np.int32]:
    """Return biases as int32 in steps of `scales_O`."""
    return np.rint(biases_O.astype(np.float64) / scales_O).astype(np.int32)


def activation_parameters(observed: Range, activation: Activation) -> tuple[np.float32, np.uint8 | np.int8]:
    """Return scale and zero point of a range: real = scale x (integer - zero point)."""
    if activation == "int8":
        peak = max(-observed.low, observed.high)
        return _scale(peak, 127), np.int8(0)
    scale = _scale(observed.high - observed.low, 255)
    return scale, np.uint8(np.clip(np.rint(-observed.low / float(scale)), 0, 255))


def _scale(width: float, levels: int) -> np.float32:
    return np.float32(max(width / levels, _SMALLEST_SCALE) if width > 0 else _NO_RANGE_SCALE)


def _along(values_O: npt.NDArray[Any], axis: int, num_axes: int) -> npt.NDArray[Any]:
    """Return the values of `axis` shaped to go with an array of `num_axes` axes."""
    return values_O.reshape([-1 if other == axis % num_axes else 1 for other in range(num_axes)])


def dequantized(weight: QuantizedWeight, *, axis: int) -> Float32:
    """Return the float32 weight that the integers stand for."""
    found: Float32 = weight.integers.astype(np.float32) * _along(weight.scales, axis, weight.integers.ndim)
    return found
