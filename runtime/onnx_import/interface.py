"""The input of a third-party ONNX model: its layout and type, read once, and changed into that of a model file.

It works on onnx's messages and on those of `onnx_schema` alike: the runtime and the import read a model the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.image import Pixels, Preprocessing
from vit_edge.model_file.onnx_schema import FLOAT, FLOAT16, INT, INTS, UINT8
from vit_edge.runtime.onnx_import.editing import rename_tensor, set_shape

__all__ = ["IMPORT", "Layout", "ThirdPartyInput", "read_input", "rejected", "set_input"]

Array: TypeAlias = npt.NDArray[Any]
Layout: TypeAlias = Literal["NCHW", "NHWC"]

IMPORT = "vit-edge export {file} --labels ... --preprocessing ..., where torch and onnx are installed"
_AXES: dict[Layout, int] = {"NCHW": 1, "NHWC": 3}
_DTYPES: dict[int, Literal["float32", "float16", "uint8"]] = {FLOAT: "float32", FLOAT16: "float16", UINT8: "uint8"}
# TensorProto.DataType (onnx.proto), to name what cannot be read.
_NAMES = {3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 11: "float64", 16: "bfloat16"}
_CHANNELS = {1: "grayscale images", 2: "2 channels", 4: "images with 4 channels (RGBA)"}
# Operators that change the type of their input, not the order of its axes.
_SAME_AXES = ("Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear")
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThirdPartyInput:
    """The input as the file declares it; `batch_size` is None if the batch is dynamic."""

    name: str
    dtype: Literal["float32", "float16", "uint8"]
    layout: Layout
    batch_size: int | None

    def of(self, images_NHWC: Pixels, preprocessing: Preprocessing) -> Array:
        """Return the input for uint8 images [batch, height, width, 3]."""
        if self.dtype == "uint8":
            return images_NHWC if self.layout == "NHWC" else np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
        normalised = preprocessing.normalise(images_NHWC).astype(self.dtype, copy=False)
        return normalised if self.layout == "NCHW" else np.ascontiguousarray(normalised.transpose(0, 2, 3, 1))


def read_input(graph: Any, preprocessing: Preprocessing, *, layout: Layout | None = None) -> ThirdPartyInput:
    """Return the one input of a graph; `layout` is used only if neither shape nor graph shows it.

    Raises ModelRejected if the input is not RGB images, UsageError if the preprocessing gives another size.
    """
    value = _the_input(graph)
    tensor = value.type.tensor_type
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type not in _DTYPES or len(sizes) != 4:
        kind = _NAMES.get(tensor.elem_type, _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}"))
        reason = f"the input {value.name!r} is {kind} with {len(sizes)} axes; vit-edge reads float32, float16 or uint8"
        raise rejected(f"{reason} images with 4 axes", "export the model again with such an input")
    chosen = _layout(graph, value.name, sizes, layout)
    found = sizes[2:] if chosen == "NCHW" else sizes[1:3]
    if any(size not in (0, given) for size, given in zip(found, preprocessing.crop, strict=True)):
        takes, gives = (" x ".join(str(size or "?") for size in pair) for pair in (found, preprocessing.crop))
        reason = f"the model takes {takes} pixels; the preprocessing gives {gives}"
        raise UsageError("cannot load", reason=reason, remedy="set crop in the preprocessing to the model's size")
    return ThirdPartyInput(name=value.name, dtype=_DTYPES[tensor.elem_type], layout=chosen, batch_size=sizes[0] or None)


def set_input(
    graph: Any, entry: ThirdPartyInput, preprocessing: Preprocessing, batch_size: int | None
) -> dict[str, Any]:
    """Give the graph the input of a model file (uint8 NHWC or float32 NCHW); return the manifest's entry for it."""
    _convert(graph, entry)
    is_uint8 = entry.dtype == "uint8"
    value = _the_input(graph)
    tensor = value.type.tensor_type
    tensor.elem_type = UINT8 if is_uint8 else FLOAT
    height, width = preprocessing.crop
    set_shape(tensor, [batch_size or "batch", *([height, width, 3] if is_uint8 else [3, height, width])])
    kept = type(value).FromString(value.SerializeToString())  # emptying the list drops what it held
    del graph.input[:]
    graph.input.append(kept)
    if kept.name == "logits":  # the name of the output
        rename_tensor(graph, "logits", "logits.input")
    fixed = {"batch": batch_size} if batch_size else {}
    dtype, axes = ("uint8", "NHWC") if is_uint8 else ("float32", "NCHW")
    return {"name": graph.input[0].name, "dtype": dtype, "layout": axes, **fixed}


def rejected(reason: str, remedy: str) -> ModelRejected:
    """Return the error for a file that cannot be read."""
    return ModelRejected("cannot load", reason=reason, remedy=remedy)


def _the_input(graph: Any) -> Any:
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in constants]
    if len(values) != 1:
        names = ", ".join(repr(value.name) for value in values)
        raise rejected(f"the model has {len(values)} inputs ({names}); a classifier has one", "give a classifier")
    return values[0]


def _layout(graph: Any, name: str, sizes: Sequence[int], given: Layout | None) -> Layout:
    """Return the order of the axes: from the shape, else from the nodes that read the input, else as given."""
    possible = {layout for layout, axis in _AXES.items() if sizes[axis] in (0, 3)}
    sure = {layout for layout, axis in _AXES.items() if sizes[axis] == 3}
    shape = f"[{', '.join(str(size or '?') for size in sizes)}]"
    if not possible or given not in (None, *possible):
        raise rejected(_not_rgb(sizes, shape, given), "give a classifier of RGB images, and its layout")
    shown = sure if len(sure) == 1 else possible & set(_layouts_read(graph, name)) or possible
    if given is None and len(shown) != 1:
        reason = f"the input {shape} does not show whether the 3 channels come first or last"
        raise UsageError("cannot load", reason=reason, remedy=f"{IMPORT} --layout NCHW (or NHWC)")
    return given or shown.pop()


def _not_rgb(sizes: Sequence[int], shape: str, given: Layout | None) -> str:
    if given is not None:
        return f"the input {shape} does not have 3 channels as {given}"
    other = next((_CHANNELS[size] for size in (sizes[1], sizes[3]) if size in _CHANNELS), "no 3 channels")
    return f"the input {shape} has {other}; vit-edge reads RGB images (3 channels)"


def _layouts_read(graph: Any, name: str) -> Iterator[Layout]:
    """Yield the order of axes in which each node reads `name`: the channels of a convolution come first."""
    names = {name}
    for node in graph.node:
        if not node.input or node.input[0] not in names:
            continue
        if node.op_type in _SAME_AXES and node.output:
            names.add(node.output[0])
        elif node.op_type in _CONVOLUTIONS:
            yield "NCHW"
        elif node.op_type == "Transpose":
            order = next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), ())
            if order in ((0, 3, 1, 2), (0, 2, 3, 1)):
                yield "NHWC" if order == (0, 3, 1, 2) else "NCHW"


def _convert(graph: Any, entry: ThirdPartyInput) -> None:
    """Put a Transpose, a Cast, or both between the input of a model file and the graph."""
    name, is_float16 = entry.name, entry.dtype == "float16"
    turns = entry.layout != ("NHWC" if entry.dtype == "uint8" else "NCHW")
    turned, narrowed = f"{name}.{entry.layout}" if turns else name, f"{name}.float16"
    for node in graph.node:
        node.input[:] = [(narrowed if is_float16 else turned) if read == name else read for read in node.input]
    make = type(graph.node[0])
    if is_float16:
        cast = make(input=[turned], output=[narrowed], name=narrowed, op_type="Cast")
        cast.attribute.add(name="to", i=FLOAT16, type=INT)
        graph.node.insert(0, cast)
    if turns:
        turn = make(input=[name], output=[turned], name=turned, op_type="Transpose")
        order = [0, 3, 1, 2] if entry.layout == "NCHW" else [0, 2, 3, 1]
        turn.attribute.add(name="perm", ints=order, type=INTS)
        graph.node.insert(0, turn)
