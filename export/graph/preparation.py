"""A float graph written so that its products can be integers: the same function in other nodes.

What exporters write differs: weights that a node turns first, biases of every shape, products with the weight on the
left. And some forms are slow once they are integers, or lose the pixels: a convolution over patches that do not
overlap is a matrix product, whose result may stay float in every engine, and takes pixels as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vit_edge.export.graph.editing import Rewriting
from vit_edge.export.graph.macs import shapes_for_one_image
from vit_edge.export.graph.matmuls import attribute, is_convolutional, is_depthwise, is_padded
from vit_edge.export.graph.pixel_input import fold_pixels, lay_pixels_in_rows

__all__ = ["prepare"]

Array: TypeAlias = npt.NDArray[np.float32]
# What exporters put between a weight and its product.
_FOLDABLE = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a float32 `model` in which `find_quantizable_ops` finds all it can; tensors keep names.

    The same function up to float32 rounding. The fused inference graph of a Vision Transformer comes back as it was.
    """
    rewriting = Rewriting(model)
    _name_nodes(rewriting)
    _fold_constants(rewriting)
    _fold_batch_norms(rewriting)
    _settle_gemms(rewriting)
    _put_weights_right(rewriting)
    _part_biases(rewriting)
    if is_convolutional(rewriting.model()):
        lay_pixels_in_rows(rewriting)
        _pool_by_pooling(rewriting)
    else:
        _unfold_patches(rewriting)
    _name_nodes(rewriting)
    return rewriting.model()


def _name_nodes(rewriting: Rewriting) -> None:
    """Give every node a name of its own: reports and exclusions go by it."""
    taken: set[str] = set()
    for node in rewriting.nodes:
        name = node.name or node.output[0]
        while name in taken:
            name += "_"
        taken.add(name)
        node.name = name


def _fold_constants(rewriting: Rewriting) -> None:
    """Compute once what nodes make of constants only."""
    for node in list(rewriting.nodes):
        if node.op_type == "Constant" and attribute(node, "value", None) is not None:
            rewriting.add_tensor(node.output[0], numpy_helper.to_array(attribute(node, "value", None)))
        elif node.op_type in _FOLDABLE and rewriting.are_constant(node.input):
            values = {name: rewriting.array(name) for name in node.input if name}
            found: Any = ReferenceEvaluator(node).run(None, values)
            rewriting.add_tensor(node.output[0], found[0])
        else:
            continue
        rewriting.replace(node, [])


def _part_biases(rewriting: Rewriting) -> None:
    """Give each product its own bias: exporters keep equal ones once, and an algorithm changes one of them."""
    counts = Counter(name for node in rewriting.nodes for name in node.input)
    products = {node.output[0] for node in rewriting.nodes if node.op_type == "MatMul"}
    for node in rewriting.nodes:
        if node.op_type != "Add" or not products.intersection(node.input):
            continue
        for place, name in enumerate(node.input):
            if name in rewriting.tensors and len(rewriting.tensors[name].dims) == 1 and counts[name] > 1:
                node.input[place] = rewriting.add_tensor(f"{node.name}.own", rewriting.array(name))


def _fold_batch_norms(rewriting: Rewriting) -> None:
    """Fold each batch normalisation into the convolution before it: engines cannot once integers stand between."""
    for norm in list(rewriting.nodes):
        node = rewriting.maker(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if node is None or node.op_type != "Conv" or rewriting.num_readers(node.output[0]) != 1:
            continue
        if not rewriting.are_constant([*norm.input[1:], *node.input[1:]]):
            continue
        gamma_O, beta_O, mean_O, variance_O = (rewriting.array(name).astype(np.float64) for name in norm.input[1:])
        factor_O = gamma_O / np.sqrt(variance_O + attribute(norm, "epsilon", 1e-5))
        weight = rewriting.array(node.input[1])
        bias_O = rewriting.array(node.input[2]) if len(node.input) > 2 else np.zeros(len(weight))
        folded = weight * factor_O.reshape(-1, *[1] * (weight.ndim - 1))
        bias_O = (bias_O - mean_O) * factor_O + beta_O
        node.input[:] = [
            node.input[0],
            rewriting.add_tensor(f"{node.name}.folded.weight", folded.astype(np.float32)),
            rewriting.add_tensor(f"{node.name}.folded.bias", bias_O.astype(np.float32)),
        ]
        node.output[0] = norm.output[0]
        rewriting.replace(norm, [])


def _settle_gemms(rewriting: Rewriting) -> None:
    """Leave every Gemm with a constant weight as input x weight + bias: no factors, the bias one row or a node."""
    for node in list(rewriting.nodes):
        if node.op_type != "Gemm" or node.input[1] not in rewriting.tensors or attribute(node, "transA", 0):
            continue
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        weight = rewriting.array(node.input[1])
        width = weight.shape[0 if attribute(node, "transB", 0) else 1]
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias in rewriting.tensors and rewriting.array(bias).size in (1, width):
            row = np.broadcast_to(rewriting.array(bias).reshape(-1) * np.float32(beta), width)
            if beta != 1 or rewriting.array(bias).shape != row.shape:
                node.input[2] = rewriting.add_tensor(f"{node.name}.row.bias", row)
        elif bias and beta == 1:
            _add_apart(rewriting, node)
        elif bias:
            continue
        if alpha != 1:
            node.input[1] = rewriting.add_tensor(f"{node.name}.scaled.weight", (weight * alpha).astype(np.float32))
        kept = [entry for entry in node.attribute if entry.name not in ("alpha", "beta")]
        if (alpha, beta) != (1, 1):
            del node.attribute[:]
            node.attribute.extend(kept)


def _add_apart(rewriting: Rewriting, node: onnx.NodeProto) -> None:
    """Add what a Gemm adds in a node of its own."""
    added, output = node.input[2], node.output[0]
    op = f"{node.name}.product"
    rewriting.replace(node, [node, helper.make_node("Add", [op, added], [output], name=f"{op}.add")])
    del node.input[2:]
    node.output[0] = op


def _put_weights_right(rewriting: Rewriting) -> None:
    """Turn weight x input into input x weight, and weights of one matrix under more axes into that matrix."""
    shapes = shapes_for_one_image(rewriting.model())
    for node in list(rewriting.nodes):
        if node.op_type != "MatMul" or rewriting.are_constant(node.input):
            continue
        left, right = node.input
        if left in rewriting.tensors and rewriting.array(left).ndim == 2 and len(shapes.get(right) or ()) >= 2:
            _turn(rewriting, node, len(shapes[right] or ()))
        elif right in rewriting.tensors:
            weight = rewriting.array(right)
            if weight.ndim > 2 and math.prod(weight.shape[:-2]) == 1 and len(shapes.get(left) or ()) >= weight.ndim:
                node.input[1] = rewriting.add_tensor(f"{right}.matrix", weight.reshape(weight.shape[-2:]))


def _turn(rewriting: Rewriting, node: onnx.NodeProto, rank: int) -> None:
    """Compute weight x input as the transpose of (transposed input x transposed weight)."""
    weight, source = node.input
    turned, op, output = f"{node.name}.turned", f"{node.name}.product", node.output[0]
    order = [*range(rank - 2), rank - 1, rank - 2]
    after = helper.make_node("Transpose", [op], [output], name=f"{op}.turned", perm=order)
    rewriting.replace(node, [rewriting.transpose(source, turned, order), node, after])
    node.input[:] = [turned, rewriting.add_tensor(f"{weight}.turned", rewriting.array(weight).T)]
    node.output[0] = op


def _pool_by_pooling(rewriting: Rewriting) -> None:
    """Write the mean over an image as GlobalAveragePool, which ONNX Runtime has in integers, unlike ReduceMean."""
    shapes = shapes_for_one_image(rewriting.model())
    for node in list(rewriting.nodes):
        if node.op_type != "ReduceMean" or len(shapes.get(node.input[0]) or ()) != 4:
            continue
        axes = attribute(node, "axes", ())
        if len(node.input) > 1 and node.input[1] in rewriting.tensors:
            axes = rewriting.array(node.input[1])
        if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        output = node.output[0]
        if attribute(node, "keepdims", 1):
            rewriting.replace(node, [helper.make_node("GlobalAveragePool", [node.input[0]], [output], name=node.name)])
        else:
            pooled = f"{node.name}.pooled"
            pooling = helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=pooled)
            rewriting.replace(node, [pooling, helper.make_node("Flatten", [pooled], [output], name=node.name)])


def _unfold_patches(rewriting: Rewriting) -> None:
    """Write each convolution over patches that do not overlap as the matrix product it is."""
    shapes = shapes_for_one_image(rewriting.model())
    for node in list(rewriting.nodes):
        if node.op_type != "Conv" or not rewriting.are_constant(node.input[1:]):
            continue
        image = shapes.get(node.input[0])
        kernel = rewriting.array(node.input[1]).shape[2:]
        strides, dilations = attribute(node, "strides", (1, 1)), attribute(node, "dilations", (1, 1))
        if is_padded(node) or is_depthwise(node) or len(kernel) != 2 or not image:
            continue
        fits = all(size % step == 0 for size, step in zip(image[2:], kernel, strict=True))
        if tuple(strides) == kernel and tuple(dilations) == (1, 1) and fits and kernel != (1, 1):
            fold_pixels(rewriting, node)
            _unfold(rewriting, node, image)


def _unfold(rewriting: Rewriting, node: onnx.NodeProto, image: Sequence[int]) -> None:
    """Replace a convolution by patches x weight + bias; pixels are moved before they are cast."""
    weight = rewriting.array(node.input[1])
    channels, rows, columns = image[1:]
    high, wide = weight.shape[2:]
    grid = (rows // high, columns // wide)
    cast = rewriting.maker(node.input[0])
    moved_first = cast is not None and cast.op_type == "Cast"
    source = cast.input[0] if cast is not None and moved_first else node.input[0]
    steps = [
        rewriting.reshape(source, f"{node.name}.cut", [0, channels, grid[0], high, grid[1], wide]),
        rewriting.transpose(f"{node.name}.cut", f"{node.name}.turned", [0, 2, 4, 1, 3, 5]),
        rewriting.reshape(f"{node.name}.turned", f"{node.name}.patches", [0, math.prod(grid), channels * high * wide]),
    ]
    patches = f"{node.name}.patches"
    if moved_first:
        patches = f"{node.name}.cast"
        steps.append(helper.make_node("Cast", [f"{node.name}.patches"], [patches], name=patches, to=TensorProto.FLOAT))
    name = rewriting.add_tensor(f"{node.input[1]}.matrix", weight.reshape(len(weight), -1).T)
    op = f"{node.name}.product"
    steps.append(helper.make_node("MatMul", [patches, name], [op], name=node.name))
    if len(node.input) > 2:
        steps.append(helper.make_node("Add", [op, node.input[2]], [f"{op}.add"], name=f"{op}.add"))
        op = f"{op}.add"
    steps.append(rewriting.transpose(op, f"{node.name}.channels", [0, 2, 1]))
    steps.append(rewriting.reshape(f"{node.name}.channels", node.output[0], [0, len(weight), *grid]))
    rewriting.replace(node, steps)
