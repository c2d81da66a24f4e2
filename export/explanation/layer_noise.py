"""The noise of each layer: the output of every quantizable op in the quantized network against float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.export.graph.intermediate_tensors import Activations
from vit_edge.export.graph.macs import shapes_for_one_image
from vit_edge.export.graph.matmuls import QuantizableOp
from vit_edge.export.quantization.algorithms.cross_layer_equalization import find_mixings
from vit_edge.metrics import decibels

__all__ = ["Columns", "result_tensors", "scaled_columns", "sqnr_by_op"]

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = npt.NDArray[np.int64]


def result_tensors(graph: onnx.GraphProto, ops: Iterable[QuantizableOp]) -> dict[str, str]:
    """Return by node the output of each op after its bias; ops that are missing from the graph are left out.

    Before the bias two graphs of one function can differ: a shift of an op's input is compensated in its bias.
    """
    vectors = {t.name for t in graph.initializer if t.dims and sum(size > 1 for size in t.dims) <= 1}
    made = {name for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for op in ops:
        # By tensor, not node: the node of a dynamic op gives integers, and several nodes turn them into values.
        tensor = op.output
        while (after := readers.get(tensor, [])) and len(after) == 1 and _adds_bias(after[0], vectors):
            tensor = after[0].output[0]
        if tensor in made:
            found[op.node] = tensor
    return found


def scaled_columns(model: onnx.ModelProto, ops: Sequence[QuantizableOp]) -> dict[str, Columns]:
    """Return the channels that cross-layer equalization scales and shifts, by the node of their op."""
    shapes = {name: shape for name, shape in shapes_for_one_image(model).items() if shape is not None}
    columns = {mixing.value.weight: mixing.columns_D for mixing in find_mixings(model, shapes)}
    return {op.node: columns[op.weight] for op in ops if op.weight in columns}


def sqnr_by_op(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    ops: Sequence[QuantizableOp],
    images: Iterable[Array],
    *,
    scaled: Mapping[str, Columns],
) -> dict[str, float]:
    """Return the SQNR in dB of the output of each op over all images, noise of earlier layers included.

    `images` are inputs of both graphs for one image each. In the channels `scaled` a scale and a shift are no error.
    Ops that `candidate` does not have are left out.
    """
    names = [result_tensors(model.graph, ops) for model in (reference, candidate)]
    both = [node for node in names[0] if node in names[1]]
    tensors = [list(dict.fromkeys(found[node] for node in both)) for found in names]
    activations = [Activations(model, asked) for model, asked in zip((reference, candidate), tensors, strict=True)]
    gathered = {node: _Gathered(columns=scaled.get(node)) for node in both}
    for image in images:
        values = [
            dict(zip(asked, next(iter(side.of([image]))), strict=True))
            for asked, side in zip(tensors, activations, strict=True)
        ]
        for node, sums in gathered.items():
            sums.add(*(found[name[node]] for found, name in zip(values, names, strict=True)))
    return {node: sums.sqnr_db for node, sums in gathered.items()}


def _adds_bias(node: onnx.NodeProto, vectors: set[str]) -> bool:
    return node.op_type == "Add" and any(name in vectors for name in node.input)


@dataclass(slots=True)
class _Gathered:
    """Sums over images of the output of one op; the channels `columns` are compared up to a scale and a shift."""

    columns: Columns | None = None
    _signal: float = 0.0
    _noise: float = 0.0
    _count: int = 0
    _moments: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def add(self, expected: Array, found: Array) -> None:
        if found.ndim > expected.ndim:  # of a convolution over tokens: channels first
            found = np.moveaxis(found, 1, -1)
        right: Array = np.asarray(expected, np.float64).reshape(-1, expected.shape[-1])
        got: Array = np.asarray(found, np.float64).reshape(-1, expected.shape[-1])
        self._signal += float(np.square(right).sum())
        if self.columns is not None:
            self._add_scaled(right[:, self.columns], got[:, self.columns])
            right, got = (np.delete(value, self.columns, axis=1) for value in (right, got))
        self._noise += float(np.square(got - right).sum())

    def _add_scaled(self, right: Array, got: Array) -> None:
        self._count += len(right)
        moments = {"r": right, "g": got, "rr": right * right, "rg": right * got, "gg": got * got}
        for name, value in moments.items():
            self._moments[name] = self._moments.get(name, 0) + value.sum(axis=0)

    @property
    def sqnr_db(self) -> float:
        return decibels(self._signal, self._noise + self._scaled_noise())

    def _scaled_noise(self) -> float:
        """Return the noise of the scaled channels after the best scale and shift, in units of the float32 network."""
        if not self._moments:
            return 0.0
        r, g, rr, rg, gg = (self._moments[name] / self._count for name in ("r", "g", "rr", "rg", "gg"))
        variance, covariance = np.maximum(rr - r * r, 0), rg - r * g
        scale = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 0)
        left = np.maximum(gg - g * g - scale * covariance, 0)
        # A channel without a scale has lost its whole signal.
        lost = np.divide(left, scale * scale, out=variance.copy(), where=scale != 0)
        return float(np.minimum(lost, variance).sum()) * self._count
