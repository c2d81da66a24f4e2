"""What an ONNX classifier made elsewhere takes, put under the name, type and axes that a model file has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.image import Preprocessing
from vit_edge.model_file.onnx_schema import FLOAT, FLOAT16, INT, INTS, UINT8

__all__ = ["EXPORT", "rejected", "set_input", "set_shape"]

EXPORT = "make a model file of it where torch and onnx are: vit-edge export {file} --labels ... --preprocessing ..."
_AXES = {"NCHW": 1, "NHWC": 3}
# From the axes that a model file has to those of a graph; float16 is given float32, and rounds it itself.
_TURNS = {("NCHW", UINT8): [0, 3, 1, 2], ("NHWC", FLOAT): [0, 2, 3, 1], ("NHWC", FLOAT16): [0, 2, 3, 1]}
# What changes the type of its input, not the order of its axes.
_SAME_AXES = ("Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear")
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


def set_input(graph: Any, preprocessing: Preprocessing) -> dict[str, Any]:
    """Give the graph the input of a model file, its name kept; returns the manifest's entry.

    Raises ModelRejected, or UsageError where the preprocessing gives other images than it takes.
    """
    value = _the_input(graph)
    tensor = value.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type not in (FLOAT, FLOAT16, UINT8) or len(sizes) != 4:
        reason = f"its input {value.name!r} has {len(sizes)} axes of type {tensor.elem_type}"
        raise rejected(f"{reason}; images of float32, float16 or uint8 are read", EXPORT)
    layout = _layout(graph, value.name, sizes)
    height, width = preprocessing.crop
    found = sizes[2:] if layout == "NCHW" else sizes[1:3]
    if any(size not in (0, given) for size, given in zip(found, (height, width), strict=True)):
        shape = " x ".join(str(size or "?") for size in found)
        reason = f"it takes {shape} pixels; the preprocessing gives {height} x {width}"
        raise UsageError("cannot load", reason=reason, remedy="give the crop that it was trained with")
    _convert(graph, value.name, layout, tensor.elem_type)
    is_uint8 = tensor.elem_type == UINT8
    tensor.elem_type = UINT8 if is_uint8 else FLOAT
    set_shape(tensor, [sizes[0] or "batch", *([height, width, 3] if is_uint8 else [3, height, width])])
    entry = type(value).FromString(value.SerializeToString())  # what a list held is gone with it
    if entry.name == "logits":  # the output's name here
        entry.name = "logits.input"
        _reread(graph, "logits", entry.name)
    del graph.input[:]
    graph.input.append(entry)
    fixed = {"batch": sizes[0]} if sizes[0] else {}
    dtype, axes = ("uint8", "NHWC") if is_uint8 else ("float32", "NCHW")
    return {"name": entry.name, "dtype": dtype, "layout": axes, **fixed}


def set_shape(tensor: Any, sizes: Sequence[int | str]) -> None:
    """Give a tensor type these axes: sizes, or names of those that are free."""
    del tensor.shape.dim[:]
    for size in sizes:
        tensor.shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))


def rejected(reason: str, remedy: str) -> ModelRejected:
    """Return the error for a file that is not taken."""
    return ModelRejected("cannot load", reason=reason, remedy=remedy)


def _the_input(graph: Any) -> Any:
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in constants]
    if len(values) != 1:
        names = ", ".join(repr(value.name) for value in values)
        raise rejected(f"it has {len(values)} inputs ({names}); a classifier has one", EXPORT)
    return values[0]


def _layout(graph: Any, name: str, sizes: Sequence[int]) -> str:
    """Return the order of the axes that the shape shows, or where that is free, what reads the input."""
    sure = {layout for layout, axis in _AXES.items() if sizes[axis] == 3}
    possible = {layout for layout, axis in _AXES.items() if sizes[axis] in (0, 3)}
    shown = sure if len(sure) == 1 else set(_layouts_read(graph, name)) & possible
    if len(shown) != 1:
        shape = ", ".join(str(size or "?") for size in sizes)
        raise rejected(f"its input [{shape}] does not show where its 3 channels are", f"{EXPORT} --layout NCHW")
    return shown.pop()


def _layouts_read(graph: Any, name: str) -> Iterator[str]:
    """Yield the order of axes in which each node reads `name`: a convolution's channels come first, by definition."""
    names = {name}
    for node in graph.node:
        if not node.input or node.input[0] not in names:
            continue
        if node.op_type in _SAME_AXES and node.output:
            names.add(node.output[0])
        elif node.op_type in _CONVOLUTIONS:
            yield "NCHW"
        elif node.op_type == "Transpose":
            order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
            yield {(0, 3, 1, 2): "NHWC", (0, 2, 3, 1): "NCHW"}.get(tuple(order), "unknown")


def _convert(graph: Any, name: str, layout: str, dtype: int) -> None:
    """Put what makes the graph's own input of a model file's behind it: a Transpose, a Cast, or both."""
    order, is_half = _TURNS.get((layout, dtype)), dtype == FLOAT16
    if order is None and not is_half:
        return
    turned, halved = f"{name}.{layout}", f"{name}.float16"
    _reread(graph, name, halved if is_half else turned)
    if is_half:
        source = turned if order else name
        cast = type(graph.node[0])(input=[source], output=[halved], name=halved, op_type="Cast")
        cast.attribute.add(name="to", i=FLOAT16, type=INT)
        graph.node.insert(0, cast)
    if order:
        turn = type(graph.node[0])(input=[name], output=[turned], name=turned, op_type="Transpose")
        turn.attribute.add(name="perm", ints=order, type=INTS)
        graph.node.insert(0, turn)


def _reread(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
