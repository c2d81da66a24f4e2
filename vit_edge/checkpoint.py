"""A checkpoint: safetensors with everything else about the network in its header.

A SHA-256 covers header and tensors: a flipped bit is found before the weights are used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from vit_edge.image import Preprocessing
from vit_edge.model_file.artifact import warn_of_assumed
from vit_edge.tensor_file import read_tensors, rejected, write_tensors
from vit_edge.vit import VisionTransformer, ViTConfig

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_KEY = "vit_edge.checkpoint"
_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A Vision Transformer with its weights, and everything needed to use it on an image.

    `assumed` names what was not specified and filled in by default, such as "preprocessing.mean" or "labels".
    """

    name: str
    model: VisionTransformer
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    license: str | None = None
    base_model: str | None = None
    evaluation: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    sha256: str | None = None  # of the file it was loaded from

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not all(isinstance(label, str) for label in self.labels):
            raise ValueError("the name and the labels have to be texts")
        if not all(isinstance(name, str) for name in self.assumed):
            raise ValueError("what was assumed has to be a list of names")
        if not isinstance(self.training, Mapping) or not isinstance(self.evaluation, Mapping | NoneType):
            raise ValueError("training and evaluation have to be objects")
        config = self.model.config
        if len(self.labels) != config.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {config.num_classes} classes (num_classes)")
        if self.preprocessing.crop != config.image_size:
            raise ValueError(f"preprocessing crops to {self.preprocessing.crop}, image_size is {config.image_size}")


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; the same checkpoint gives the same bytes."""
    header: dict[str, Any] = {
        "name": checkpoint.name,
        "config": checkpoint.model.config.to_dict(),
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "labels": list(checkpoint.labels),
        "license": checkpoint.license,
        "base_model": checkpoint.base_model,
        "evaluation": checkpoint.evaluation,
        "training": dict(checkpoint.training),
        "assumed": list(checkpoint.assumed),
    }
    write_tensors(path, key=_KEY, header=header, tensors=checkpoint.model.state_dict())


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at `path`, verified; raises CheckpointRejected."""
    header, tensors, file_sha256 = read_tensors(path, key=_KEY)
    try:
        config = ViTConfig(**header["config"])
        checkpoint = Checkpoint(
            name=header["name"],
            model=_model(config, tensors, path),
            preprocessing=Preprocessing.from_dict(header["preprocessing"]),
            labels=_texts(header["labels"]),
            license=header["license"],
            base_model=header["base_model"],
            evaluation=header["evaluation"],
            training=header["training"],
            assumed=_texts(header.get("assumed", [])),
            sha256=file_sha256,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise rejected(path, f"the checkpoint's header does not fit ({error})", "save it again") from error
    warn_of_assumed(checkpoint.assumed, path)
    return checkpoint


def _model(config: ViTConfig, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> VisionTransformer:
    with torch.device("meta"):  # shapes only: a wrong configuration must not allocate
        model = VisionTransformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())][:_NUM_NAMED]
    problems += [f"{name} is not expected" for name in sorted(tensors.keys() - expected.keys())][:_NUM_NAMED]
    problems += [f"{n} is {t.dtype}, not float32" for n, t in tensors.items() if t.dtype != torch.float32][:_NUM_NAMED]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ][:_NUM_NAMED]
    if problems:
        reason = f"the checkpoint's weights do not fit its configuration: {'; '.join(problems)}"
        raise rejected(path, reason, "take the checkpoint and its configuration from one source")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise rejected(path, f"not every weight is finite: {', '.join(broken[:_NUM_NAMED])}", "train it again")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError("labels, or what was assumed, are not a list")
    return tuple(values)
