"""Weights by name, fetched by the hub code of the library that publishes them: timm, Hugging Face, torchvision."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_edge.conversion.preprocessing.knowledge import Facts, Geometry
from vit_edge.conversion.timm_networks import facts_of_timm_model, facts_of_timm_name, imagenet_names
from vit_edge.conversion.weights_file import WEIGHT_FILES, Weights
from vit_edge.errors import CheckpointRejected, InputError, VitEdgeError, require

__all__ = ["HUBS", "Fetched", "fetch", "fetch_folder", "fetched_timm_model"]

HUBS = ("timm", "hf", "torchvision")
_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", *WEIGHT_FILES, "*.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Either a folder that the hub filled, or weights and what is specified of them."""

    folder: Path | None = None
    weights: Weights | None = None
    facts: tuple[Facts, ...] = ()


def fetch(source: str) -> Fetched:
    """Return what `timm:NAME`, `hf:REPO` or `torchvision:NAME[:WEIGHTS]` names.

    Raises MissingExtra where the library is not installed, InputError where it does not know the name or cannot get
    the files.
    """
    hub, _, name = source.partition(":")
    return {"timm": _fetch_timm, "hf": _fetch_hugging_face, "torchvision": _fetch_torchvision}[hub](name)


def fetched_timm_model(name: str, *, plain: bool = False) -> Any:
    """Return a network of timm with its published weights; raises InputError, or NotPlainViT if it has to be one."""
    timm = require("timm", extra="timm", what="fetch weights with timm")
    local = name.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
    if not local and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise _not_fetched("timm", name, "timm has no network of this name", close)
    if plain and not local:  # refused before anything is fetched
        facts_of_timm_name(name, origin=f"timm:{name}")
    if not local and not timm.list_models(name.partition(".")[0], pretrained=True):
        raise _not_fetched("timm", name, "timm has no weights for this network", [])
    with _said_in_one_sentence("timm", name):
        return timm.create_model(name, pretrained=True)


def _fetch_timm(name: str) -> Fetched:
    model = fetched_timm_model(name, plain=True)
    config = model.pretrained_cfg
    origin = f"timm:{name}"
    plain_name = str(config.get("architecture") or name)
    facts = facts_of_timm_model(model, name=plain_name, origin=origin)
    if facts.labels is None:
        names = imagenet_names(str(config.get("tag") or ""), model.num_classes)
        facts = dataclasses.replace(facts, labels=names)
    return Fetched(weights=_weights(model.state_dict(), origin), facts=(facts,))


def _fetch_hugging_face(name: str) -> Fetched:
    folder = fetch_folder(name)
    if Path(name).is_dir():
        return Fetched(folder=folder)
    repository = name.partition("@")[0]
    facts = Facts(origin=f"hf:{name}", name=repository.split("/")[-1], base_model=repository)
    return Fetched(folder=folder, facts=(facts,))


def fetch_folder(name: str) -> Path:
    """Return the folder with the files of a repository on Hugging Face; raises MissingExtra or InputError.

    A folder that is there stands for itself, as transformers takes one wherever it takes a name.
    """
    if Path(name).is_dir():
        return Path(name)
    hub = require("huggingface_hub", extra="huggingface", what="fetch weights from Hugging Face")
    repository, _, revision = name.partition("@")
    with _said_in_one_sentence("Hugging Face", name):
        return Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(_FILES)))


def _fetch_torchvision(name: str) -> Fetched:
    models = require("torchvision.models", extra="train", what="fetch weights with torchvision")
    network, _, which = name.partition(":")
    known = [known for known in models.list_models() if known.startswith("vit_")]
    if network not in known:
        raise _not_fetched("torchvision", name, "torchvision has no Vision Transformer of this name", known)
    weights = models.get_model_weights(network)
    if which and which not in weights.__members__:
        raise _not_fetched("torchvision", name, f"{network} has no weights {which}", list(weights.__members__))
    chosen = weights[which] if which else weights.DEFAULT
    with _said_in_one_sentence("torchvision", name):
        state = chosen.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    transforms = chosen.transforms()
    (resize,), (crop,) = transforms.resize_size, transforms.crop_size
    facts = Facts(
        origin=f"torchvision:{network}:{chosen.name}",
        name=network,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        geometry=Geometry(resize=resize, crop=(crop, crop)),
        labels=tuple(chosen.meta["categories"]),
        base_model=f"torchvision {network} {chosen.name}",
    )
    return Fetched(weights=_weights(state, facts.origin), facts=(facts,))


def _weights(tensors: Mapping[str, Tensor], origin: str) -> Weights:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Weights(tensors={k: v.detach() for k, v in tensors.items()}, origin=origin, sha256=digest.hexdigest())


@contextlib.contextmanager
def _said_in_one_sentence(library: str, name: str) -> Iterator[None]:
    loggers = [logging.getLogger(library) for library in ("huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:  # a line for each of five attempts; what went wrong is in the exception
            logger.setLevel(logging.CRITICAL)
        yield
    except VitEdgeError:
        raise
    # No network, no such name, no room, a broken file: each library has its own dozen of exceptions for them.
    except Exception as error:
        specified = str(error).strip().splitlines()
        raise _not_fetched(
            library, name, f"{type(error).__name__}: {specified[0] if specified else 'no reason'}"[:300], []
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _not_fetched(library: str, name: str, reason: str, known: list[Any]) -> InputError:
    remedy = "check the name and the network, or fetch the files elsewhere and give their folder"
    if known:
        remedy = f"did you mean {', '.join(map(str, known[:5]))}?"
    return CheckpointRejected(f"cannot fetch from {library}", file=name, reason=reason, remedy=remedy)
