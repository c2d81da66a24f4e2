"""What the files next to the weights specify: transformers' config.json and image processor, timm's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vit_edge.conversion.label_names import labels_of
from vit_edge.conversion.pickled_weights import not_plain, unusable
from vit_edge.conversion.preprocessing.knowledge import Facts, size_of
from vit_edge.conversion.preprocessing.settings import preprocessing_facts, read_settings
from vit_edge.conversion.timm_networks import facts_of_timm_config, facts_of_timm_name, timm_name_in
from vit_edge.errors import printable
from vit_edge.vit_config import Activation

__all__ = ["facts_beside", "facts_of_settings", "library_of", "processor_facts"]

# transformers 5 writes the second if a model has more than an image processor; its entry counts first there, too.
_PROCESSOR, _PROCESSORS = "preprocessor_config.json", "processor_config.json"
# transformers.activations.ACT2FN, those that are one of ours.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# What timm's train.py and Lightning modules call them.
_TRAINED_WITH = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_CLASS_NAMES = ("class_names", "classes", "label_names", "labels")
_FAMILIES = ("vit", "deit", "dinov2", "dinov2_with_registers")


def facts_beside(folder: Path) -> tuple[Facts, ...]:
    """Return what config.json and preprocessor_config.json of a folder specify; nothing if there are none.

    Raises CheckpointRejected or UsageError where they ask for what cannot be represented.
    """
    config = folder / "config.json"
    values, origin = (read_settings(config) if config.is_file() else {}), printable(config)
    found = list(processor_facts(folder, values))
    if not config.is_file():
        return tuple(dataclasses.replace(facts, origin=_PROCESSOR, input_size=None) for facts in found)
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


def processor_facts(folder: Path, config: Mapping[str, Any]) -> tuple[Facts, ...]:
    """Return what the image processor of a folder specifies, which `config` is for; raises UsageError."""
    for name in (_PROCESSORS, _PROCESSOR):
        if (folder / name).is_file():
            values: Any = read_settings(folder / name)
            values = values.get("image_processor") if name == _PROCESSORS else values
            if isinstance(values, Mapping):
                family = str(config.get("model_type") or "") or None
                return (preprocessing_facts(values, origin=printable(folder / name), family=family),)
    return ()


def facts_of_settings(settings: Mapping[str, Any]) -> tuple[Facts, ...]:
    """Return what the settings of a training loop specify: preprocessing, class names, and timm's network by its name.

    Raises NotPlainViT if they name another network, UsageError if the preprocessing cannot be represented.
    """
    given = {key: settings[key] for key in _TRAINED_WITH if settings.get(key)}
    names = next((settings[key] for key in _CLASS_NAMES if _is_list_of_text(settings.get(key))), None)
    found = []
    if given or names:
        facts = preprocessing_facts({"pretrained_cfg": given}, origin="the checkpoint's settings")
        found.append(dataclasses.replace(facts, image_size=None, labels=tuple(names) if names else None))
    network = timm_name_in(settings)
    if network is not None:
        facts = facts_of_timm_name(network, origin=f"timm:{network}, which the checkpoint names")
        # Heads go with the width; the tensors show the rest, and names and licence are those of other weights.
        others: dict[str, Any] = dict.fromkeys(("image_size", "labels", "name", "license", "base_model"))
        found.append(dataclasses.replace(facts, shape={"width": facts.shape["width"]}, **others))
    return tuple(found)


def _is_list_of_text(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(value, str) for value in values)


def library_of(folder: Path) -> Literal["timm", "transformers"] | None:
    """Return whose folder this is, by its config.json; None if it has none, or one of somebody else."""
    if not (folder / "config.json").is_file():
        return None
    values = read_settings(folder / "config.json")
    return "timm" if "architecture" in values else "transformers" if "model_type" in values else None


def _facts_of_transformers(values: Mapping[str, Any], origin: str) -> Facts:
    family = values.get("model_type", "vit")
    if family not in _FAMILIES:
        reason = f"the config's model_type is {family!r}; those read are {', '.join(_FAMILIES)}"
        raise not_plain(origin, reason, "convert it with timm, where it has the same network")
    if values.get("use_swiglu_ffn"):
        raise not_plain(origin, "the network's MLP is gated (use_swiglu_ffn)", "a plain Vision Transformer is needed")
    hidden = values.get("hidden_act", "gelu")
    if hidden not in _ACTIVATIONS:
        raise not_plain(
            origin, f"hidden_act is {hidden!r}; known are {', '.join(_ACTIVATIONS)}", "take another network"
        )
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
