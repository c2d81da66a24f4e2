"""How large the tensors of a graph become for one image, by shape inference, before any engine allocates one.

Exact for what exporters write; a shape that only running the graph would tell stays unknown, and the sandbox's limit on
memory holds for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from vit_edge.model_file.onnx_schema import INT64
from vit_edge.runtime.checks.operators import MAX_TENSOR_VALUES

__all__ = ["size_problems"]

# ViT-g/14 on 518 x 518 pixels needs 1.6e12 multiply-accumulates an image; 1e13 take a fast core minutes.
_MAX_MACS = 10**13
# Shapes and axes are tensors of a few values; larger ones are data.
_MAX_FOLDED_VALUES = 64

Shape: TypeAlias = "tuple[int, ...]"
_UNREADABLE = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class _Sizes:
    """What is known of each tensor by its name: its shape, and the values of small integer tensors."""

    def __init__(self, graph: Any) -> None:
        self.shapes: dict[str, Shape] = {}
        self.values: dict[str, np.ndarray[Any, Any]] = {}
        for tensor in graph.initializer:
            self.keep(tensor.name, tensor)
        for value in graph.input:
            # One image: a free axis is the batch.
            self.shapes[value.name] = tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)

    def keep(self, name: str, tensor: Any) -> None:
        shape = tuple(tensor.dims)
        self.shapes[name] = shape
        size = math.prod(shape)
        if tensor.data_type != INT64 or size > _MAX_FOLDED_VALUES or tensor.external_data or min(shape, default=0) < 0:
            return
        if len(tensor.raw_data) == 8 * size and tensor.raw_data:
            self.values[name] = np.frombuffer(tensor.raw_data, "<i8").reshape(shape)
        elif len(tensor.int64_data) == size and not tensor.raw_data:
            self.values[name] = np.array(tensor.int64_data, np.int64).reshape(shape)


class _Node:
    """A node with what is known of its inputs; a fact that is not known raises KeyError."""

    def __init__(self, node: Any, sizes: _Sizes) -> None:
        self.node, self.sizes = node, sizes

    def shape(self, position: int = 0) -> Shape:
        return self.sizes.shapes[self.node.input[position]]

    def has(self, position: int) -> bool:
        return len(self.node.input) > position and bool(self.node.input[position])

    def value(self, position: int) -> list[int]:
        return [int(v) for v in self.sizes.values[self.node.input[position]].reshape(-1)]

    def integer(self, name: str, default: int) -> int:
        return next((int(a.i) for a in self.node.attribute if a.name == name), default)

    def integers(self, name: str) -> list[int] | None:
        return next((list(a.ints) for a in self.node.attribute if a.name == name), None)

    def axes(self, position: int = 1) -> list[int] | None:
        """Return `axes`, an input since opset 13 and an attribute before."""
        return self.value(position) if self.has(position) else self.integers("axes")


def size_problems(graph: Any) -> Iterator[str]:
    """Yield a sentence for each tensor that is too large, and for a graph that computes too much."""
    sizes, macs = _Sizes(graph), 0
    for node in graph.node:
        try:
            shapes, needed = _inferred(_Node(node, sizes))
        except _UNREADABLE:  # not known, or not right: the engine says which, in the sandbox
            continue
        for name, shape in zip(node.output, shapes, strict=False):
            values = math.prod(shape)
            if values > MAX_TENSOR_VALUES or min(shape, default=0) < 0:
                yield (
                    f"node {node.name!r} ({node.op_type}) makes {values:,} values for one image; "
                    f"at most {MAX_TENSOR_VALUES:,} are allowed"
                )
            sizes.shapes[name] = shape
        macs += needed
    if macs > _MAX_MACS:
        yield f"the graph needs {macs:,} multiply-accumulates for one image; at most {_MAX_MACS:,} are allowed"


def _inferred(node: _Node) -> tuple[list[Shape], int]:
    """Return the shapes of the outputs and the multiply-accumulates; folds the values of small integer tensors."""
    kind = node.node.op_type
    if kind == "Constant":
        tensor = next(a.t for a in node.node.attribute if a.name == "value")
        node.sizes.keep(node.node.output[0], tensor)
        return [tuple(tensor.dims)], 0
    _fold(node)
    if kind in _PRODUCTS:
        return _PRODUCTS[kind](node)
    shapes = _SHAPES.get(kind, _broadcast)(node)
    return shapes, 0


def _broadcast(node: _Node) -> list[Shape]:
    shapes = [node.shape(i) for i in range(len(node.node.input)) if node.has(i)]
    return [_common(*shapes)]


def _common(*shapes: Shape) -> Shape:
    """Return the shape that others broadcast to; NumPy's own function fails on very large sizes."""
    rank, out = max(len(shape) for shape in shapes), []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        others = {size for size in sizes if size != 1}
        if len(others) > 1:
            raise ValueError("shapes do not fit")
        out.append(others.pop() if others else 1)
    return tuple(out)


def _first(node: _Node) -> list[Shape]:
    return [node.shape()] * len(node.node.output)


def _concat(node: _Node) -> list[Shape]:
    shapes = [node.shape(i) for i in range(len(node.node.input))]
    out, axis = list(shapes[0]), node.integer("axis", 0)
    out[axis] = sum(shape[axis] for shape in shapes)
    return [tuple(out)]


def _window(node: _Node, kernel: list[int]) -> list[int]:
    """Return the size of the output of a window that slides over the axes behind the first two."""
    size = node.shape()[2:]
    if any(a.name == "auto_pad" for a in node.node.attribute) and node.integers("pads") is None:
        return list(size)  # at most as large as the input
    steps, spread = node.integers("strides") or [1] * len(size), node.integers("dilations") or [1] * len(size)
    pads = node.integers("pads") or [0] * (2 * len(size))
    spans = [pads[i] + pads[i + len(size)] - spread[i] * (kernel[i] - 1) - 1 for i in range(len(size))]
    up = [step - 1 if node.integer("ceil_mode", 0) else 0 for step in steps]
    return [(n + span + more) // step + 1 for n, span, more, step in zip(size, spans, up, steps, strict=True)]


def _convolution(node: _Node, weights: int = 1) -> tuple[list[Shape], int]:
    filters = node.shape(weights)
    out = (node.shape()[0], filters[0], *_window(node, list(filters[2:])))
    return [out], math.prod(out) * math.prod(filters[1:])


def _quantized_convolution(node: _Node) -> tuple[list[Shape], int]:
    return _convolution(node, 3)


def _pool(node: _Node) -> list[Shape]:
    return [(*node.shape()[:2], *_window(node, node.integers("kernel_shape") or []))]


def _global_pool(node: _Node) -> list[Shape]:
    return [(*node.shape()[:2], *(1 for _ in node.shape()[2:]))]


def _matmul(node: _Node, right: int = 1) -> tuple[list[Shape], int]:
    a, b = node.shape(), node.shape(right)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    out = (*_common(a[:-2], b[:-2]), *rows, *columns)
    return [out], math.prod(out) * a[-1]


def _quantized_matmul(node: _Node) -> tuple[list[Shape], int]:
    return _matmul(node, 3)


def _gemm(node: _Node) -> tuple[list[Shape], int]:
    a, b = node.shape(), node.shape(1)
    rows, inner = a[::-1] if node.integer("transA", 0) else a
    columns = b[0] if node.integer("transB", 0) else b[1]
    return [(rows, columns)], rows * columns * inner


def _reshape(node: _Node) -> list[Shape]:
    given, wanted = node.shape(), node.value(1)
    out = [given[i] if size == 0 else size for i, size in enumerate(wanted)]
    if -1 in out:
        out[out.index(-1)] = math.prod(given) // -math.prod(out)
    return [tuple(out)]


def _transpose(node: _Node) -> list[Shape]:
    order = node.integers("perm") or range(len(node.shape()))[::-1]
    return [tuple(node.shape()[i] for i in order)]


def _flatten(node: _Node) -> list[Shape]:
    axis = node.integer("axis", 1)
    return [(math.prod(node.shape()[:axis]), math.prod(node.shape()[axis:]))]


def _squeeze(node: _Node) -> list[Shape]:
    shape, axes = node.shape(), node.axes()
    gone = {axis % len(shape) for axis in axes} if axes else {i for i, size in enumerate(shape) if size == 1}
    return [tuple(size for i, size in enumerate(shape) if i not in gone)]


def _unsqueeze(node: _Node) -> list[Shape]:
    out, axes = list(node.shape()), node.axes() or []
    rank = len(out) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        out.insert(axis, 1)
    return [tuple(out)]


def _slice(node: _Node) -> list[Shape]:
    out, starts, ends = list(node.shape()), node.value(1), node.value(2)
    axes = node.value(3) if node.has(3) else range(len(starts))
    steps = node.value(4) if node.has(4) else [1] * len(starts)
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        out[axis] = len(range(out[axis])[slice(*bounds)])
    return [tuple(out)]


def _split(node: _Node) -> list[Shape]:
    shape, axis, parts = node.shape(), node.integer("axis", 0), len(node.node.output)
    each = node.value(1) if node.has(1) else node.integers("split") or [-(-shape[axis] // parts)] * parts
    before, after = shape[: axis % len(shape)], shape[axis % len(shape) + 1 :]
    return [(*before, size, *after) for size in each]


def _gather(node: _Node) -> list[Shape]:
    shape, axis = node.shape(), node.integer("axis", 0) % len(node.shape())
    return [(*shape[:axis], *node.shape(1), *shape[axis + 1 :])]


def _reduce(node: _Node) -> list[Shape]:
    shape, axes = node.shape(), node.axes()
    if node.node.op_type == "ArgMax":
        axes = [node.integer("axis", 0)]
    gone = {axis % len(shape) for axis in axes} if axes else set(range(len(shape)))
    kept = [1 if i in gone else size for i, size in enumerate(shape)]
    return [tuple(kept if node.integer("keepdims", 1) else [kept[i] for i in range(len(kept)) if i not in gone])]


def _pad(node: _Node) -> list[Shape]:
    out, pads = list(node.shape()), node.value(1) if node.has(1) else node.integers("pads") or []
    axes = node.value(3) if node.has(3) else range(len(out))
    for position, axis in enumerate(axes):
        out[axis] += pads[position] + pads[position + len(pads) // 2]
    return [tuple(out)]


def _expand(node: _Node) -> list[Shape]:
    return [_common(node.shape(), tuple(node.value(1)))]


def _tile(node: _Node) -> list[Shape]:
    return [tuple(size * times for size, times in zip(node.shape(), node.value(1), strict=True))]


def _filled(node: _Node) -> list[Shape]:
    return [tuple(node.value(0))]


def _range(node: _Node) -> list[Shape]:
    (start,), (end,), (step,) = (node.value(i) for i in range(3))
    return [(len(range(start, end, step)),)]


def _resize(node: _Node) -> list[Shape]:
    return [tuple(node.value(3))]


def _top_k(node: _Node) -> list[Shape]:
    out = list(node.shape())
    out[node.integer("axis", -1)] = node.value(1)[0]
    return [tuple(out)] * 2


def _shape(node: _Node) -> list[Shape]:
    return [(len(node.shape()),)]


def _unknown(node: _Node) -> list[Shape]:
    raise KeyError(node.node.op_type)  # what it makes depends on a text; only running the graph tells


def _fold(node: _Node) -> None:
    """Keep the values of a small integer tensor that follow from others: the arithmetic on shapes."""
    kind, values = node.node.op_type, node.sizes.values
    if kind == "Shape":
        found = np.array(node.shape(), np.int64)[node.integer("start", 0) : node.integer("end", 2**31)]
    elif kind in _ARITHMETIC and all(name in values for name in node.node.input if name):
        with np.errstate(all="ignore"):  # a hostile file may overflow what no right file does
            found = _ARITHMETIC[kind](node, *(values[name] for name in node.node.input if name))
    else:
        return
    if found.size <= _MAX_FOLDED_VALUES:
        values[node.node.output[0]] = found


_PRODUCTS: dict[str, Callable[[_Node], tuple[list[Shape], int]]] = {
    "Conv": _convolution, "ConvInteger": _convolution, "QLinearConv": _quantized_convolution, "Gemm": _gemm,
    "MatMul": _matmul, "MatMulInteger": _matmul, "QLinearMatMul": _quantized_matmul,
}  # fmt: skip
# Every other operator works on each value by itself, and broadcasts.
_SHAPES: dict[str, Callable[[_Node], list[Shape]]] = {
    **dict.fromkeys(["AveragePool", "MaxPool", "LpPool"], _pool),
    **dict.fromkeys(["GlobalAveragePool", "GlobalMaxPool"], _global_pool),
    **dict.fromkeys(
        ["ArgMax", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"],
        _reduce,
    ),
    **dict.fromkeys(
        [
            "BatchNormalization", "Clip", "DequantizeLinear", "Dropout", "DynamicQuantizeLinear",
            "GroupNormalization", "InstanceNormalization", "LayerNormalization", "QuantizeLinear", "ScatterND", "Trilu",
        ],
        _first,
    ),
    "Concat": _concat, "ConstantOfShape": _filled, "Expand": _expand, "Flatten": _flatten, "Gather": _gather,
    "Pad": _pad, "Range": _range, "Reshape": _reshape, "Resize": _resize, "Shape": _shape, "Slice": _slice,
    "Split": _split, "Squeeze": _squeeze, "Tile": _tile, "TopK": _top_k, "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Einsum": _unknown,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., np.ndarray[Any, Any]]] = {
    "Add": lambda _, a, b: a + b,
    "Cast": lambda _, a: a,
    "Concat": lambda node, *parts: np.concatenate(parts, axis=node.integer("axis", 0)),
    "Div": lambda _, a, b: a // b,
    "Gather": lambda node, a, i: np.take(a, i, axis=node.integer("axis", 0)),
    "Identity": lambda _, a: a,
    "Mul": lambda _, a, b: a * b,
    "Reshape": lambda _, a, shape: a.reshape(shape),
    "Squeeze": lambda _, a, *__: a.reshape(-1) if a.size > 1 else a.reshape(()),
    "Sub": lambda _, a, b: a - b,
    "Unsqueeze": lambda _, a, *__: a.reshape(-1),
}
