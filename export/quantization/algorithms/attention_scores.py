"""Queries and keys in integers, where OpenVINO runs the file: its attention kernel is faster so, ONNX Runtime's is not.

Only the two inputs of the product of scores are rounded, symmetric, the keys before they are turned; softmax and values
stay float. It is a note in the manifest that the runtime follows, not a part of the graph: in ONNX Runtime the same
nodes would only cost time. DeiT-tiny in OpenVINO: 6.33 ms against 6.64 (fixed batch), 7.00 against 7.32, for 0.3 dB.

Keys are what OpenVINO multiplies by as it does by a weight: on an x86 CPU without VNNI it adds pairs of products in 16
bits, which hold them only for 7 bits. So where weights have 7 bits the keys have, for 0.2 dB (DeiT-tiny, `portable`, on
AVX-512 with and without VNNI: 32.3 dB apart on 32 photographs, 24.8 dB with keys of 8 bits).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

__all__ = ["find_scores", "with_room"]

_SCALES = ("Add", "Div", "Mul")


def find_scores(model: onnx.ModelProto) -> dict[str, bool]:
    """Return queries and keys, as they enter, of every product of two activations that only a softmax reads.

    The keys, on its right side, are True.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, bool] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or constants & set(node.input) or not _ends_in_softmax(node, model, constants):
            continue
        for position, name in enumerate(node.input):
            maker = makers.get(name)
            entering = maker.input[0] if maker is not None and maker.op_type == "Transpose" else name
            found[entering] = found.get(entering, False) or position == 1
    return found


def with_room(peaks: Mapping[str, float], scores: Mapping[str, bool], *, bits: int) -> dict[str, float]:
    """Return what 127 stands for in each tensor: its peak; in keys so much that the peak has `bits` bits."""
    room = 127 / (2 ** (bits - 1) - 1)
    return {name: peak * (room if scores[name] else 1.0) for name, peak in peaks.items()}


def _ends_in_softmax(op: onnx.NodeProto, model: onnx.ModelProto, constants: set[str]) -> bool:
    """Return whether only a softmax reads the scores, at most scaled or biased by constants before."""
    node = op
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
