"""LayerNorm re-parameterisation (RepQ-ViT, arXiv:2212.08254): exact, and free at run time.

The channels of a normalised tensor differ in range by tens of times, and one scale for all leaves the narrow ones few
steps. LayerNorm's own scale and shift bring every channel to one range, and the products after it undo that in their
constant weights and biases. DeiT-tiny, 8-bit weights, 550 photographs: SQNR 19.8 dB against 18.4 dB, agreement 99.1 %
against 97.8 %. Scaling without the shift gains nothing, nor does aligning the norms of the class token alone, over
images instead of tokens (18.5 dB).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from vit_edge.export.graph.macs import shapes_for_one_image
from vit_edge.export.graph.matmuls import attribute
from vit_edge.export.quantization.calibration.observers import ChannelRange

__all__ = ["alignment", "find_norms", "norms_left_alone", "reparameterise"]

# What may move tokens and keep the last axis, channels, as it is.
_MOVES = ("Concat", "Gather", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}
_AN = dict.fromkeys("AEIO", "an")
# A channel that never varies has no range to divide by.
_SMALLEST_RATIO, _SMALLEST_WIDTH = 1e-3, 1e-12

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Use:
    """One product after a norm: its constant weight, [in, out] or `transposed`, and the bias added to it, if any."""

    node: onnx.NodeProto
    weight: str
    bias: str | None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """What is known of a graph: readers of each tensor, sizes of constants and of tensors for one image, zeros."""

    readers: Mapping[str, list[onnx.NodeProto]]
    constants: Mapping[str, list[int]]
    shapes: Mapping[str, list[int] | None]
    zeros: frozenset[str]
    outputs: frozenset[str]


def find_norms(model: onnx.ModelProto) -> list[str]:
    """Return the output of every LayerNormalization that only feeds products with constant weights and biases."""
    return [name for name, reason in _norms(model).items() if reason is None]


def norms_left_alone(model: onnx.ModelProto) -> dict[str, str]:
    """Return why each other norm has to stay as it is, by its output: what follows it, such as "feed a Transpose"."""
    return {name: reason for name, reason in _norms(model).items() if reason is not None}


def _norms(model: onnx.ModelProto) -> dict[str, str | None]:
    known = _known(model)
    return {node.output[0]: _obstacle(node, known) for node in model.graph.node if node.op_type == "LayerNormalization"}


def _known(model: onnx.ModelProto) -> _Known:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    integers = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64]
    return _Known(
        readers=readers,
        constants={tensor.name: list(tensor.dims) for tensor in model.graph.initializer},
        shapes=shapes_for_one_image(model),
        zeros=frozenset(tensor.name for tensor in integers if not numpy_helper.to_array(tensor).any()),
        outputs=frozenset(value.name for value in model.graph.output),
    )


def _obstacle(node: onnx.NodeProto, known: _Known) -> str | None:
    """Return what keeps a norm from being aligned, None if nothing does."""
    if not set(node.input[1:]) <= known.constants.keys() or len(node.input) != 3:
        return "have no constant scale and shift"
    for use in _uses(node.output[0], known):
        if isinstance(use, str):
            return use
        # Two tokens side by side, as a distilled network's heads read them, are no longer the norm's channels.
        if known.constants[use.weight][use.transposed] != known.constants[node.input[1]][-1]:
            return f"feed a {use.node.op_type} over several tokens"
    return None


def reparameterise(model: onnx.ModelProto, ranges: Mapping[str, ChannelRange]) -> onnx.ModelProto:
    """Return a copy of `model` in which all channels of each of `ranges`, outputs of norms, have one range.

    Norms whose channels do not vary within an image, those of the class token alone, are left as they are. The
    function stays the same up to float32 rounding: everything is folded in float64 and rounded once.
    """
    changed = _with_biases(model, ranges)
    graph = changed.graph
    known = _known(changed)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        observed = ranges.get(node.output[0])
        if observed is None or not observed.varies:
            continue
        ratio_D, middle_D = alignment(observed, smallest_ratio=_SMALLEST_RATIO)
        gamma_D, beta_D = (_array(tensors[name]) for name in node.input[1:])
        # Norms share one tensor of ones and one of zeros: each gets its own.
        node.input[1:] = [f"{node.name}.gamma", f"{node.name}.beta"]
        for name, values in zip(node.input[1:], (gamma_D / ratio_D, (beta_D - middle_D) / ratio_D), strict=True):
            tensors[name] = _tensor(name, values)
        for use in _uses(node.output[0], known):
            assert isinstance(use, _Use)
            assert use.bias is not None
            weight = _array(tensors[use.weight])
            weight_DO = weight.T if use.transposed else weight
            tensors[use.bias] = _tensor(use.bias, _array(tensors[use.bias]) + middle_D @ weight_DO)
            weight_DO = ratio_D[:, None] * weight_DO
            tensors[use.weight] = _tensor(use.weight, weight_DO.T if use.transposed else weight_DO)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for name, tensor in tensors.items() if name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return changed


def alignment(observed: ChannelRange, *, smallest_ratio: float) -> tuple[Array, Array]:
    """Return each channel's range relative to the mean range, no less than `smallest_ratio`, and its middle."""
    low_D, high_D = observed.low_D, observed.high_D
    width_D = high_D - low_D
    mean = max(float(width_D.mean()), _SMALLEST_WIDTH)
    return np.maximum(width_D / mean, smallest_ratio), (low_D + high_D) / 2


def _with_biases(model: onnx.ModelProto, norms: Iterable[str]) -> onnx.ModelProto:
    """Return a copy in which every product after these norms has a bias, of zeros if it had none."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    known = _known(changed)
    bare = [use for name in norms for use in _uses(name, known) if isinstance(use, _Use) and use.bias is None]
    added: dict[str, onnx.NodeProto] = {}
    for use in bare:
        name, width = f"{use.node.name}.bias", known.constants[use.weight][not use.transposed]
        changed.graph.initializer.append(_tensor(name, np.zeros(width)))
        if use.node.op_type == "Gemm":
            use.node.input[2:] = [name]
            continue
        result = use.node.output[0]
        use.node.output[0] = f"{result}.unbiased"
        added[use.node.output[0]] = helper.make_node(
            "Add", [use.node.output[0], name], [result], name=f"{use.node.name}.add"
        )
    nodes = [part for node in changed.graph.node for part in (node, added.get(node.output[0])) if part is not None]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del changed.graph.node[:]
    changed.graph.node.extend(kept)
    return changed


def _uses(tensor: str, known: _Known) -> Iterator[_Use | str]:
    """Yield every product that reads `tensor`; for any other reader what it is, as the norms that "feed" it."""
    reached, waiting, joins = {tensor}, [tensor], list[onnx.NodeProto]()
    while waiting:
        name = waiting.pop()
        if name in known.outputs or not known.readers.get(name):
            yield "feed an output"
        for node in known.readers.get(name, ()):
            if node.op_type == "Concat":
                joins.append(node)
            if node.output[0] in reached or node.op_type == "Shape":
                continue
            # Tokens of one norm may be cut apart and joined in another order, as a shifted window does.
            if _keeps_channels(node, name, known) and (node.op_type != "Concat" or {*node.input} <= reached):
                reached.add(node.output[0])
                waiting.append(node.output[0])
            elif node.op_type in ("MatMul", "Gemm") and node.input[0] == name and _is_matrix(node, known):
                yield _use(node, known)
            elif node.op_type != "Concat":
                yield f"feed {_AN.get(node.op_type[0], 'a')} {node.op_type}"
    if any(node.output[0] not in reached for node in joins):
        yield "feed a Concat"


def _keeps_channels(node: onnx.NodeProto, name: str, known: _Known) -> bool:
    """Return whether a node moves what `name` holds, the last axis as it is."""
    if node.op_type not in _MOVES or (node.op_type != "Concat" and node.input[0] != name):
        return False
    before, after = known.shapes.get(name), known.shapes.get(node.output[0])
    if not before or not after:
        return node.op_type in ("Slice", "Reshape")  # the size of the weight shows whether these did
    last, axis = len(before) - 1, attribute(node, "axis", 0)
    if before[-1] != after[-1] or (node.op_type in ("Concat", "Gather") and axis in (-1, last)):
        return False
    if node.op_type == "Transpose":
        return bool(attribute(node, "perm", [0])[-1] == last)
    return node.op_type != "Pad" or node.input[1] in known.zeros


def _is_matrix(node: onnx.NodeProto, known: _Known) -> bool:
    is_plain = all(attribute(node, name, default) == default for name, default in _PLAIN_GEMM.items())
    return len(known.constants.get(node.input[1], ())) == 2 and (node.op_type == "MatMul" or is_plain)


def _use(op: onnx.NodeProto, known: _Known) -> _Use | str:
    shared = f"feed a {op.op_type} whose weights are shared"
    if len(known.readers[op.input[1]]) != 1:
        return shared
    if op.op_type == "Gemm":
        bias = op.input[2] if len(op.input) > 2 and op.input[2] else None
    else:
        readers = known.readers.get(op.output[0], ())
        added = readers[0] if len(readers) == 1 and readers[0].op_type == "Add" else None
        names = added.input if added is not None and op.output[0] not in known.outputs else ()
        bias = next((name for name in names if len(known.constants.get(name, ())) == 1), None)
    if bias is not None and (len(known.readers[bias]) != 1 or len(known.constants.get(bias, ())) != 1):
        return shared
    return _Use(node=op, weight=op.input[1], bias=bias, transposed=bool(attribute(op, "transB", 0)))


def _array(tensor: onnx.TensorProto) -> Array:
    return numpy_helper.to_array(tensor).astype(np.float64)


def _tensor(name: str, values: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(values.astype(np.float32), name)
