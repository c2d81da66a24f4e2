"""How much noise each product alone brings into the logits once it is in integers: what is worth sparing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.export.graph.intermediate_tensors import logits_of
from vit_edge.export.graph.matmuls import QuantizableOp
from vit_edge.progress import Progress, silent

__all__ = ["noise_by_op"]

Array: TypeAlias = npt.NDArray[Any]


def noise_by_op(
    graph: onnx.ModelProto,
    ops: Sequence[QuantizableOp],
    quantize_only: Callable[[str], onnx.ModelProto],
    images: Sequence[Array],
    *,
    progress: Progress = silent,
) -> dict[str, float]:
    """Return, by node, the power of the error that a product alone causes in the logits, as a share of their own power.

    `quantize_only` gives `graph` with that one product in integers; `images` are what the graph takes, [1, ...] each.
    """
    expected = logits_of(graph, images)
    power = max(float(np.square(expected, dtype=np.float64).sum()), 1e-30)
    found: dict[str, float] = {}
    for number, op in enumerate(ops):
        progress("measuring sensitivity", number, len(ops))
        difference = logits_of(quantize_only(op.node), images) - expected
        found[op.node] = float(np.square(difference, dtype=np.float64).sum()) / power
    progress("measuring sensitivity", len(ops), len(ops))
    return found
