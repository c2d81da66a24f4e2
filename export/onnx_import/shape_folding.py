"""Arithmetic on shapes, computed once: exporters leave it in, and what it comes to depends on the batch at most.

The graph is run at several batches, and every tensor that depends on the images by their shape alone is looked at.
One that is always the same becomes a constant. One that grows with the batch is computed from the batch in two nodes;
where it is the target of a Reshape, the axis that grows is left to be found (-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from vit_edge.runtime.onnx_import.editing import prune

__all__ = ["fold_shapes", "open_batch", "reshaped_tensors", "shape_tensors"]

Array: TypeAlias = npt.NDArray[Any]
# What is computed once is stored: larger tensors would only make the file larger.
_MOST_FOLDED = 2**24
_BATCH = "vit_edge.batch"


def shape_tensors(graph: onnx.GraphProto) -> list[str]:
    """Return the tensors that depend on the images by their shape alone, in graph order."""
    known = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or (node.input and {name for name in node.input if name} <= known):
            known |= set(node.output)
            found += [name for name in node.output if name]
    return found


def reshaped_tensors(graph: onnx.GraphProto) -> list[str]:
    """Return what the Reshapes make whose target is computed."""
    constants = {tensor.name for tensor in graph.initializer}
    return [n.output[0] for n in graph.node if n.op_type == "Reshape" and n.input[1] not in constants]


def fold_shapes(model: onnx.ModelProto, values: Mapping[int, Mapping[str, Array]]) -> None:
    """Put constants, or the batch, where shapes are computed; `values` are those tensors by batch.

    They hold `shape_tensors` and `reshaped_tensors`.
    """
    graph, batches = model.graph, sorted(values)
    computed = set(shape_tensors(graph))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        made = [name for name in node.output if name]
        if made and set(made) <= computed:
            forms = [_form([values[b][name] for b in batches], batches) for name in made]
            known = [form for form in forms if form is not None]
            if len(known) == len(made):
                nodes += [part for name, form in zip(made, known, strict=True) for part in _made(graph, name, *form)]
                continue
        elif node.op_type == "Reshape" and node.input[1] in computed:
            target = _target([values[b][node.output[0]].shape for b in batches])
            if target is not None:
                node.input[1] = _constant(graph, f"{node.output[0]}.shape", target)
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    _replace_nodes(graph, nodes)


def open_batch(model: onnx.ModelProto, fixed: int) -> None:
    """Free the batch where it is written as a constant: in targets of Reshape, and in tokens joined to the images.

    A guess, to be proven by running the graph: nothing else tells the batch from another size.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            target = constants[node.input[1]].copy()
            if target.size and target[0] == fixed:
                target[0] = 0 if -1 in target else -1
                node.input[1] = _constant(graph, f"{node.output[0]}.shape", target)
        if node.op_type == "Concat" and set(node.input) - constants.keys():
            for position, name in enumerate(node.input):
                if name in constants and constants[name].ndim > 1 and len(constants[name]) == fixed:
                    node.input[position] = _repeated(graph, nodes, f"{node.output[0]}.{position}", constants[name][:1])
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    _replace_nodes(graph, nodes)


def _repeated(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], name: str, one: Array) -> str:
    """Add what repeats a constant [1, ...] for each image; return its name."""
    slope = np.array([1] + [0] * (one.ndim - 1), np.int64)
    shape, token = f"{name}.shape", _constant(graph, f"{name}.one", np.ascontiguousarray(one))
    nodes += _grown(graph, shape, slope, np.array([0, *one.shape[1:]], np.int64))
    nodes.append(helper.make_node("Expand", [token, shape], [name], name=name))
    return name


def _form(values: Sequence[Array], batches: Sequence[int]) -> tuple[Array, Array] | None:
    """Return (slope, start) of a tensor that is start + slope x batch, slope 0 where it is the same; None: neither."""
    first = values[0]
    if any(value.shape != first.shape or value.size > _MOST_FOLDED for value in values):
        return None
    if all(np.array_equal(first, value) for value in values):
        return np.zeros(first.shape, np.int64), first
    if first.dtype != np.int64 or first.ndim > 1:
        return None
    slope = (values[-1] - first) // (batches[-1] - batches[0])
    start = first - slope * batches[0]
    fits = all(np.array_equal(start + slope * b, value) for b, value in zip(batches, values, strict=True))
    return (slope, start) if fits else None


def _made(graph: onnx.GraphProto, name: str, slope: Array, start: Array) -> list[onnx.NodeProto]:
    if slope.any():
        return _grown(graph, name, slope, start)
    _constant(graph, name, start)
    return []


def _grown(graph: onnx.GraphProto, name: str, slope: Array, start: Array) -> list[onnx.NodeProto]:
    """Return nodes that make start + slope x batch."""
    scaled, whole = f"{name}.scaled", name if start.ndim else f"{name}.whole"
    by, plus = (
        _constant(graph, f"{name}.slope", np.atleast_1d(slope)),
        _constant(graph, f"{name}.start", np.atleast_1d(start)),
    )
    nodes = [
        helper.make_node("Mul", [_BATCH, by], [scaled], name=scaled),
        helper.make_node("Add", [scaled, plus], [whole], name=whole),
    ]
    if not start.ndim:
        axes = _constant(graph, f"{name}.axes", np.array([0], np.int64))
        nodes.append(helper.make_node("Squeeze", [whole, axes], [name], name=name))
    return nodes


def _target(shapes: Sequence[tuple[int, ...]]) -> Array | None:
    """Return the target of a Reshape that gives these shapes: the one axis that grows is left to be found."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    grows = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    target = np.array(shapes[0], np.int64)
    target[grows] = -1
    return target if len(grows) <= 1 else None


def _constant(graph: onnx.GraphProto, name: str, value: Array) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put the nodes in, the batch before them where one reads it, and drop what nothing needs any more."""
    del graph.node[:]
    present = {tensor.name for tensor in graph.initializer}
    if any(_BATCH in node.input for node in nodes) and f"{_BATCH}.first" not in present:
        shape = f"{_BATCH}.shape"
        ends = [_constant(graph, f"{_BATCH}.{end}", np.array([n], np.int64)) for end, n in (("first", 0), ("last", 1))]
        graph.node.append(helper.make_node("Shape", [graph.input[0].name], [shape], name=shape))
        graph.node.append(helper.make_node("Slice", [shape, *ends], [_BATCH], name=_BATCH))
    graph.node.extend(nodes)
    prune(graph)
