"""The output of a third-party ONNX model: the activation that ends it is taken out, what is left are the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.model_file.onnx_schema import FLOAT, INT
from vit_edge.model_file.tasks import Activation
from vit_edge.runtime.onnx_import.editing import merge_tensors, prune, rename_tensor, set_shape

__all__ = [
    "Output",
    "add_zero_logit",
    "are_probabilities",
    "check_labels",
    "drop_activation",
    "one_value",
    "set_output",
    "settled_activation",
]

# Operators between the activation and the output that change neither values nor their order.
_SAME_VALUES = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze")
_SOFTMAX = ("Softmax", "LogSoftmax")


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """The tensor that holds the logits: [batch, classes], with further axes of size 1 if `rank` is above 2."""

    name: str
    rank: int
    num_classes: int
    dtype: Literal["float32", "float16"] = "float32"


def drop_activation(graph: Any, output: str, *, rank: int = 2) -> Activation | None:
    """Take the activation that ends a graph out of it and return it; None if the graph ends in logits.

    The output keeps its name. "none" is returned for probabilities that the graph makes in another way: nothing is
    taken out then, and no activation belongs behind them.
    """
    makers = {name: node for node in graph.node for name in node.output}
    node, is_reshaped = makers.get(output), False
    while node is not None and node.op_type in _SAME_VALUES:
        is_reshaped = is_reshaped or node.op_type not in ("Cast", "Identity")
        node = makers.get(node.input[0])
    if node is None:
        return None
    inner = makers.get(node.input[0]) if node.input else None
    if node.op_type == "Log" and inner is not None and inner.op_type == "Softmax":
        return _drop(graph, [node, inner], is_reshaped=is_reshaped, rank=rank)
    if node.op_type in _SOFTMAX:
        return _drop(graph, [node], is_reshaped=is_reshaped, rank=rank)
    if node.op_type == "Sigmoid":
        _bypass(graph, [node])
        return "sigmoid"
    is_exponential = node.op_type == "Div" and inner is not None and inner.op_type == "Exp"
    return "none" if is_exponential or node.op_type == "HardSigmoid" else None


def settled_activation(declared: Activation | None, found: Activation | None) -> Activation:
    """Return the activation behind the logits; raises UsageError if the graph has another than the declared one."""
    if declared is not None and found not in (None, declared):
        reason = f"the activation is declared as {declared}, but the model ends in {found}"
        raise UsageError("cannot load", reason=reason, remedy="leave the declaration out")
    return declared or found or "softmax"


def check_labels(num_values: int, num_labels: int) -> None:
    """Raise UsageError unless there is one label for each value; a network of one logit may have one or two."""
    if num_values != num_labels and (num_values, num_labels) != (1, 2):
        kind = "classes" if num_values > 1 else "value"
        reason = f"{num_labels} labels for {num_values} {kind}"
        raise UsageError("cannot load", reason=reason, remedy="give one label for each class, in order")


def one_value(file: str | None = None, *, what: str = "cannot load") -> ModelRejected:
    """Return the error for a network of one value for each image that does not say what the value is."""
    reason = "the model gives one value for each image, which may be the logit of a class or a quantity"
    remedy = "give the activation: sigmoid (`--activation sigmoid`) for the logit of a class, none for a quantity"
    return ModelRejected(what, file=file, reason=reason, remedy=remedy)


def add_zero_logit(graph: Any) -> None:
    """Turn the one logit z of a graph into the logits 0 and z of two classes: their softmax is the sigmoid of z."""
    rename_tensor(graph, "logits", "logits.one")
    graph.initializer.add(
        name="logits.zero_and_one", data_type=FLOAT, dims=[2], raw_data=np.array([0, 1], "<f4").tobytes()
    )
    inputs = ["logits.one", "logits.zero_and_one"]
    graph.node.add(input=inputs, output=["logits"], name="logits", op_type="Mul")
    graph.output[0].name = "logits"
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2


def are_probabilities(values_BK: npt.NDArray[Any]) -> bool:
    """Return whether each row is a distribution over classes."""
    return values_BK.shape[1] > 1 and values_BK.min() >= 0 and np.allclose(values_BK.sum(axis=1), 1, atol=1e-3)


def set_output(graph: Any, output: Output, batch_size: int | None) -> None:
    """Leave the graph one output, float32 `logits` [batch, classes], and only the nodes that it needs."""
    steps = [("Flatten", "axis", 1)] if output.rank > 2 else []
    steps += [("Cast", "to", FLOAT)] if output.dtype == "float16" else []
    if steps:
        rename_tensor(graph, "logits", "logits.inner")
        name = "logits.inner" if output.name == "logits" else output.name
        for step in steps:
            name = _append(graph, *step, source=name, target="logits" if step is steps[-1] else "logits.flat")
    else:
        rename_tensor(graph, output.name, "logits")
    del graph.output[:]
    value = graph.output.add(name="logits")
    value.type.tensor_type.elem_type = FLOAT
    set_shape(value.type.tensor_type, [batch_size or "batch", output.num_classes])
    prune(graph)


def _drop(graph: Any, nodes: list[Any], *, is_reshaped: bool, rank: int) -> Activation:
    """Take a softmax out if it runs over the classes; what another one gives is left as it is."""
    axis = next((attribute.i for attribute in nodes[-1].attribute if attribute.name == "axis"), -1)
    if axis != 1 and (axis not in (-1, rank - 1) or is_reshaped or rank != 2):
        return "none"
    _bypass(graph, nodes)
    return "softmax"


def _bypass(graph: Any, nodes: list[Any]) -> None:
    source, target = nodes[-1].input[0], nodes[0].output[0]
    for node in nodes:
        graph.node.remove(node)
    merge_tensors(graph, source, target)


def _append(graph: Any, op_type: str, attribute: str, value: int, *, source: str, target: str) -> str:
    node = graph.node.add(input=[source], output=[target], name=target, op_type=op_type)
    node.attribute.add(name=attribute, i=value, type=INT)
    return target
