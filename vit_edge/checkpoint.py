"""A checkpoint: safetensors with the configuration in its header, and nothing that could run code.

One JSON value under `vit_edge.checkpoint` holds what the weights alone cannot tell, and a SHA-256 over it and every
tensor: a flipped bit is found before the weights are used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vit_edge.artifact import warn_of_assumed
from vit_edge.errors import CheckpointRejected, printable
from vit_edge.files import kind_of, read_file, sha256_hex, write_atomic
from vit_edge.image import Preprocessing
from vit_edge.vit import VisionTransformer, ViTConfig

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_KEY = "vit_edge.checkpoint"
_SCHEMA = 1
_MAX_BYTES = 2**40
_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A Vision Transformer with its weights, and everything needed to use it on a picture.

    `assumed` names what nobody told and was filled in by default, such as "preprocessing.mean" or "labels".
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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    header = {
        "schema": _SCHEMA,
        "name": checkpoint.name,
        "config": checkpoint.model.config.to_dict(),
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "labels": list(checkpoint.labels),
        "license": checkpoint.license,
        "base_model": checkpoint.base_model,
        "evaluation": checkpoint.evaluation,
        "training": dict(checkpoint.training),
    }
    if checkpoint.assumed:
        header["assumed"] = list(checkpoint.assumed)
    header["sha256"] = _digest(header, tensors)
    # One key only: safetensors writes several in an order that changes from run to run.
    write_atomic(path, save(tensors, metadata={_KEY: json.dumps(header, sort_keys=True)}))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at `path`, verified; raises CheckpointRejected."""
    header, tensors, file_sha256 = _read(path)
    if header.get("schema") != _SCHEMA:
        reason = f"it has schema {header.get('schema')!r}; this vit-edge reads {_SCHEMA}"
        raise _rejected(path, reason, "install the vit-edge that wrote it")
    if header.pop("sha256", None) != _digest(header, tensors):
        reason = "its SHA-256 is not the one it was saved with: it was changed or damaged"
        raise _rejected(path, reason, "take an earlier copy")
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
        raise _rejected(path, f"its header does not fit ({error})", "save it again") from error
    warn_of_assumed(checkpoint.assumed, path)
    return checkpoint


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    data = read_file(path, what="checkpoint", max_bytes=_MAX_BYTES, error=CheckpointRejected)
    kind = kind_of(data)
    if kind is not None:
        raise _rejected(path, kind[0], kind[1])
    try:
        tensors = load(data)
        # The library has checked the header by now; it gives the metadata only of a file, read a second time.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        reason = f"it is not a whole safetensors file ({error})"
        raise _rejected(path, reason, "copy it again, or save the weights as safetensors where it was made") from error
    text = metadata.get(_KEY)
    if text is None:
        reason = "it is safetensors, but not a checkpoint of vit-edge: it has no configuration in it"
        raise _rejected(path, reason, "make one of it with `vit-edge convert`")
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise _rejected(path, f"its header cannot be read ({error})", "take an earlier copy") from error
    return header, tensors, sha256_hex(data)


def _model(config: ViTConfig, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> VisionTransformer:
    with torch.device("meta"):  # shapes only: a configuration that lies must not allocate
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
        reason = f"its weights do not fit its configuration: {'; '.join(problems)}"
        raise _rejected(path, reason, "take the checkpoint and its configuration from one source")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise _rejected(path, f"not every weight is finite: {', '.join(broken[:_NUM_NAMED])}", "train it again")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError("labels, or what was assumed, are not a list")
    return tuple(values)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rejected(path: str | os.PathLike[str], reason: str, remedy: str) -> CheckpointRejected:
    return CheckpointRejected("cannot use the checkpoint", file=printable(path), reason=reason, remedy=remedy)
