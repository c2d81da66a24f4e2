"""What timm knows of a network by its name: built without weights, and asked."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vit_edge.conversion.label_names import labels_of
from vit_edge.conversion.preprocessing.knowledge import Facts
from vit_edge.conversion.preprocessing.settings import preprocessing_facts
from vit_edge.errors import MissingExtra, NotPlainViT, UsageError, VitEdgeError, require
from vit_edge.vit import quick_gelu
from vit_edge.vit_config import Activation

__all__ = [
    "facts_of_timm_config",
    "facts_of_timm_model",
    "facts_of_timm_name",
    "imagenet_names",
    "safe_arguments",
    "tag_of_timm_name",
    "timm_name_in",
]

# What a config.json may not set of a network: the arguments of create_model that reach files and other code.
_REFUSED_ARGUMENTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable",
    "exportable", "no_jit", "features_only", "out_indices", "feature_cfg", "kwargs_filter", "pretrained_filter_fn",
    "pretrained_strict", "pretrained_custom_load", "pretrained_model_args", "device", "dtype",
}  # fmt: skip
_LARGEST, _DEEPEST = 65_536, 256
# Where training loops keep the name of the network: timm's train.py, Lightning modules.
_NAMES = ("arch", "model", "model_name", "architecture", "backbone")
_PLAIN = ("VisionTransformer", "VisionTransformerDistilled")


def facts_of_timm_name(name: str, *, origin: str, arguments: Mapping[str, Any] | None = None) -> Facts:
    """Return what timm knows of the network `name`; raises UsageError, or MissingExtra where timm is absent."""
    timm = require("timm", extra="timm", what="ask timm")
    # "hf-hub:..." and the like would download; only networks that timm itself defines are built.
    if not timm.is_model(name):
        architecture = name.partition(".")[0]
        close = difflib.get_close_matches(architecture, timm.list_models("*vit*") + timm.list_models("deit*"), n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models('vit*')"
        raise UsageError("cannot ask timm", reason=f"timm has no network {name!r}", remedy=remedy)
    try:
        with torch.device("meta"):  # shapes and settings, no weights
            model = timm.create_model(name, pretrained=False, **(arguments or {}))
    # A third-party constructor may raise anything on arguments out of a file.
    except Exception as error:
        reason = f"timm cannot build {name} ({type(error).__name__}: {error})"
        raise UsageError("cannot ask timm", reason=reason, remedy="check the name and model_args") from error
    return facts_of_timm_model(model, name=name, origin=origin)


def facts_of_timm_model(model: nn.Module, *, name: str, origin: str) -> Facts:
    """Return what a network of timm shows of itself; raises UsageError where it is no plain Vision Transformer."""
    model_any: Any = model
    block: Any = next(iter(getattr(model_any, "blocks", [])), None)
    plain = type(model).__name__ in _PLAIN and type(block).__name__ == "Block" and type(block.mlp).__name__ == "Mlp"
    if block is None or not plain or model_any.global_pool not in ("token", "avg", ""):
        inside = f"{type(model).__name__} of {type(block).__name__}, pooling {getattr(model_any, 'global_pool', '?')!r}"
        reason = f"{name} is no plain Vision Transformer ({inside})"
        raise NotPlainViT("cannot use the network", reason=reason, remedy="choose a vit_* or deit* of timm")
    config = dict(model_any.pretrained_cfg)
    specified = preprocessing_facts({"pretrained_cfg": config}, origin=origin)
    scale = getattr(getattr(block, "ls1", None), "init_values", None)
    return Facts(
        origin=origin,
        name=name,
        image_size=tuple(model_any.patch_embed.img_size),
        num_heads=block.attn.num_heads,
        activation=_activation_of(block.mlp.act, name),
        layer_norm_eps=float(block.norm1.eps),
        pooling="mean" if model_any.global_pool == "avg" else "class",
        position_slots="patches" if model_any.no_embed_class else "all",
        layer_scale=float(scale) if isinstance(scale, int | float) else None,
        mean=specified.mean,
        std=specified.std,
        interpolation=specified.interpolation,
        geometry=specified.geometry,
        labels=labels_of(config["label_names"]) if config.get("label_names") else None,
        license=config.get("license"),
        base_model=config.get("hf_hub_id") or None,
        shape={"width": model_any.embed_dim, "depth": len(model_any.blocks), "patch_size": _patch_of(model_any)},
    )


def facts_of_timm_config(values: Mapping[str, Any], *, origin: str) -> Facts:
    """Return what a config.json of timm specifies; without timm, only what is in the file."""
    config = values.get("pretrained_cfg") or values
    arguments = safe_arguments(values.get("model_args") or {})
    pool = values.get("global_pool") or config.get("global_pool")
    specified = preprocessing_facts({"pretrained_cfg": config}, origin=origin)
    labels = values.get("label_names") or config.get("label_names")
    shown = None
    notes: tuple[str, ...] = ()
    try:
        shown = facts_of_timm_name(str(values["architecture"]), origin=origin, arguments=arguments)
    except MissingExtra as error:
        notes = (f"timm would give heads, activation and eps of {values['architecture']}: {error.remedy}",)
    except NotPlainViT:
        raise
    except VitEdgeError as error:
        raise ValueError(error.reason) from error
    return Facts(
        origin=origin,
        name=str(values["architecture"]),
        image_size=shown.image_size if shown and "img_size" in arguments else specified.image_size,
        num_heads=shown.num_heads if shown else None,
        activation=shown.activation if shown else None,
        layer_norm_eps=shown.layer_norm_eps if shown else None,
        pooling="mean" if pool == "avg" else "class" if pool == "token" else shown.pooling if shown else None,
        position_slots=shown.position_slots if shown else None,
        layer_scale=shown.layer_scale if shown else None,
        mean=specified.mean,
        std=specified.std,
        interpolation=specified.interpolation,
        geometry=specified.geometry,
        labels=labels_of(labels) if labels else None,
        license=config.get("license"),
        shape=shown.shape if shown else {},
        notes=notes,
    )


def tag_of_timm_name(name: str) -> str:
    """Return the tag of the weights that `name` means in timm, such as "fb_in1k"; the default one where it has none."""
    timm = require("timm", extra="timm", what="ask timm")
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return name.partition(".")[2] or str(getattr(config, "tag", None) or "")


def imagenet_names(tag: str, num_classes: int) -> tuple[str, ...] | None:
    """Return timm's names of ImageNet-1k's classes, where the tag of the weights says that they end there."""
    if num_classes != 1000 or not tag.endswith("in1k"):
        return None
    info = require("timm.data", extra="timm", what="name the classes").ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(index, detailed=False) for index in range(num_classes))


def _patch_of(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.patch_size
    return int(height), int(width)


def _activation_of(module: nn.Module, name: str) -> Activation:
    """Return which of our activations this is, by what it does: timm has several classes for each."""
    x = torch.linspace(-4, 4, 101)
    ours = {
        "gelu": nn.functional.gelu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
        "quick_gelu": quick_gelu(x),
    }
    found = module(x)
    for activation, expected in ours.items():
        if torch.allclose(found, expected, atol=1e-6, rtol=0):
            return activation  # type: ignore[return-value]
    reason = f"the activation of {name} is {type(module).__name__}, none of {', '.join(ours)}"
    raise NotPlainViT("cannot use the network", reason=reason, remedy="choose a vit_* or deit* of timm")


def timm_name_in(settings: Mapping[str, Any]) -> str | None:
    """Return the network of timm that the settings of a training loop name; None without one, or without timm."""
    names = [settings[key] for key in _NAMES if isinstance(settings.get(key), str)]
    try:
        timm = require("timm", extra="timm", what="ask timm") if names else None
    except MissingExtra:
        return None
    return next((name for name in names if timm is not None and timm.is_model(name)), None)


def safe_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a config.json that are plain values and of a plausible size; raises ValueError."""
    safe: dict[str, Any] = {}
    for name, value in arguments.items():
        leaves = list(_leaves(value))
        plain = all(isinstance(leaf, int | float | str | bool) or leaf is None for leaf in leaves)
        if name in _REFUSED_ARGUMENTS or not plain:
            continue
        numbers = [leaf for leaf in leaves if isinstance(leaf, int)]
        if max(numbers, default=0) > (_DEEPEST if "depth" in name else _LARGEST):
            raise ValueError(f"model_args has {name} {value}")
        safe[name] = tuple(value) if isinstance(value, list) else value
    return safe


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value
