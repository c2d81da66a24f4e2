"""What an ONNX classifier made elsewhere takes and gives, and the same graph under the names and layouts used here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.export.onnx_import.cleanup import prune, rename_tensor
from vit_edge.image import Pixels, Preprocessing

__all__ = ["Layout", "Output", "ThirdPartyInput", "input_of", "set_interface"]

Array: TypeAlias = npt.NDArray[Any]
Layout: TypeAlias = Literal["NCHW", "NHWC"]

_AXES: tuple[tuple[Layout, int], ...] = (("NCHW", 1), ("NHWC", 3))
_DTYPES: dict[int, Literal["float32", "uint8"]] = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ThirdPartyInput:
    """What the graph takes as it came: `fixed` is its batch where it is written into it."""

    name: str
    dtype: Literal["float32", "uint8"]
    layout: Layout
    fixed: int | None

    def of(self, images_NHWC: Pixels, preprocessing: Preprocessing) -> Array:
        """Return the input for pixels."""
        if self.dtype == "uint8":
            return images_NHWC if self.layout == "NHWC" else np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
        normalised = preprocessing.normalise(images_NHWC)
        return normalised if self.layout == "NCHW" else np.ascontiguousarray(normalised.transpose(0, 2, 3, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """The tensor taken for the logits: [batch, classes], or with axes of one behind it."""

    name: str
    rank: int
    num_classes: int


def input_of(model: onnx.ModelProto, preprocessing: Preprocessing, layout: Layout | None) -> ThirdPartyInput:
    """Return what the graph takes; raises ModelRejected, or UsageError where the preprocessing gives something else."""
    if len(model.graph.input) != 1:
        names = ", ".join(repr(value.name) for value in model.graph.input)
        raise _rejected(f"it has {len(model.graph.input)} inputs ({names}); a classifier has one", "give a classifier")
    value = model.graph.input[0]
    tensor = value.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
    if tensor.elem_type not in _DTYPES or len(sizes) != 4:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        reason = f"its input {value.name!r} is {kind} of {len(sizes)} axes; it has to be float32 or uint8 images"
        raise _rejected(reason, "export it again with such an input")
    chosen = _layout(sizes, layout)
    rows_columns = sizes[2:] if chosen == "NCHW" else sizes[1:3]
    if any(size not in (0, told) for size, told in zip(rows_columns, preprocessing.crop, strict=True)):
        height, width = (size or "?" for size in rows_columns)
        reason = (
            f"it takes {height} x {width} pixels; the preprocessing gives {' x '.join(map(str, preprocessing.crop))}"
        )
        raise UsageError("cannot take the network", reason=reason, remedy="give the crop that it was trained with")
    return ThirdPartyInput(name=value.name, dtype=_DTYPES[tensor.elem_type], layout=chosen, fixed=sizes[0] or None)


def _layout(sizes: list[int], told: Layout | None) -> Layout:
    """Return the order of the axes that the shape shows, or that was told; sizes of 0 are free."""
    possible = [name for name, axis in _AXES if sizes[axis] in (0, 3)]
    sure = [name for name, axis in _AXES if sizes[axis] == 3]
    shape = f"[{', '.join(str(size or '?') for size in sizes)}]"
    if not possible or told not in (None, *possible):
        reason = f"its input {shape} has no 3 channels{f' as {told}' if told else ''}"
        raise _rejected(reason, "give a classifier of RGB images, and its layout")
    if told is None and len(possible) > 1 and len(sure) != 1:
        reason = f"its input {shape} does not show whether channels come first or last"
        raise UsageError("cannot take the network", reason=reason, remedy="say the layout: NCHW or NHWC")
    return told or (sure or possible)[0]


def set_interface(
    model: onnx.ModelProto, output: Output, entry: ThirdPartyInput, preprocessing: Preprocessing, batch: int | None
) -> None:
    """Give the graph the input of a model file (uint8 NHWC or float32 NCHW, its name kept) and the output `logits`."""
    graph = model.graph
    if output.rank == 2:
        rename_tensor(graph, output.name, "logits")
    else:
        inner = f"{output.name}.unflattened"
        rename_tensor(graph, output.name, inner)
        rename_tensor(graph, "logits", "logits.inner")
        graph.node.append(helper.make_node("Flatten", [inner], ["logits"], name="logits", axis=1))
    height, width = preprocessing.crop
    shape = [height, width, 3] if entry.dtype == "uint8" else [3, height, width]
    name = graph.input[0].name
    if entry.layout != ("NHWC" if entry.dtype == "uint8" else "NCHW"):
        turned = f"{name}.{entry.layout}"
        for node in graph.node:
            node.input[:] = [turned if read == name else read for read in node.input]
        order = [0, 3, 1, 2] if entry.layout == "NCHW" else [0, 2, 3, 1]
        graph.node.insert(0, helper.make_node("Transpose", [name], [turned], name=turned, perm=order))
    dtype = TensorProto.UINT8 if entry.dtype == "uint8" else TensorProto.FLOAT
    del graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info(name, dtype, [batch or "batch", *shape]))
    sizes = [batch or "batch", output.num_classes]
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, sizes))
    prune(graph)


def _rejected(reason: str, remedy: str) -> ModelRejected:
    return ModelRejected("cannot take the network", reason=reason, remedy=remedy)
