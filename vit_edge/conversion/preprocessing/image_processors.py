"""What transformers' image processors do, by class, with the defaults of each for what a file leaves out; no torch.

A class that is not in the table is refused: its code decides what the settings mean. A test compares every entry with
the pixels of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vit_edge.conversion.preprocessing.knowledge import CLIP, HALF, IMAGENET, Facts, Geometry, Triple, size_of, three

__all__ = ["KEYS", "facts_of_processor", "is_processor"]

# Keys that only an image processor has, whatever else a settings file holds.
KEYS = {"image_mean", "image_std", "image_processor_type", "feature_extractor_type", "size", "crop_size"}
KEYS |= {"do_resize", "do_normalize", "do_rescale", "do_center_crop"}
# Pillow's codes of the filters, as transformers stores them.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
# Steps that leave the image alone, as long as it is in colour; those of segmentation change the maps only.
_IDLE = {"do_reduce_labels"}
# Settings of single classes that change the pixels; any other class ignores or lacks them.
_SPECIAL = ("crop_pct", "include_top", "rescale_offset", "size_divisor", "keep_aspect_ratio", "resize_short")
_FULL_FROM = 384  # ConvNextImageProcessor: no crop from this size on
_LEVIT = 256 / 224  # LevitImageProcessor: the short side before the crop, over that of the crop
_SUFFIX = re.compile(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Class:
    """The defaults of a class, and which of the special settings and steps its code knows."""

    size: Mapping[str, int]
    resample: int = 3
    crop: int | None = None
    crops: bool = False
    normalisation: tuple[Triple, Triple] = HALF
    short_side: bool = False  # what a size that is one number means
    special: Mapping[str, Any] = field(default_factory=dict)
    normalises: bool = True
    flips: bool = False


def _short(side: int) -> dict[str, int]:
    return {"shortest_edge": side}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_CLIP = _Class(size=_short(224), crop=224, crops=True, normalisation=CLIP, short_side=True)
_MOBILENET = _Class(size=_short(256), resample=2, crop=224, crops=True, short_side=True)
# transformers 5.24, models/*/image_processing_*.py.
_CLASSES = {
    "Beit": _Class(size=_square(224), crop=224),
    "Bit": _CLIP,
    "Blip": _Class(size=_square(384), normalisation=CLIP),
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "ConvNext": _Class(size=_short(384), short_side=True, special={"crop_pct": 224 / 256}),
    "DINOv3ViT": _Class(size=_square(224), resample=2, normalisation=IMAGENET),
    "DeiT": _Class(size=_square(256), crop=224, crops=True),
    "EfficientNet": _Class(size=_square(346), crop=289, special={"include_top": True, "rescale_offset": False}),
    "Levit": _Class(size=_short(224), crop=224, crops=True, normalisation=IMAGENET, short_side=True),
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "MobileViT": _Class(size=_short(224), crop=256, crops=True, short_side=True, normalises=False, flips=True),
    "PoolFormer": _Class(
        size=_short(224), crop=224, crops=True, normalisation=IMAGENET, short_side=True, special={"crop_pct": 0.9}
    ),
    "Pvt": _Class(size=_square(224), normalisation=IMAGENET),
    "Segformer": _Class(size=_square(512), resample=2, normalisation=IMAGENET),
    "Siglip": _Class(size=_square(224), short_side=True),
    "ViT": _Class(size=_square(224), resample=2),
}
# The class for a config.json whose processor names none (transformers before 4.26, models/auto).
_FAMILIES = {
    "beit": "Beit", "bit": "Bit", "clip": "CLIP", "convnext": "ConvNext", "convnextv2": "ConvNext", "cvt": "ConvNext",
    "data2vec-vision": "Beit", "deit": "DeiT", "dinov2": "Bit", "efficientnet": "EfficientNet", "focalnet": "Bit",
    "hiera": "Bit", "ijepa": "ViT", "levit": "Levit", "mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2",
    "mobilevit": "MobileViT", "mobilevitv2": "MobileViT", "poolformer": "PoolFormer", "pvt": "Pvt", "pvt_v2": "Pvt",
    "regnet": "ConvNext", "resnet": "ConvNext", "segformer": "Segformer", "siglip": "Siglip", "swiftformer": "ViT",
    "swin": "ViT", "swinv2": "ViT", "vit": "ViT", "vit_msn": "ViT",
}  # fmt: skip


def is_processor(values: Mapping[str, Any]) -> bool:
    """Return whether settings are those of an image processor of transformers."""
    return bool(KEYS & values.keys())


def facts_of_processor(values: Mapping[str, Any], *, origin: str, family: str | None = None) -> Facts:
    """Return what an image processor does; raises ValueError if a `Preprocessing` cannot do the same.

    `family` is the model_type of the config, which decides on the class if the processor names none.
    """
    name = _class_name(values, family)
    if name is not None and name not in _CLASSES:
        full = values.get("image_processor_type") or values.get("feature_extractor_type")
        raise ValueError(f"the image processor {full} is not known; its code decides what its settings mean")
    kind = _CLASSES[name] if name else None
    settings = _completed(values, kind)
    _refuse_unknown_steps(settings, kind)
    resize, crop = _resize_and_crop(settings, name)
    mean, std = _normalisation(settings)
    resample = settings.get("resample")
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
        bgr=bool(settings.get("do_flip_channel_order")) or None,
    )


def _class_name(values: Mapping[str, Any], family: str | None) -> str | None:
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    return _SUFFIX.sub("", str(name)) if name else _FAMILIES.get(family or "")


def _completed(values: Mapping[str, Any], kind: _Class | None) -> dict[str, Any]:
    """Return the settings with the class's defaults, as transformers reads them: null counts as left out."""
    given = {key: value for key, value in values.items() if value is not None}
    if kind is None:
        return given
    mean, std = kind.normalisation
    defaults: dict[str, Any] = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": kind.crops, "size": kind.size,
        "resample": kind.resample, "image_mean": mean, "image_std": std, "default_to_square": not kind.short_side,
        "do_flip_channel_order": kind.flips, **kind.special,
    }  # fmt: skip
    if kind.crop is not None:
        defaults["crop_size"] = _square(kind.crop)
    always = {} if kind.normalises else {"do_normalize": False}
    return {**defaults, **given, **always}


def _refuse_unknown_steps(settings: Mapping[str, Any], kind: _Class | None) -> None:
    known = _STEPS | _IDLE | ({"do_flip_channel_order"} if kind is not None and kind.flips else set())
    special = kind.special if kind is not None else {}
    steps = [name for name, value in settings.items() if name.startswith("do_") and value and name not in known]
    steps += [name for name in _SPECIAL if settings.get(name) and name not in special]
    if steps:
        raise ValueError(f"{', '.join(steps)} of an image processor cannot be represented")


def _resize_and_crop(
    settings: Mapping[str, Any], name: str | None
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    """Return `Preprocessing.resize` and the crop, as the class computes them from its size."""
    if not settings.get("do_resize", True):
        raise ValueError("do_resize is false: images of any size cannot be represented")
    size = settings.get("size")
    if size is None:
        return None, None
    resize = _size(size, short_side=not settings.get("default_to_square", True))
    if name == "ConvNext":
        return _of_convnext(resize, float(settings["crop_pct"]))
    if name == "PoolFormer":
        resize = _divided(resize, float(settings["crop_pct"]))
    if name == "Levit" and isinstance(resize, int):
        resize = int(_LEVIT * resize)
    if settings.get("do_center_crop") and settings.get("crop_size") is not None:
        return resize, size_of(_size(settings["crop_size"], short_side=False))
    if isinstance(resize, int):
        raise ValueError("size has shortest_edge and nothing is cropped: the input has no fixed size")
    return resize, resize


def _of_convnext(resize: int | tuple[int, int], crop_pct: float) -> tuple[int | tuple[int, int], tuple[int, int]]:
    if not isinstance(resize, int):
        raise ValueError("size has no shortest_edge, which ConvNextImageProcessor needs")
    crop = (resize, resize)
    return (crop if resize >= _FULL_FROM else int(resize / crop_pct)), crop


def _divided(resize: int | tuple[int, int], crop_pct: float) -> int:
    side = resize if isinstance(resize, int) else resize[0]
    if resize not in (side, (side, side)):
        raise ValueError(f"size {resize} with crop_pct cannot be represented")
    return int(side / crop_pct)


def _size(size: Any, *, short_side: bool) -> int | tuple[int, int]:
    if isinstance(size, int):  # as older versions wrote it
        return size if short_side else (size, size)
    if isinstance(size, list | tuple):
        return size_of(size)
    if set(size) == {"shortest_edge"}:
        return size_of(size["shortest_edge"])[0]
    if set(size) == {"height", "width"}:
        return size_of([size["height"], size["width"]])
    raise ValueError(f"size {dict(size)} cannot be represented: give shortest_edge, or height and width")


def _normalisation(settings: Mapping[str, Any]) -> tuple[Triple | None, Triple | None]:
    """Return mean and std of x / 255 that do what the processor does with pixels.

    That is x f - offset, minus mean over std, and with `include_top` once more over std.
    """
    factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
    offset = 1.0 if settings.get("rescale_offset") and settings.get("do_rescale", True) else 0.0
    if not factor > 0:
        raise ValueError(f"rescale_factor is {factor}")
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        if settings.get("image_mean") is None or settings.get("image_std") is None:
            return None, None
        mean, std = three(settings["image_mean"]), three(settings["image_std"])
    if settings.get("include_top"):
        std = three([first * second for first, second in zip(std, three(settings["image_std"]), strict=True)])
    mean, scale = three([value + offset for value in mean]), 255 * factor
    if abs(scale - 1) < 1e-6:  # 1 / 255, in any spelling
        return mean, std
    return three([value / scale for value in mean]), three([value / scale for value in std])
