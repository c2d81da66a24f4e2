"""What calibration images say about ranges, weights and biases, found out one segment of the graph after another.

Each segment is fitted to what the quantized segments before it really give, so that it makes up for their errors as far
as it can; what it aims at is what the float network has at the segment's end (block reconstruction, as in BRECQ,
arXiv:2102.05426). Images and steps are fixed numbers: the same inputs give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from vit_edge.export.graph.matmuls import QuantizableOp
from vit_edge.export.quantization.algorithms.gptq_rounding import round_weights
from vit_edge.export.quantization.algorithms.range_search import search_range
from vit_edge.export.quantization.algorithms.recipes import Algorithm, Effort
from vit_edge.export.quantization.algorithms.segments import Segment, SegmentRunner, divide
from vit_edge.export.quantization.calibration.observers import Range
from vit_edge.export.quantization.qdq.integers import QuantizedWeight, dequantized, quantize_weight
from vit_edge.export.quantization.qdq.placement import Scheme
from vit_edge.progress import Progress, silent

__all__ = ["Reconstruction", "reconstruct"]

Array: TypeAlias = npt.NDArray[Any]
Matrix: TypeAlias = npt.NDArray[np.float64]


@dataclass(kw_only=True, slots=True)
class Reconstruction:
    """The graph with its biases, the ranges to quantize it over, and its weights as integers by their names."""

    model: onnx.ModelProto
    ranges: dict[str, Range]
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)


def reconstruct(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    limits: Mapping[str, Range],
    ops: Sequence[QuantizableOp],
    images: Sequence[Array],
    *,
    scheme: Scheme,
    algorithms: frozenset[Algorithm],
    effort: Effort,
    progress: Progress = silent,
) -> Reconstruction:
    """Return what "range-search", "gptq-rounding" and "bias-correction", if in `algorithms`, make of a float32 graph.

    `ranges` are where the search starts and `limits` the overall extremes, beyond which no range needs to go; a tensor
    without them has the range of another, and keeps it.
    `products` are those that take integers, `images` what the graph takes for one image each. Memory holds what
    passes between two segments for all images, of the float network and of the quantized one.
    """
    found = Reconstruction(model=onnx.ModelProto(), ranges=dict(ranges))
    found.model.CopyFrom(model)
    segments = divide(model, {op.node for op in ops})
    exact, rounded = list(images), list(images)
    for number, segment in enumerate(segments):
        progress("reconstructing", number, len(segments))
        here = [op for op in ops if any(node.name == op.node for node in segment.nodes)]
        fitted = _Fit(found, segment, here, scheme)
        outputs = list(dict.fromkeys((segment.output, *(op.output for op in here))))
        runner = SegmentRunner(model, segment, tensors=outputs)
        targets = [dict(zip(outputs, runner.run(value, {}), strict=True)) for value in exact]
        if "range-search" in algorithms:
            fitted.search_ranges(limits, rounded, [target[segment.output] for target in targets], effort.range_steps)
        fitted.choose_weights(rounded, effort.sweeps if "gptq-rounding" in algorithms else None)
        if "bias-correction" in algorithms:
            fitted.correct_biases(rounded, targets)
        exact, rounded = [target[segment.output] for target in targets], fitted.outputs(rounded)
    progress("reconstructing", len(segments), len(segments))
    return found


class _Fit:
    """One segment and what is found for it, which goes into `found`."""

    def __init__(self, found: Reconstruction, segment: Segment, ops: Sequence[QuantizableOp], scheme: Scheme) -> None:
        self._found, self._segment, self._quantizable_ops, self._scheme = found, segment, ops, scheme
        self._tensors = {tensor.name: tensor for tensor in found.model.graph.initializer}

    def outputs(self, values: Sequence[Array]) -> list[Array]:
        """Return what the segment gives once it is quantized."""
        runner = self._runner()
        return [runner.run(value, self._found.ranges)[0] for value in values]

    def search_ranges(
        self, limits: Mapping[str, Range], values: Sequence[Array], targets: Sequence[Array], steps: int
    ) -> None:
        """Set the range of each tensor that is rounded to the best for the segment's output, one after another."""
        runner, ranges = self._runner(with_weights=False), self._found.ranges

        def error_with(name: str) -> Callable[[Range], float]:
            def error(tried: Range) -> float:
                changed = {**ranges, name: tried}
                pairs = zip(values, targets, strict=True)
                return sum(float(np.square(runner.run(v, changed)[0] - t).sum(dtype=np.float64)) for v, t in pairs)

            return error

        for name in dict.fromkeys(name for name in self._readers.values() if name in limits):
            ranges[name] = search_range(error_with(name), ranges[name], limit=limits[name], steps=steps)

    def choose_weights(self, values: Sequence[Array], sweeps: int | None) -> None:
        """Set the integers of each weight: optimised with so many sweeps, or to the nearest where `sweeps` is None."""
        moments = self._moments(values) if sweeps is not None else {}
        for op in self._quantizable_ops:
            weight, bits = numpy_helper.to_array(self._tensors[op.weight]), self._scheme.weight_bits
            if op.weight in moments and sweeps is not None:
                weight_IO = (weight if op.axis == 1 else weight.T).astype(np.float64)
                chosen = round_weights(weight_IO, moments[op.weight], bits=bits, sweeps=sweeps)
                integers = chosen.integers if op.axis == 1 else np.ascontiguousarray(chosen.integers.T)
                self._found.weights[op.weight] = QuantizedWeight(integers=integers, scales=chosen.scales)
            else:
                self._found.weights[op.weight] = quantize_weight(weight, axis=op.axis, bits=bits)

    def correct_biases(self, values: Sequence[Array], targets: Sequence[Mapping[str, Array]]) -> None:
        """Add to each bias what its product's outputs lack on average (Nagel et al., arXiv:1906.04721, section 4.2)."""
        for op in self._quantizable_ops:
            bias = self._bias(op)
            if bias is None:
                continue
            runner = self._runner([op.output])
            lacking, num_rows = np.zeros(1), 0
            for value, target in zip(values, targets, strict=True):
                difference = target[op.output] - runner.run(value, self._found.ranges)[0]
                rows = difference.reshape(-1, difference.shape[-1]).astype(np.float64)
                lacking, num_rows = lacking + rows.sum(axis=0), num_rows + len(rows)
            corrected = numpy_helper.to_array(self._tensors[bias]) + lacking / num_rows
            self._tensors[bias].CopyFrom(numpy_helper.from_array(corrected.astype(np.float32), bias))

    @property
    def _readers(self) -> dict[str, str]:
        return {op.node: op.input for op in self._quantizable_ops if not op.takes_pixels}

    def _runner(self, tensors: Sequence[str] = (), *, with_weights: bool = True) -> SegmentRunner:
        chosen = self._found.weights if with_weights else {}
        weights = {
            p.weight: dequantized(chosen[p.weight], axis=p.axis) for p in self._quantizable_ops if p.weight in chosen
        }
        return SegmentRunner(
            self._found.model,
            self._segment,
            tensors=tensors,
            rounded=self._readers,
            activation=self._scheme.activation,
            weights=weights,
        )

    def _moments(self, values: Sequence[Array]) -> dict[str, Matrix]:
        """Return X^T X of the inputs, as they are read, of each weight that is a matrix and used once."""
        uses = [op.weight for op in self._quantizable_ops]
        inputs = {
            op.weight: op.input if op.takes_pixels else f"{op.input}.rounded"
            for op in self._quantizable_ops
            if op.operator != "Conv" and uses.count(op.weight) == 1
        }
        names = list(dict.fromkeys(inputs.values()))
        if not names:  # convolutions alone
            return {}
        runner = self._runner(names, with_weights=False)
        sums: dict[str, Matrix] = {}
        for value in values:
            for name, tensor in zip(names, runner.run(value, self._found.ranges), strict=True):
                rows_RI = tensor.reshape(-1, tensor.shape[-1])
                moments_II = (rows_RI.T @ rows_RI).astype(np.float64)
                sums[name] = sums[name] + moments_II if name in sums else moments_II
        return {weight: sums[name] for weight, name in inputs.items()}

    def _bias(self, op: QuantizableOp) -> str | None:
        """Return the vector that is added to what the product gives and to nothing else, None where there is none."""
        nodes = self._found.model.graph.node
        candidate = op.bias
        readers = [node for node in nodes if op.output in node.input]
        if candidate is None and len(readers) == 1 and readers[0].op_type == "Add":
            candidate = next((name for name in readers[0].input if name in self._tensors), None)
        if candidate is None or len(self._tensors[candidate].dims) != 1 or op.operator == "Conv":
            return None
        return candidate if sum(list(node.input).count(candidate) for node in nodes) == 1 else None
