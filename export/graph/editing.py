"""A graph being rewritten: its nodes in order, its constants by name, nodes put in the place of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

__all__ = ["Rewriting", "with_outputs"]


class Rewriting:
    """A copy of the graph of a model, to be changed: `nodes` are in order, `tensors` are its constants by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        self.nodes = list(self._model.graph.node)
        self.tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self.inputs = {value.name: value for value in self._model.graph.input}
        self._outputs = {value.name for value in self._model.graph.output}

    def model(self) -> onnx.ModelProto:
        """Return the model as it is now, without the nodes and constants that nothing reads any more."""
        self._drop_unread()
        written = onnx.ModelProto()
        written.CopyFrom(self._model)
        del written.graph.node[:], written.graph.initializer[:]
        written.graph.node.extend(self.nodes)
        written.graph.initializer.extend(self.tensors.values())
        return written

    def _drop_unread(self) -> None:
        read, kept = set(self._outputs), []
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                kept.append(node)
                read.update(node.input)
        self.nodes = kept[::-1]
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in read}

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """Return the node that makes a tensor; None where it is an input or a constant."""
        return next((node for node in self.nodes if tensor in node.output), None)

    def num_readers(self, tensor: str) -> int:
        """Return how many inputs of nodes, and outputs of the graph, a tensor is."""
        return sum(list(node.input).count(tensor) for node in self.nodes) + (tensor in self._outputs)

    def are_constant(self, names: Sequence[str]) -> bool:
        """Return whether all of these inputs of a node are constants, or left out."""
        return all(name in self.tensors for name in names if name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return the values of a constant."""
        return numpy_helper.to_array(self.tensors[name])

    def add_tensor(self, name: str, values: npt.NDArray[Any]) -> str:
        """Add a constant, and return its name."""
        self.tensors[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def replace(self, node: onnx.NodeProto, others: Sequence[onnx.NodeProto]) -> None:
        """Put `others` where `node` stands."""
        position = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[position : position + 1] = others

    def reshape(self, source: str, output: str, shape: Sequence[int]) -> onnx.NodeProto:
        """Return a node that reshapes; a 0 keeps the size that is there."""
        name = self.add_tensor("shape." + ".".join(str(size) for size in shape), np.array(shape, np.int64))
        return helper.make_node("Reshape", [source, name], [output], name=output)

    @staticmethod
    def transpose(source: str, output: str, order: Sequence[int]) -> onnx.NodeProto:
        """Return a node that transposes."""
        return helper.make_node("Transpose", [source], [output], name=output, perm=list(order))


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """Return the graph, serialized, with these tensors among its outputs."""
    present = {value.name for value in model.graph.output}
    asked = onnx.ModelProto()
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    data: bytes = model.SerializeToString() + asked.SerializeToString()  # messages that follow one another merge
    return data
