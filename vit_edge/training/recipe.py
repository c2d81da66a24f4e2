"""How a training run goes: one validated dataclass, printed, saved and changed as flat TOML; and the named recipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vit_edge.errors import UsageError, require
from vit_edge.files import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CONFIG_NAME", "RECIPES", "Recipe", "load_recipe", "load_start"]

# In a run's folder: its recipe, and in the table [start] what it started from.
CONFIG_NAME = "config.toml"

Distillation = Literal["none", "hard", "soft"]
Precision = Literal["float32", "bfloat16", "float16"]
_MAX_RECIPE_BYTES = 1_000_000
# field -> the bounds that a value has to lie in, both included
_BOUNDS: dict[str, tuple[float, float]] = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 2**20),
    "accumulation_steps": (1, 2**16),
    "learning_rate": (1e-9, 1.0),
    "weight_decay": (0.0, 10.0),
    "adam_beta2": (0.0, 0.999999),
    "warmup_fraction": (0.0, 0.9),
    "layer_decay": (0.01, 1.0),
    "max_gradient_norm": (1e-6, 1e6),
    "label_smoothing": (0.0, 0.9),
    "ema_decay": (0.0, 0.999999),
    "dropout": (0.0, 0.9),
    "stochastic_depth": (0.0, 0.9),
    "crop_area": (0.01, 1.0),
    "flip_probability": (0.0, 1.0),
    "rand_augment_operations": (0, 16),
    "rand_augment_magnitude": (0, 30),
    "random_erasing_probability": (0.0, 1.0),
    "mixup_alpha": (0.0, 100.0),
    "cutmix_alpha": (0.0, 100.0),
    "rotate_degrees": (0.0, 180.0),
    "shift_fraction": (0.0, 0.9),
    "scale_fraction": (0.0, 0.9),
    "distillation_weight": (0.0, 1.0),
    "distillation_temperature": (0.01, 100.0),
    "validation_fraction": (0.0, 0.9),
    "seed": (0, 2**31 - 1),
}
_WHOLE = {
    "epochs", "batch_size", "accumulation_steps", "rand_augment_operations", "rand_augment_magnitude", "seed",
}  # fmt: skip
_OPTIONAL = {"max_gradient_norm", "ema_decay", "crop_area"}
_SWITCHES = {"freeze_backbone", "compile"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What one run does to its images and weights; raises ValueError on values that make no sense.

    `batch_size` is of one optimiser step over all devices, made in `accumulation_steps` parts on each. AdamW, with a
    linear warm-up over `warmup_fraction` of the steps and a cosine to zero. `layer_decay` multiplies the learning rate
    once for every block away from the head. `crop_area` is the smallest share of the image that RandomResizedCrop
    takes; without it the image is cropped as in evaluation. `mixup_alpha` and `cutmix_alpha` are Beta parameters, 0
    for none; a pair of images is mixed one way or the other. `ema_decay` makes the checkpoint an exponential moving
    average of the weights. `validation_fraction` is held out of the training images where no validation split is
    given, and chooses the best epoch.
    """

    epochs: int = 30
    batch_size: int = 32
    accumulation_steps: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    adam_beta2: float = 0.999
    warmup_fraction: float = 0.1
    layer_decay: float = 1.0
    max_gradient_norm: float | None = 1.0
    label_smoothing: float = 0.1
    ema_decay: float | None = None
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    freeze_backbone: bool = False
    crop_area: float | None = None
    flip_probability: float = 0.0
    rand_augment_operations: int = 0
    rand_augment_magnitude: int = 9
    random_erasing_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    rotate_degrees: float = 0.0
    shift_fraction: float = 0.0
    scale_fraction: float = 0.0
    distillation: Distillation = "none"
    distillation_weight: float = 0.5
    distillation_temperature: float = 1.0
    precision: Precision = "float32"
    compile: bool = False
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            kinds = int if name in _WHOLE else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a whole number" if name in _WHOLE else "a number"
                raise ValueError(f"{name} is {value!r}; it must be {kind} from {low:g} to {high:g}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name, choices in (("distillation", get_args(Distillation)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.accumulation_steps > self.batch_size:
            raise ValueError(f"accumulation_steps is {self.accumulation_steps}, over batch_size {self.batch_size}")

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some fields changed; raises ValueError on unknown names or senseless values."""
        unknown = sorted(values.keys() - {f.name for f in fields(self)})
        if unknown:
            known = ", ".join(f.name for f in fields(self))
            raise ValueError(f"a recipe has no {unknown[0]!r}; it has {known}")
        return replace(self, **values)

    def to_toml(self, *, start: Mapping[str, str] | None = None) -> str:
        """Return the recipe as TOML, one line a field; a field that is None is left out; and the table [start]."""
        tomli_w = require("tomli_w", extra="train", what="write a recipe")
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return str(tomli_w.dumps({**values, "start": dict(start)} if start else values))


RECIPES: dict[str, Recipe] = {
    # For a small network on a small set, images turned and moved a little, never mirrored: a digit has a handedness.
    # vit_digits_patch8_32 on 360 test digits, seeds 0 and 1: 97.8 and 98.1 %; three blocks in 18 epochs at 8e-4 took
    # longer and got 97.5 and 97.2 %.
    "scratch-small": Recipe(
        epochs=24, learning_rate=6e-4, adam_beta2=0.98, rotate_degrees=10.0, shift_fraction=0.08, scale_fraction=0.1
    ),
    # For pretrained weights on a set of hundreds or thousands of images. DeiT-tiny on 301 images of pizza, steak
    # and sushi, evaluated on 149 others: 91 % at this rate, as at half of it; 5e-4 forgets more than it learns.
    "finetune": Recipe(
        epochs=8, batch_size=16, learning_rate=2e-4, layer_decay=0.75, crop_area=0.35, flip_probability=0.5
    ),
    # The backbone stays as it is; only the head learns.
    "probe": Recipe(
        epochs=20, batch_size=32, learning_rate=1e-2, weight_decay=0.0, freeze_backbone=True, label_smoothing=0.0,
        crop_area=0.35, flip_probability=0.5,
    ),
    # Table 3 of arXiv:2010.11929, the row for ImageNet from scratch: 10,000 warm-up steps of 93,840.
    "paper": Recipe(
        epochs=300, batch_size=4096, learning_rate=3e-3, weight_decay=0.3, warmup_fraction=0.1066, dropout=0.1,
        label_smoothing=0.0, crop_area=0.08, flip_probability=0.5,
    ),
    # Table 9 of arXiv:2012.12877 (DeiT-B), without its repeated augmentation.
    "deit": Recipe(
        epochs=300, batch_size=1024, learning_rate=1e-3, weight_decay=0.05, warmup_fraction=5 / 300,
        max_gradient_norm=None, stochastic_depth=0.1, crop_area=0.08, flip_probability=0.5, rand_augment_operations=2,
        rand_augment_magnitude=9, random_erasing_probability=0.25, mixup_alpha=0.8, cutmix_alpha=1.0,
    ),
}  # fmt: skip


def load_recipe(name_or_file: str | os.PathLike[str]) -> Recipe:
    """Return a recipe by its name, or from a TOML file as `Recipe.to_toml` writes it; raises UsageError.

    A file may name the recipe that it starts from as `recipe = "deit"`, and say only what differs. The `config.toml` of
    a run is such a file.
    """
    if str(name_or_file) in RECIPES:
        return RECIPES[str(name_or_file)]
    if not Path(name_or_file).suffix:
        reason = f"no recipe is named {str(name_or_file)!r}"
        raise UsageError("cannot train", reason=reason, remedy=f"choose one of {', '.join(RECIPES)}, or a TOML file")
    values = _read(name_or_file)
    values.pop("start", None)
    base = values.pop("recipe", None)
    try:
        if base is not None and base not in RECIPES:
            raise ValueError(f"no recipe is named {base!r}; choose one of {', '.join(RECIPES)}")
        # A file that names no recipe is whole: what it leaves out is absent, as `to_toml` writes it.
        start = RECIPES[base] if base else Recipe(max_gradient_norm=None)
        return start.changed(values)
    except ValueError as error:
        raise _unusable(name_or_file, str(error)) from error


def load_start(file: str | os.PathLike[str]) -> dict[str, str]:
    """Return what the run of a `config.toml` started from: `arch` or `source`, `image_size`, `teacher`, as given."""
    start = _read(file).get("start", {})
    if not isinstance(start, dict) or not all(isinstance(value, str) for value in start.values()):
        raise _unusable(file, f"its [start] is {start!r}"[:200])
    return start


def _read(file: str | os.PathLike[str]) -> dict[str, Any]:
    data = read_file(file, what="recipe", max_bytes=_MAX_RECIPE_BYTES)
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _unusable(file, str(error)[:300]) from error


def _unusable(file: str | os.PathLike[str], reason: str) -> UsageError:
    remedy = "see `vit-edge train --show-recipe --recipe finetune`"
    return UsageError("cannot use the recipe", file=file, reason=reason, remedy=remedy)
