"""Changes to the graph of a third-party model, for onnx's messages and for those of `onnx_schema` alike."""

from __future__ import annotations

from typing import Any

__all__ = ["merge_tensors", "prune", "rename_tensor", "set_shape"]


def rename_tensor(graph: Any, old: str, new: str) -> None:
    """Rename a tensor of the graph; another tensor that has the name `new` gets a free name."""
    if old == new:
        return
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.input, *graph.initializer)}
    if new in taken:
        free = next(name for name in (f"{new}.{n}" for n in range(len(taken) + 1)) if name not in taken)
        _renamed(graph, new, free)
    _renamed(graph, old, new)


def merge_tensors(graph: Any, old: str, new: str) -> None:
    """Give a tensor the name of another, whose maker is gone: what read either reads the one that is left."""
    _renamed(graph, old, new)


def prune(graph: Any) -> None:
    """Drop nodes and weights that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(kept)]
    unread = [number for number, tensor in enumerate(graph.initializer) if tensor.name not in needed]
    for number in reversed(unread):
        del graph.initializer[number]
    del graph.node[:]
    graph.node.extend(nodes)


def set_shape(tensor: Any, sizes: list[int | str]) -> None:
    """Give a tensor type these axes: sizes, or names of dynamic axes."""
    del tensor.shape.dim[:]
    for size in sizes:
        tensor.shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))


def _renamed(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        if value.name == old:
            value.name = new
