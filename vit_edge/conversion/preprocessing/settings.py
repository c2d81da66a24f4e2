"""Preprocessing as other libraries write it down: transformers' image processors, timm's pretrained_cfg; no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_edge.conversion.preprocessing.image_processors import facts_of_processor, is_processor
from vit_edge.conversion.preprocessing.knowledge import Facts, Geometry, size_of, three
from vit_edge.errors import InputError, UsageError
from vit_edge.files import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["preprocessing_facts", "read_settings"]

_MAX_BYTES = 20_000_000
_OWN = ("resize", "crop", "interpolation", "mean", "std", "keep_ratio", "crop_rounding")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object in a JSON or TOML file; raises InputError."""
    source = Path(path)
    data = read_file(source, what="settings", max_bytes=_MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        values = tomllib.loads(text) if source.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"the file is neither JSON nor TOML ({str(error)[:200]})"
        raise InputError("cannot read the settings", file=source, reason=reason, remedy="write JSON or TOML") from error
    if not isinstance(values, dict):
        raise InputError(
            "cannot read the settings", file=source, reason="the file holds no object", remedy="write name: value"
        )
    return values


def preprocessing_facts(values: Mapping[str, Any], *, origin: str, family: str | None = None) -> Facts:
    """Return the preprocessing of a settings file in any of three forms; raises UsageError if it cannot be represented.

    The forms: fields of vit_edge.image.Preprocessing; transformers' preprocessor_config.json; timm's config.json or its
    pretrained_cfg. What a form leaves out stays unspecified. `family` is the model_type that a processor is for.
    """
    try:
        if is_processor(values):
            return facts_of_processor(values, origin=origin, family=family)
        if "pretrained_cfg" in values or ({"crop_pct", "input_size"} & values.keys() and "resize" not in values):
            return _from_timm(values.get("pretrained_cfg") or values, origin)
        unknown = sorted(set(values) - set(_OWN))
        if unknown or not values:
            raise ValueError(f"{', '.join(unknown[:5]) or 'nothing'} is no setting; they are {', '.join(_OWN)}")
        return _from_fields(values, origin)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        remedy = "write what the network was trained with: " + ", ".join(_OWN)
        raise UsageError("cannot use the preprocessing", file=origin, reason=str(error), remedy=remedy) from error


def _from_fields(values: Mapping[str, Any], origin: str) -> Facts:
    geometry = None
    if "resize" in values:
        resize = values["resize"] if isinstance(values["resize"], int) else size_of(values["resize"])
        crop = size_of(values["crop"]) if "crop" in values else None
        geometry = Geometry(
            resize=resize,
            crop=crop,
            keep_ratio=values.get("keep_ratio", False),
            crop_rounding=values.get("crop_rounding", "half-even"),
        )
    elif {"crop", "keep_ratio", "crop_rounding"} & values.keys():
        raise ValueError("crop, keep_ratio and crop_rounding need resize")
    return Facts(
        origin=origin,
        mean=three(values["mean"]) if "mean" in values else None,
        std=three(values["std"]) if "std" in values else None,
        interpolation=_interpolation(values["interpolation"]) if "interpolation" in values else None,
        geometry=geometry,
    )


def _from_timm(config: Mapping[str, Any], origin: str) -> Facts:
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r} adds borders, which no preprocessing here does")
    fraction = config.get("crop_pct")
    interpolation = config.get("interpolation")
    size = config.get("input_size")
    return Facts(
        origin=origin,
        mean=three(config["mean"]) if config.get("mean") else None,
        std=three(config["std"]) if config.get("std") else None,
        # timm trains some networks with "random"; then nothing is specified.
        interpolation=interpolation if interpolation in _INTERPOLATIONS else None,
        geometry=Geometry(fraction=float(fraction), squash=mode == "squash") if fraction else None,
        image_size=size_of(list(size[1:])) if size else None,
    )


def _interpolation(value: Any) -> str:
    if value not in _INTERPOLATIONS:
        raise ValueError(f"interpolation {value!r}; choose one of {', '.join(_INTERPOLATIONS)}")
    return str(value)
