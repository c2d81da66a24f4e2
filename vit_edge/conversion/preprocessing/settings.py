"""Preprocessing as other libraries write it down: transformers' image processors, timm's pretrained_cfg; no torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_edge.conversion.preprocessing.knowledge import Facts, Geometry
from vit_edge.errors import InputError, UsageError
from vit_edge.files import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["preprocessing_facts", "read_settings", "size_of"]

_MAX_BYTES = 20_000_000
_OWN = ("resize", "crop", "interpolation", "mean", "std", "keep_ratio", "crop_rounding")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
# Pillow's codes, as transformers stores them.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Keys that only an image processor of transformers has, and its steps that are read.
_PROCESSOR_KEYS = {"image_mean", "image_std", "image_processor_type", "feature_extractor_type", "size", "crop_size"}
_PROCESSOR_KEYS |= {"do_resize", "do_normalize", "do_rescale", "do_center_crop"}
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
# What transformers' image processors do where nothing is written: their class defaults.
_DEFAULT_RESAMPLE = {"ViT": 2, "DeiT": 3, "Bit": 3, "CLIP": 3}


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


def preprocessing_facts(values: Mapping[str, Any], *, origin: str) -> Facts:
    """Return the preprocessing of a settings file in any of three forms; raises UsageError if it cannot be represented.

    The forms: fields of vit_edge.image.Preprocessing; transformers' preprocessor_config.json; timm's config.json or its
    pretrained_cfg. What a form leaves out stays unspecified.
    """
    try:
        if _PROCESSOR_KEYS & values.keys():
            return _from_image_processor(values, origin)
        if "pretrained_cfg" in values or ({"crop_pct", "input_size"} & values.keys() and "resize" not in values):
            return _from_timm(values.get("pretrained_cfg") or values, origin)
        unknown = sorted(set(values) - set(_OWN))
        if unknown or not values:
            raise ValueError(f"{', '.join(unknown[:5]) or 'nothing'} is no setting; they are {', '.join(_OWN)}")
        return _from_fields(values, origin)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        remedy = "write what the network was trained with: " + ", ".join(_OWN)
        raise UsageError("cannot use the preprocessing", file=origin, reason=str(error), remedy=remedy) from error


def size_of(value: Any) -> tuple[int, int]:
    """Return (height, width) of a number or a pair; raises ValueError."""
    sides = (value, value) if type(value) is int else tuple(value) if isinstance(value, list | tuple) else ()
    if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
        return sides[0], sides[1]
    raise ValueError(f"{value!r} is no size; it has to be pixels, or height and width")


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
        mean=_three(values["mean"]) if "mean" in values else None,
        std=_three(values["std"]) if "std" in values else None,
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
        mean=_three(config["mean"]) if config.get("mean") else None,
        std=_three(config["std"]) if config.get("std") else None,
        # timm trains some networks with "random"; then nothing is specified.
        interpolation=interpolation if interpolation in _INTERPOLATIONS else None,
        geometry=Geometry(fraction=float(fraction), squash=mode == "squash") if fraction else None,
        image_size=size_of(list(size[1:])) if size else None,
    )


def _kind_of_processor(values: Mapping[str, Any]) -> str:
    name = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    return re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)


def _from_image_processor(values: Mapping[str, Any], origin: str) -> Facts:
    resize, crop = _resize_and_crop(values)
    mean, std = _normalisation(values)
    resample = values.get("resample", _DEFAULT_RESAMPLE.get(_kind_of_processor(values)))
    if resample is not None and resample not in _RESAMPLE:
        raise ValueError(f"resample {resample} (box or Hamming) is no interpolation here")
    return Facts(
        origin=origin,
        mean=mean,
        std=std,
        interpolation=None if resample is None else _RESAMPLE[resample],
        # transformers' center_crop halves with //; without a crop nothing is rounded.
        geometry=None
        if resize is None
        else Geometry(resize=resize, crop=crop, crop_rounding="half-even" if resize == crop else "floor"),
        input_size=crop if resize is not None else None,
    )


def _resize_and_crop(values: Mapping[str, Any]) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    steps = [name for name, value in values.items() if name.startswith("do_") and value and name not in _STEPS]
    steps += [name for name in ("crop_pct", "include_top") if values.get(name)]
    if steps:
        raise ValueError(f"{', '.join(steps)} of an image processor cannot be represented")
    if not values.get("do_resize", True):
        raise ValueError("do_resize is false: images of any size cannot be represented")
    size = values.get("size")
    if size is None:
        return None, None
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    short_side = not values.get("default_to_square", not kind.startswith(("CLIP", "Bit", "ConvNext")))
    resize = _processor_size(size, short_side=short_side)
    if values.get("do_center_crop", kind.startswith(("CLIP", "Bit", "DeiT"))) and values.get("crop_size") is not None:
        crop = _processor_size(values["crop_size"], short_side=False)
        return resize, size_of(crop)
    if isinstance(resize, int):
        raise ValueError("size has shortest_edge and nothing is cropped: the input has no fixed size")
    return resize, resize


def _processor_size(size: Any, *, short_side: bool) -> int | tuple[int, int]:
    if isinstance(size, int):  # as older versions wrote it
        return size if short_side else (size, size)
    if isinstance(size, list | tuple):
        return size_of(size)
    if set(size) == {"shortest_edge"}:
        return size_of(size["shortest_edge"])[0]
    if set(size) == {"height", "width"}:
        return size_of([size["height"], size["width"]])
    raise ValueError(f"size {dict(size)} cannot be represented: give shortest_edge, or height and width")


def _normalisation(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return mean and std of x / 255 that do what the processor does with pixels: x f, then minus mean, over std."""
    if values.get("rescale_offset"):
        raise ValueError("rescale_offset cannot be represented")
    factor = float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
    if not factor > 0:
        raise ValueError(f"rescale_factor is {factor}")
    if not values.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif values.get("image_mean") is None or values.get("image_std") is None:
        return None, None
    else:
        mean, std = _three(values["image_mean"]), _three(values["image_std"])
    scale = 255 * factor
    if abs(scale - 1) < 1e-6:  # 1 / 255, in any spelling
        return mean, std
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _three(values: Any) -> tuple[float, float, float]:
    if isinstance(values, int | float) and not isinstance(values, bool):
        values = [values] * 3
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{values!r} are not three numbers, for R, G and B")
    first, second, third = (float(value) for value in values)
    return first, second, third


def _interpolation(value: Any) -> str:
    if value not in _INTERPOLATIONS:
        raise ValueError(f"interpolation {value!r}; choose one of {', '.join(_INTERPOLATIONS)}")
    return str(value)
