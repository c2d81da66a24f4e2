"""A SOURCE, opened: its weights, the configuration next to them, and a name."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.checkpoint import Checkpoint, load_checkpoint
from vit_edge.conversion.config import facts_beside, facts_of_settings
from vit_edge.conversion.hub import HUBS, fetch
from vit_edge.conversion.preprocessing.knowledge import Facts, Geometry
from vit_edge.conversion.weights_file import WEIGHT_FILES, Weights, find_weights, read_weights
from vit_edge.errors import CheckpointRejected

__all__ = ["Source", "open_weights"]

_SUFFIXES = (".tar", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".safetensors", ".index.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights with their keys as they are, the facts from the files next to them, and our own checkpoint if it is one.

    `name` is empty where only the folder has one.
    """

    name: str
    weights: Weights
    facts: tuple[Facts, ...]
    checkpoint: Checkpoint | None = None


def open_weights(source: str | os.PathLike[str]) -> Source:
    """Return SOURCE opened: `timm:NAME`, `hf:REPO`, `torchvision:NAME`, a folder or a file; raises VitEdgeError.

    config.json and preprocessor_config.json count if they are in the folder given, or next to a file that is named as
    libraries name it or is the only one of weights there.
    """
    text = os.fspath(source)
    if text.partition(":")[0] not in HUBS or Path(text).exists():
        return _open_path(Path(text), ())
    fetched = fetch(text)
    if fetched.weights is not None:
        name = next((facts.name for facts in fetched.facts if facts.name), text)
        return Source(name=name, weights=fetched.weights, facts=fetched.facts)
    opened = _open_path(Path(fetched.folder or "."), fetched.facts)
    return dataclasses.replace(opened, weights=dataclasses.replace(opened.weights, origin=text))


def _open_path(path: Path, facts: tuple[Facts, ...]) -> Source:
    file = find_weights(path) if path.is_dir() else path
    weights = read_weights(file)
    if weights.own:
        checkpoint = load_checkpoint(file)
        return Source(name=checkpoint.name, weights=weights, facts=_facts_of(checkpoint), checkpoint=checkpoint)
    standard = file.name in WEIGHT_FILES
    if path.is_dir() or standard or _is_alone(file):
        facts = (*facts_beside(file.parent), *facts)
    facts = (*facts, *facts_of_settings(weights.settings))
    specified = next((known.name for known in facts if known.name), None)
    return Source(name=specified or ("" if standard else _stem(file)), weights=weights, facts=facts)


def _is_alone(file: Path) -> bool:
    """Return whether no other weights are in the folder, so that a configuration there can be of no others."""
    try:
        return find_weights(file.parent) == file
    except CheckpointRejected:
        return False


def _stem(path: Path) -> str:
    name = path.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name or "network"


def _facts_of(checkpoint: Checkpoint) -> tuple[Facts, ...]:
    """Return what our own checkpoint knows, and after it what it only assumes."""
    config, preprocessing = checkpoint.model.config, checkpoint.preprocessing
    everything = Facts(
        origin="the checkpoint",
        name=checkpoint.name,
        image_size=config.image_size,
        num_heads=config.num_heads,
        activation=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        pooling=config.pooling,
        position_slots=config.position_slots,
        layer_scale=config.layer_scale,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        geometry=Geometry.of(preprocessing),
        labels=checkpoint.labels,
        license=checkpoint.license,
        base_model=checkpoint.base_model,
    )
    unknown = {name.removeprefix("preprocessing.").replace("resize", "geometry") for name in checkpoint.assumed}
    unspecified: dict[str, Any] = dict.fromkeys(unknown & {field.name for field in dataclasses.fields(Facts)})
    return dataclasses.replace(everything, **unspecified), dataclasses.replace(everything, assumed=True)
