"""Queries and keys in integers, where OpenVINO runs the file: its attention kernel is faster so, ONNX Runtime's is not.

Only the two inputs of the product of scores are rounded, symmetric, the keys before they are turned; softmax and values
stay float. It is a note in the manifest that the runtime follows, not a part of the graph: in ONNX Runtime the same
nodes would only cost time. DeiT-tiny in OpenVINO: 6.33 ms against 6.64 (fixed batch), 7.00 against 7.32, for 0.3 dB.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

__all__ = ["find_scores"]

_SCALES = ("Add", "Div", "Mul")


def find_scores(model: onnx.ModelProto) -> list[str]:
    """Return queries and keys, as they enter, of every product of two activations that only a softmax reads."""
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or constants & set(node.input) or not _ends_in_softmax(node, model, constants):
            continue
        for name in node.input:
            maker = makers.get(name)
            found[maker.input[0] if maker is not None and maker.op_type == "Transpose" else name] = None
    return list(found)


def _ends_in_softmax(product: onnx.NodeProto, model: onnx.ModelProto, constants: set[str]) -> bool:
    """Return whether only a softmax reads the scores, at most scaled or biased by constants before."""
    node = product
    while True:
        readers = list(_readers(node.output[0], model))
        if len(readers) != 1:
            return False
        node = readers[0]
        if node.op_type == "Softmax":
            return True
        if node.op_type not in _SCALES or not constants & set(node.input):
            return False


def _readers(name: str, model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from (node for node in model.graph.node if name in node.input)
