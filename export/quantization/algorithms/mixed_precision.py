"""Which products stay float: those whose integers cost most accuracy for the time that they win.

In a ViT that is the input of some fc2, a few large values over many small ones after GELU, and what few tokens pass
through, such as the head, which costs no time at all. Each fc2 of DeiT-tiny in float takes 0.15 ms of 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from vit_edge.export.graph.macs import macs_by_node
from vit_edge.export.graph.matmuls import QuantizableOp

__all__ = ["choose_float"]

# Of the multiplications with constant weights; float ones take about three times as long as integers.
_MOST_FLOAT_SHARE = 0.15


def choose_float(model: onnx.ModelProto, ops: Sequence[QuantizableOp], noise: Mapping[str, float]) -> frozenset[str]:
    """Return the nodes to leave float: most noise for each multiplication first, while 15 % of these are not used up.

    Products that bring less than the average share of their multiplications are worth no time.
    """
    macs = macs_by_node(model) or {}
    cost = {op.node: macs.get(op.node, 1) for op in ops if not op.takes_pixels}
    total, total_noise = sum(cost.values()), sum(noise[node] for node in cost)
    left, used = set[str](), 0
    for node in sorted(cost, key=lambda node: (-noise[node] / max(cost[node], 1), node)):
        if noise[node] * total <= total_noise * cost[node]:
            break
        if used + cost[node] <= _MOST_FLOAT_SHARE * total:
            left.add(node)
            used += cost[node]
    return frozenset(left)
