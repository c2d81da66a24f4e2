"""Where a Vision Transformer looks: the attention of its last block to each patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.export.graph.intermediate_tensors import Activations
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.loading import admit
from vit_edge.vit_config import ViTConfig

__all__ = ["attention_maps"]


def attention_maps(model: ModelFile, images_NHWC: Pixels) -> npt.NDArray[np.float32] | None:
    """Return float32 [images, rows, columns]: the last block's attention to each patch, the mean over its heads.

    A map is the attention of the class token, or the mean over the patches if those are pooled. Attention to prefix
    tokens is left out, so a map sums to at most 1. ONNX Runtime computes it from the graph in the file, INT8 included.
    None if the file holds no Vision Transformer of ours, or no softmax with the shape of attention. Raises
    ModelRejected if the graph does not run.
    """
    config = _config_of(model.manifest.architecture)
    if config is None or model.weights is not None:
        return None
    admit(model, engines=["onnxruntime"])
    graph = model.graph()
    inputs = list(model.manifest.network_input(images_NHWC))
    for tensor in _softmaxes(graph):
        activations = Activations(graph, [tensor])
        weights = [values[0] for values in activations.of(inputs[:1])]
        if _is_attention(weights[0], config):
            weights += [values[0] for values in activations.of(inputs[1:])]
            return np.stack([_to_patches(each[0], config) for each in weights])
    return None


def _config_of(architecture: Mapping[str, Any]) -> ViTConfig | None:
    if architecture.get("family") != "vit":
        return None
    known = {field.name for field in fields(ViTConfig)}
    try:
        return ViTConfig(**{key: value for key, value in architecture.items() if key in known})
    except (TypeError, ValueError):
        return None


def _softmaxes(graph: onnx.ModelProto) -> Iterator[str]:
    """Yield the output of each softmax, the last one first: a softmax over the classes may come before attention."""
    return (node.output[0] for node in reversed(graph.graph.node) if node.op_type == "Softmax")


def _is_attention(weights: npt.NDArray[Any], config: ViTConfig) -> bool:
    num_tokens = config.num_prefix_tokens + config.num_patches
    return weights.ndim == 4 and weights.shape[1] == config.num_heads and weights.shape[3] == num_tokens


def _to_patches(weights_NTT: npt.NDArray[Any], config: ViTConfig) -> npt.NDArray[np.float32]:
    """Return [rows, columns] from the weights of one image; the patches are the last tokens."""
    to_patches_NTP = weights_NTT.astype(np.float32)[:, :, -config.num_patches :]
    if config.pooling == "mean":
        from_pooled_NP = to_patches_NTP[:, -config.num_patches :].mean(axis=1)
    else:  # the class token is the first query, and the only one in a fused inference graph
        from_pooled_NP = to_patches_NTP[:, 0]
    found: npt.NDArray[np.float32] = from_pooled_NP.mean(axis=0).reshape(config.grid)
    return found
