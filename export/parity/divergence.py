"""Where two computations of one graph part: the first tensor, in graph order, that is not the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from vit_edge.errors import VitEdgeError
from vit_edge.export.parity.isolated_run import answer_elsewhere
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.engines.protocol import Array

__all__ = ["describe_first_apart", "first_apart"]

# Relative to the largest value of a tensor: sums in another order differ by a hundred times less, in float16 by three.
_APART = {"float32": 1e-3, "float16": 3e-2}


def describe_first_apart(
    model: ModelFile, traced: nn.Module, *, engine: str, others: Sequence[str], image_NHWC: Pixels
) -> str:
    """Return ", first apart at ...": where `engine` leaves PyTorch's traced form, else where it leaves another engine.

    Empty where the tensors cannot be had; a graph that equals its traced form throughout says so.
    """
    try:
        tensors = _float_tensors(model)
        found = _tensors_of(model, engine, tensors, image_NHWC)
        modules = _module_outputs(traced, model, image_NHWC)
        limit = _APART.get(model.manifest.precision, _APART["float32"])
        apart = first_apart(modules, found, tensors, limit)
        if apart:
            return f", first apart from PyTorch at {apart}"
        for other in others:
            apart = first_apart(_tensors_of(model, other, tensors, image_NHWC), found, tensors, limit)
            if apart:
                return f", first apart from {other} at {apart}"
    except (VitEdgeError, RuntimeError, ValueError):  # it explains a failure, and must not become another
        return ""
    return f", within {limit:.1%} of the traced form in every tensor: no one of them stands out" if modules else ""


def first_apart(
    expected: Mapping[str, Array], found: Mapping[str, Array], order: Sequence[str], limit: float
) -> str | None:
    """Return the first name of `order` that both have and whose values differ, with by how much; None where none.

    They differ by more than `limit`, as a share of the largest.
    """
    for name in order:
        if name not in expected or name not in found or expected[name].shape != found[name].shape:
            continue
        right, got = (side[name].astype(np.float32) for side in (expected, found))
        size, off = float(np.abs(right).max(initial=0)), np.abs(got - right).max(initial=0)
        if not off <= limit * max(size, 1e-6):
            return f"{name!r} (off by {off:.3g}, values up to {size:.3g})"
    return None


def _float_tensors(model: ModelFile) -> list[str]:
    graph = onnx.shape_inference.infer_shapes(model.graph()).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    made = [name for node in graph.node for name in node.output]
    return [name for name in made if types.get(name) in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)]


def _tensors_of(model: ModelFile, engine: str, names: Sequence[str], image_NHWC: Pixels) -> dict[str, Array]:
    """Return every one of `names` from a copy of the graph that has them as outputs."""
    graph = model.graph()
    for value in (*graph.graph.input, *graph.graph.output):  # one image, whatever batch is asked for
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    free = {key: value for key, value in model.manifest.input.items() if key != "batch"}
    manifest = replace(model.manifest, golden=None, input=free)
    present = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    opened = ModelFile.from_graph(graph, manifest, weights=model.weights)
    found = answer_elsewhere(opened, engine=engine, batches=[image_NHWC], outputs=names)
    return found[0]


def _module_outputs(traced: nn.Module, model: ModelFile, image_NHWC: Pixels) -> dict[str, Array]:
    """Return what each module of the traced form gives, under the name of the tensor that it became.

    That is the last one named after the module: `block.3.fc1.add`, after `block.3.fc1`.
    """
    nodes = [(node.name, node.output[0]) for node in model.proto.graph.node]
    last = {path: made for path, _ in traced.named_modules() for name, made in nodes if _belongs(name, path)}
    kept: dict[str, Array] = {}
    latest: list[str] = []

    def keep(path: str, module: nn.Module, output: object) -> None:
        if path in last:
            latest[:] = [last[path]]
        elif not isinstance(module, BatchNorm) or not latest:
            return  # a normalisation over the batch goes into the product before it: that tensor is what it gives
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor):
            kept[latest[0]] = value.numpy().copy()  # the next module may work in place

    hooks = [
        module.register_forward_hook(lambda module, _i, output, path=path: keep(path, module, output))
        for path, module in traced.named_modules()
    ]
    with torch.inference_mode():
        traced(torch.from_numpy(model.manifest.network_input(image_NHWC)))
    for hook in hooks:
        hook.remove()
    return kept


def _belongs(name: str, path: str) -> bool:
    path = path.removeprefix("network.")
    return bool(path) and (name == path or name.startswith(f"{path}."))
