"""Any network of timm, made by timm's own code: by name, from a folder, or with weights of one's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_edge.conversion.hub import fetched_timm_model
from vit_edge.conversion.label_names import labels_of
from vit_edge.conversion.pickled_weights import unusable
from vit_edge.conversion.preprocessing.knowledge import Facts
from vit_edge.conversion.preprocessing.settings import preprocessing_facts, read_settings
from vit_edge.conversion.tensor_names import HEAD_NAMES
from vit_edge.conversion.timm_networks import imagenet_names, safe_arguments
from vit_edge.conversion.weights_file import find_weights, read_weights
from vit_edge.errors import printable, require
from vit_edge.export.sources.torch_network import Given, TorchNetwork, settled_preprocessing
from vit_edge.export.sources.weights import load_weights

__all__ = ["open_timm_folder", "open_timm_name"]


def open_timm_name(name: str, given: Given) -> TorchNetwork:
    """Return the network `name` of timm with its published weights, or with those that the user gives.

    Raises MissingExtra, InputError if timm does not know the name or cannot fetch the weights.
    """
    if given.weights is None:
        module = fetched_timm_model(name)
        names = imagenet_names(str(module.pretrained_cfg.get("tag") or ""), module.num_classes)
        return _opened(module, name, given, labels=names)
    file = find_weights(Path(given.weights)) if Path(given.weights).is_dir() else Path(given.weights)
    module = _made(name, {"num_classes": _num_classes(name, read_weights(file).tensors)}, origin=f"timm:{name}")
    load_weights(module, file)
    return _opened(module, name, given)


def open_timm_folder(folder: Path, given: Given) -> TorchNetwork:
    """Return the network of a folder with timm's config.json and weights; raises MissingExtra or CheckpointRejected."""
    values, origin = read_settings(folder / "config.json"), printable(folder / "config.json")
    config = values.get("pretrained_cfg") or values
    name = str(values["architecture"])
    try:
        arguments = safe_arguments(values.get("model_args") or {})
        settings = {"num_classes": values.get("num_classes", config.get("num_classes"))}
        settings |= {"global_pool": values.get("global_pool")}
        labels = values.get("label_names") or config.get("label_names")
        known_labels = labels_of(labels) if labels else None
    except (TypeError, ValueError, AttributeError) as error:
        raise unusable(origin, f"the config cannot be used ({error})", "download it again") from error
    module = _made(name, {**settings, **arguments}, origin=origin)
    load_weights(module, find_weights(folder) if given.weights is None else given.weights)
    return _opened(module, name, given, config=config, labels=known_labels)


def _made(name: str, arguments: Mapping[str, Any], *, origin: str) -> Any:
    """Return a network of timm without weights; raises CheckpointRejected if timm cannot make it."""
    timm = require("timm", extra="timm", what="make a network of timm")
    if not timm.is_model(name):  # "hf-hub:..." and the like would download
        raise unusable(origin, f"timm {timm.__version__} has no network {name!r}", "see timm.list_models()")
    specified = {key: value for key, value in arguments.items() if value is not None}
    try:
        return timm.create_model(name, pretrained=False, **specified)
    # A third-party constructor may raise anything on arguments out of a file.
    except Exception as error:
        reason = f"timm cannot build {name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise unusable(origin, reason, "check the name and model_args") from error


def _opened(
    module: Any,
    name: str,
    given: Given,
    *,
    config: Mapping[str, Any] | None = None,
    labels: tuple[str, ...] | None = None,
) -> TorchNetwork:
    timm = require("timm", extra="timm", what="make a network of timm")
    config = dict(module.pretrained_cfg) if config is None else config
    facts = preprocessing_facts({"pretrained_cfg": config}, origin="timm")
    facts = dataclasses.replace(facts, image_size=_image_size(module, facts))
    preprocessing, assumed = settled_preprocessing(given.preprocessing, image_size=given.image_size, facts=[facts])
    return TorchNetwork(
        module=module.eval(),
        name=name,
        preprocessing=preprocessing,
        labels=given.labels or labels,
        activation=given.activation,
        assumed=assumed,
        license=config.get("license"),
        base_model=config.get("hf_hub_id") or None,
        source={"library": f"timm {timm.__version__}", "network": name},
    )


def _image_size(module: nn.Module, facts: Facts) -> tuple[int, int] | None:
    """Return the size that the network was made for, which model_args may have changed."""
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return facts.image_size


def _num_classes(name: str, tensors: Mapping[str, Tensor]) -> int | None:
    """Return how many classes the head of a file has, None if the file does not show it."""
    with torch.device("meta"):
        module = _made(name, {}, origin=f"timm:{name}")
    heads = module.pretrained_cfg.get("classifier") or ()
    ends = tuple(f"{head}.weight" for head in ((heads,) if isinstance(heads, str) else heads))
    known = [key for key in tensors if ends and key.endswith(ends)]
    known += [key for key in tensors if HEAD_NAMES.fullmatch(key.rpartition("module.")[2]) and key.endswith("weight")]
    shape = tuple(tensors[known[0]].shape) if known else ()
    return shape[0] if shape and math.prod(shape[1:]) > 1 else None
