"""Matrix products as 1x1 convolutions, with the channels of activations first: for OpenVINO on CPUs without VNNI.

There OpenVINO runs INT8 products in a kernel that is slower than float32 (oneDNN's `jit_gemm`), and INT8 convolutions
in one that is twice as fast (`jit_avx2_1x1`). DeiT-tiny, batch 1, one thread, AVX2: float32 35.0 ms, INT8 products
43.7, INT8 convolutions 22.7. A transpose on either side of each convolution would take back all of it, so activations
stay channels first from the patch embedding to the head, and turn only for attention. In memory OpenVINO keeps the
channels last, so most turns that are left move nothing. LayerNormalization is written out: 22.7 ms, 24.0 as an operator
between two turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from vit_edge.export.graph.editing import Rewriting
from vit_edge.export.graph.macs import shapes_for_one_image
from vit_edge.export.graph.matmuls import attribute

__all__ = ["channels_first"]

# A convolution over tokens has two spatial axes, the second of size 1.
_RANK = 4
_LAST_TO_FIRST, _FIRST_TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
_UNARY = ("Gelu", "Erf", "Tanh", "Sigmoid", "Relu", "Identity", "Sqrt", "QuantizeLinear", "DequantizeLinear")
_BINARY = ("Add", "Sub", "Mul", "Div")
# From this opset on the axes of ReduceMean are an input.
_AXES_AS_INPUT = 18


def channels_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a quantized `model` of fixed batch that computes the same with 1x1 convolutions.

    Each MatMul with constant weights, [batch, ..., inputs], is a Conv over [batch, inputs, tokens, 1] then. A tensor
    that is channels first keeps its name; its other form, if anything reads that, is `NAME.channels_last`.
    """
    return _Layout(model).rewritten()


class _Layout:
    """The nodes of the rewritten graph: `_first` holds the tensors that are channels first, by their former name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = Rewriting(model)
        self._shapes = {name: shape for name, shape in shapes_for_one_image(model).items() if shape is not None}
        self._outputs = {value.name for value in model.graph.output}
        self._opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._nodes: list[onnx.NodeProto] = []
        self._first: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self._as_before = {*self._graph.inputs, *self._graph.tensors}

    def rewritten(self) -> onnx.ModelProto:
        """Return the rewritten model, without value_info: the shapes there are those of before."""
        for node in self._graph.nodes:
            self._add(node)
        self._graph.nodes = self._nodes
        model = self._graph.model()
        del model.graph.value_info[:]
        return model

    def _add(self, node: onnx.NodeProto) -> None:
        """Add what computes a node: over channels first if that is known to be the same, else as it is."""
        if node.op_type == "MatMul" and self._is_weight(node.input[1]) and self._has_channels(node.input[0]):
            self._add_convolution(node)
            return
        move = _MOVES.get(node.op_type)
        if move is not None and any(name in self._first for name in node.input) and move(self, node):
            return
        self._nodes.append(_with_inputs(node, [self._tokens(name) for name in node.input]))
        self._as_before.update(node.output)

    def _is_weight(self, name: str) -> bool:
        """Return whether a tensor is a constant matrix, or integers of one and their scales."""
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            return self._graph.are_constant(maker.input) and len(self._graph.tensors[maker.input[0]].dims) == 2
        return name in self._graph.tensors and len(self._graph.tensors[name].dims) == 2

    def _has_channels(self, name: str) -> bool:
        return 2 <= len(self._shapes.get(name, ())) <= _RANK

    def _add_convolution(self, node: onnx.NodeProto) -> None:
        inputs = [self._channels(node.input[0]), self._kernel(node.input[1])]
        self._put(helper.make_node("Conv", inputs, [node.output[0]], name=node.name))

    def _kernel(self, name: str) -> str:
        """Return the weights [inputs, outputs] as the kernel [outputs, inputs, 1, 1] of a convolution."""
        maker = self._makers.get(name)
        integers = name if maker is None else maker.input[0]
        kernel = f"{integers}.kernel"
        if kernel not in self._graph.tensors:
            self._graph.add_tensor(kernel, np.ascontiguousarray(self._graph.array(integers).T)[:, :, None, None])
            if maker is not None:
                inputs, output = [kernel, *maker.input[1:]], f"{name}.kernel"
                self._nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=output, axis=0))
        return kernel if maker is None else f"{name}.kernel"

    def _put(self, node: onnx.NodeProto) -> None:
        """Add a node whose output is channels first; a graph's output keeps its name in the other form."""
        name = node.output[0]
        if name in self._outputs:
            node.output[0] = f"{name}.channels_first"
        self._first[name] = node.output[0]
        self._nodes.append(node)
        if name in self._outputs:
            self._turn_back(name, output=name)
            self._as_before.add(name)

    def _channels(self, name: str) -> str:
        """Return the tensor that holds a tensor of the graph channels first, adding what makes it."""
        if name not in self._first:
            batch, *tokens, width = self._shapes[name]
            shaped, first = f"{name}.as_image", f"{name}.channels_first"
            self._nodes.append(self._graph.reshape(name, shaped, [batch, *_two(tokens), width]))
            self._nodes.append(self._graph.transpose(shaped, first, _LAST_TO_FIRST))
            self._first[name] = first
        return self._first[name]

    def _tokens(self, name: str) -> str:
        """Return the tensor that holds a tensor of the graph in the form that it had, adding what makes it."""
        if name in self._as_before or name not in self._first:
            return name
        if name not in self._last:
            self._turn_back(name, output=f"{name}.channels_last")
        return self._last[name]

    def _turn_back(self, name: str, *, output: str) -> None:
        turned = f"{name}.turned"
        self._nodes.append(self._graph.transpose(self._first[name], turned, _FIRST_TO_LAST))
        self._nodes.append(self._graph.reshape(turned, output, self._shapes[name]))
        self._last[name] = output

    def _constant(self, name: str, like: str) -> str | None:
        """Return a constant as one that can be added to `like` channels first; None if it is too large for that."""
        rank = len(self._shapes[like])
        values = self._graph.array(name)
        if values.ndim > rank:
            return None
        if values.size == 1:
            return name
        spread = values.reshape((1,) * (rank - values.ndim) + values.shape)
        batch, *tokens, width = spread.shape
        moved = spread.reshape(batch, *_two(tokens), width).transpose(_LAST_TO_FIRST)
        return self._graph.add_tensor(f"{name}.channels_first.{rank}", np.ascontiguousarray(moved))

    def _unary(self, node: onnx.NodeProto) -> bool:
        if node.op_type.endswith("Linear") and self._graph.array(node.input[1]).size != 1:
            return False
        self._put(_with_inputs(node, [self._first[node.input[0]], *node.input[1:]]))
        return True

    def _binary(self, node: onnx.NodeProto) -> bool:
        moving = [name for name in node.input if name not in self._graph.tensors]
        shapes = [self._shapes.get(name) for name in moving]
        if shapes[0] is None or any(shape != shapes[0] for shape in shapes):
            return False
        fitting = {name: self._constant(name, moving[0]) for name in node.input if name in self._graph.tensors}
        if None in fitting.values():
            return False
        self._put(_with_inputs(node, [fitting.get(name) or self._channels(name) for name in node.input]))
        return True

    def _norm(self, node: onnx.NodeProto) -> bool:
        """Add a LayerNormalization over the channels, as the operator is defined."""
        rank = len(self._shapes[node.input[0]])
        if attribute(node, "axis", -1) not in (-1, rank - 1) or len(node.output) > 1:
            return False
        source, name = self._first[node.input[0]], node.output[0]
        epsilon = self._graph.add_tensor(f"{name}.epsilon", np.array(attribute(node, "epsilon", 1e-5), np.float32))
        self._mean(source, f"{name}.mean")
        self._step("Sub", [source, f"{name}.mean"], f"{name}.centered")
        self._step("Mul", [f"{name}.centered", f"{name}.centered"], f"{name}.squared")
        self._mean(f"{name}.squared", f"{name}.variance")
        self._step("Add", [f"{name}.variance", epsilon], f"{name}.positive")
        self._step("Sqrt", [f"{name}.positive"], f"{name}.deviation")
        scaled = [("Mul", tensor) for tensor in node.input[1:2]] + [
            ("Add", tensor) for tensor in node.input[2:] if tensor
        ]
        kept = [step for step in scaled if not self._does_nothing(*step)]
        last, operands = "Div", [f"{name}.centered", f"{name}.deviation"]
        for position, (operator, tensor) in enumerate(kept):
            self._step(last, operands, f"{name}.{position}")
            last, operands = operator, [f"{name}.{position}", self._constant(tensor, node.input[0]) or tensor]
        self._put(helper.make_node(last, operands, [name], name=node.name))
        return True

    def _does_nothing(self, operator: str, name: str) -> bool:
        return bool(np.all(self._graph.array(name) == (1 if operator == "Mul" else 0)))

    def _mean(self, source: str, output: str) -> None:
        if self._opset >= _AXES_AS_INPUT:
            axes = self._graph.add_tensor("axes.1", np.array([1], np.int64))
            self._step("ReduceMean", [source, axes], output)
        else:
            self._nodes.append(helper.make_node("ReduceMean", [source], [output], name=output, axes=[1]))

    def _step(self, operator: str, inputs: Sequence[str], output: str) -> None:
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=output))

    def _pad(self, node: onnx.NodeProto) -> bool:
        """Add a Pad of the tokens."""
        rank = len(self._shapes[node.input[0]])
        if len(node.input) > 3 or not self._graph.are_constant(node.input[1:]):
            return False
        pads = self._graph.array(node.input[1]).reshape(2, rank)
        first = np.zeros((2, _RANK), np.int64)
        for axis in range(rank):
            first[:, _axis(axis, rank)] = pads[:, axis]
        name = self._graph.add_tensor(f"{node.input[1]}.channels_first.{rank}", first.reshape(-1))
        self._put(_with_inputs(node, [self._first[node.input[0]], name, *node.input[2:]]))
        return True

    def _slice(self, node: onnx.NodeProto) -> bool:
        if len(node.input) < 4 or not self._graph.are_constant(node.input[1:]):
            return False
        rank = len(self._shapes[node.input[0]])
        axes = np.array([_axis(int(axis) % rank, rank) for axis in self._graph.array(node.input[3])], np.int64)
        name = self._graph.add_tensor(f"{node.output[0]}.axes", axes)
        self._put(_with_inputs(node, [self._first[node.input[0]], *node.input[1:3], name, *node.input[4:]]))
        return True

    def _reshape(self, node: onnx.NodeProto) -> bool:
        """Leave a Reshape out that drops the only token: channels first it has axes of size 1 anyway."""
        before, after = (self._shapes.get(name, []) for name in (node.input[0], node.output[0]))
        single = len(after) == 2 and after == [before[0], before[-1]] and math.prod(before[1:-1]) == 1
        if single and node.output[0] not in self._outputs:
            self._first[node.output[0]] = self._first[node.input[0]]
        return single and node.output[0] not in self._outputs


_MOVES: Mapping[str, Callable[[_Layout, onnx.NodeProto], bool]] = {
    **dict.fromkeys(_UNARY, _Layout._unary),
    **dict.fromkeys(_BINARY, _Layout._binary),
    "LayerNormalization": _Layout._norm,
    "Pad": _Layout._pad,
    "Reshape": _Layout._reshape,
    "Slice": _Layout._slice,
}


def _two(tokens: Sequence[int]) -> list[int]:
    """Return the axes of tokens as two: of no, one or two of them."""
    return [*tokens, 1, 1][:2]


def _axis(axis: int, rank: int) -> int:
    """Return where an axis of a tensor of this rank is once the channels are first."""
    if axis == 0:
        return 0
    return 1 if axis == rank - 1 else axis + 1


def _with_inputs(node: onnx.NodeProto, inputs: Sequence[str]) -> onnx.NodeProto:
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    changed.input[:] = inputs
    return changed
