"""What timm knows of a network by its name: built without weights, and asked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vit_edge.conversion.label_names import labels_of
from vit_edge.conversion.preprocessing.knowledge import Facts
from vit_edge.conversion.preprocessing.settings import preprocessing_facts
from vit_edge.errors import MissingExtra, UsageError, VitEdgeError, require
from vit_edge.vit import quick_gelu
from vit_edge.vit_config import Activation

__all__ = ["facts_of_timm_config", "facts_of_timm_model", "facts_of_timm_name", "imagenet_names"]

# What a config.json may set of a network; the rest of create_model's arguments reach files and other code.
_ARGUMENTS = {
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool", "class_token",
    "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "init_values", "qkv_bias", "act_layer",
}  # fmt: skip
_LARGEST = 65_536
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
        raise UsageError("cannot use the network", reason=reason, remedy="choose a vit_* or deit* of timm")
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
    arguments = _safe_arguments(values.get("model_args") or {})
    pool = values.get("global_pool") or config.get("global_pool")
    specified = preprocessing_facts({"pretrained_cfg": config}, origin=origin)
    labels = values.get("label_names") or config.get("label_names")
    shown = None
    notes: tuple[str, ...] = ()
    try:
        shown = facts_of_timm_name(str(values["architecture"]), origin=origin, arguments=arguments)
    except MissingExtra as error:
        notes = (f"timm would give heads, activation and eps of {values['architecture']}: {error.remedy}",)
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
    raise UsageError("cannot use the network", reason=reason, remedy="choose a vit_* or deit* of timm")


def _safe_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    safe: dict[str, Any] = {}
    for name, value in arguments.items():
        sides = value if isinstance(value, list) else [value]
        plain = all(isinstance(side, int | float | str | bool) or side is None for side in sides)
        if name in _ARGUMENTS and plain:
            if any(isinstance(side, int) and side > _LARGEST for side in sides):
                raise ValueError(f"model_args has {name} {value}")
            safe[name] = tuple(value) if isinstance(value, list) else value
    if isinstance(safe.get("depth"), int) and safe["depth"] > 256:
        raise ValueError(f"model_args has depth {safe['depth']}")
    return safe
