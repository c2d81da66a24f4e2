"""A torch network that is traced as it is, with its preprocessing and labels, and what of them is assumed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vit_edge.conversion.preprocessing.knowledge import IMAGENET, Facts, Geometry, Knowledge
from vit_edge.conversion.preprocessing.settings import preprocessing_facts, read_settings
from vit_edge.errors import UsageError, printable
from vit_edge.image import Preprocessing
from vit_edge.model_file.tasks import Activation, Task

__all__ = ["Given", "TorchNetwork", "in_rgb", "settled_preprocessing", "unit_length"]

# The usual settings of classifiers, if none are specified.
_SIDE, _CROP_FRACTION = 224, 0.875
# float32 still squares it; vectors of networks are far longer.
_SHORTEST = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What the user specifies of a network; each counts more than what a library or a file says."""

    preprocessing: str | os.PathLike[str] | None = None
    labels: tuple[str, ...] | None = None
    image_size: tuple[int, int] | None = None
    activation: Activation | None = None
    weights: str | os.PathLike[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchNetwork:
    """A classifier that is no ViT of ours: the module maps normalised float32 NCHW images to logits.

    `labels` None stands for the numbers of the classes, `task` None for what the activation and the number of values
    say; `source` is kept in the model file.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None
    activation: Activation | None = None
    task: Task | None = None
    assumed: tuple[str, ...] = ()
    license: str | None = None
    base_model: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)


def settled_preprocessing(
    path: str | os.PathLike[str] | None,
    *,
    image_size: tuple[int, int] | None = None,
    facts: Sequence[Facts] = (),
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing of a network and what of it is assumed; raises InputError or UsageError.

    The file `path` (as `vit-edge convert` takes it) counts first, then `facts` in their order, then the usual settings.
    """
    if path is not None:
        facts = (preprocessing_facts(read_settings(path), origin=printable(path)), *facts)
    known = Knowledge(facts=tuple(facts))
    geometry = known.value("geometry") or Geometry(fraction=_CROP_FRACTION)
    size = image_size or next(filter(None, map(_size, facts)), None)
    values = {"crop": size, "resize": known.value("geometry")}
    values |= {name: known.value(name) for name in ("interpolation", "mean", "std")}
    try:
        preprocessing = geometry.preprocessing(
            size or (_SIDE, _SIDE),
            interpolation=values["interpolation"] or "bicubic",
            mean=values["mean"] or IMAGENET[0],
            std=values["std"] or IMAGENET[1],
        )
    except ValueError as error:
        remedy = "correct the file of --preprocessing, or --image-size"
        raise UsageError("cannot use the preprocessing", file=path, reason=str(error), remedy=remedy) from error
    return preprocessing, tuple(f"preprocessing.{name}" for name, value in values.items() if value is None)


def _size(facts: Facts) -> tuple[int, int] | None:
    return facts.input_size or facts.image_size or (facts.geometry.crop if facts.geometry else None)


def in_rgb(module: nn.Module, facts: Sequence[Facts]) -> nn.Module:
    """Return a network of BGR images as the same function of RGB images."""
    return _Flipped(module).eval() if Knowledge(facts=tuple(facts)).value("bgr") else module


def unit_length(vectors_BD: Tensor) -> Tensor:
    """Return the vectors divided by their length, as `torch.nn.functional.normalize` does."""
    lengths_B1: Tensor = torch.linalg.vector_norm(vectors_BD, dim=-1, keepdim=True)
    return vectors_BD / lengths_B1.clamp_min(_SHORTEST)


class _Flipped(nn.Module):
    """A network whose library turns RGB into BGR before it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", torch.tensor([2, 1, 0]), persistent=False)

    def forward(self, images_NCHW: Tensor) -> Any:
        return self.network(images_NCHW.index_select(1, self.get_buffer("order")))
