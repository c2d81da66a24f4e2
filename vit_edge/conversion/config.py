"""What the files next to the weights specify: transformers' config.json and image processor, timm's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_edge.conversion.label_names import labels_of
from vit_edge.conversion.pickled_weights import unusable
from vit_edge.conversion.preprocessing.knowledge import Facts
from vit_edge.conversion.preprocessing.settings import preprocessing_facts, read_settings, size_of
from vit_edge.conversion.timm_networks import facts_of_timm_config
from vit_edge.errors import printable
from vit_edge.vit_config import Activation

__all__ = ["facts_beside"]

_PROCESSOR = "preprocessor_config.json"
# transformers.activations.ACT2FN, those that are one of ours.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_FAMILIES = ("vit", "deit", "dinov2", "dinov2_with_registers")


def facts_beside(folder: Path) -> tuple[Facts, ...]:
    """Return what config.json and preprocessor_config.json of a folder specify; nothing if there are none.

    Raises CheckpointRejected or UsageError where they ask for what cannot be represented.
    """
    found: list[Facts] = []
    if (folder / _PROCESSOR).is_file():
        values = read_settings(folder / _PROCESSOR)
        found.append(preprocessing_facts(values, origin=printable(folder / _PROCESSOR)))
    config = folder / "config.json"
    if not config.is_file():
        return tuple(dataclasses.replace(facts, origin=_PROCESSOR, input_size=None) for facts in found)
    values, origin = read_settings(config), printable(config)
    try:
        if "architecture" in values:
            found.append(facts_of_timm_config(values, origin=origin))
        elif "model_type" in values or "hidden_size" in values:
            found.append(_facts_of_transformers(values, origin))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise unusable(origin, f"the config cannot be used ({error})", "download it again, or put it aside") from error
    # Only DINOv2 takes images of another size than its positions were made for.
    if not str(values.get("model_type")).startswith("dinov2"):
        found = [dataclasses.replace(facts, input_size=None) for facts in found]
    # The file names in messages are short: a folder's name is the machine's business.
    return tuple(dataclasses.replace(facts, origin=Path(facts.origin).name) for facts in found)


def _facts_of_transformers(values: Mapping[str, Any], origin: str) -> Facts:
    family = values.get("model_type", "vit")
    if family not in _FAMILIES:
        reason = f"the config's model_type is {family!r}; those read are {', '.join(_FAMILIES)}"
        raise unusable(origin, reason, "convert it with timm, where it has the same network")
    if values.get("use_swiglu_ffn"):
        raise unusable(origin, "the network's MLP is gated (use_swiglu_ffn)", "a plain Vision Transformer is needed")
    hidden = values.get("hidden_act", "gelu")
    if hidden not in _ACTIVATIONS:
        raise unusable(origin, f"hidden_act is {hidden!r}; known are {', '.join(_ACTIVATIONS)}", "take another network")
    dino = family.startswith("dinov2")
    name = str(values.get("_name_or_path") or "")
    return Facts(
        origin=origin,
        image_size=size_of(values["image_size"]) if "image_size" in values else None,
        num_heads=values.get("num_attention_heads"),
        activation=_ACTIVATIONS[hidden],
        layer_norm_eps=float(values.get("layer_norm_eps", 1e-6 if dino else 1e-12)),
        pooling=None if dino else "class",
        layer_scale=float(values.get("layerscale_value", 1.0)) if dino else None,
        labels=labels_of(values["id2label"]) if values.get("id2label") else None,
        problem_type=values.get("problem_type"),
        # A path of the machine that saved it is no name.
        base_model=name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else None,
        shape=_shape_of(values),
    )


def _shape_of(values: Mapping[str, Any]) -> dict[str, Any]:
    shape: dict[str, Any] = {
        ours: values[theirs]
        for ours, theirs in (
            ("width", "hidden_size"),
            ("depth", "num_hidden_layers"),
            ("mlp_width", "intermediate_size"),
        )
        if theirs in values
    }
    if "patch_size" in values:
        shape["patch_size"] = size_of(values["patch_size"])
    return shape
