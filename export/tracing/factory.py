"""A torch network from `package.module:factory` and a file of weights."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from vit_edge.conversion.hub import HUBS
from vit_edge.conversion.preprocessing.knowledge import IMAGENET, Facts, Geometry
from vit_edge.conversion.preprocessing.settings import preprocessing_facts, read_settings
from vit_edge.conversion.weights_file import read_weights
from vit_edge.errors import CheckpointRejected, UsageError, printable
from vit_edge.image import Preprocessing

__all__ = ["factory_preprocessing", "is_factory", "make_network"]

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_NUM_NAMED = 5
# What most classifiers are trained and evaluated with, unless specified otherwise.
_SIDE, _CROP_FRACTION = 224, 0.875


def is_factory(source: str) -> bool:
    """Return whether `source` reads as `package.module:factory`, is no hub's name (`timm:NAME`) and no file."""
    is_hub = source.partition(":")[0] in HUBS
    return _FACTORY.fullmatch(source) is not None and not is_hub and not Path(source).exists()


def make_network(source: str, *, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Return what the factory gives without arguments, with `weights` loaded from any file that `convert` reads.

    This runs the code of the module named, found as Python finds it from the current folder. Raises UsageError if
    there is no such factory, CheckpointRejected if the weights do not fit exactly.
    """
    module_name, _, attribute = source.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - as Python itself puts it there
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # the code of whoever wrote the module
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise _unusable(source, reason, "give package.module:factory as Python would import it") from error
    network = found if isinstance(found, nn.Module) else _called(found, source)
    if not isinstance(network, nn.Module):
        raise _unusable(source, f"the factory gives {type(network).__name__}", "name a factory of a torch.nn.Module")
    if weights is not None:
        _load(network, weights)
    return network


def factory_preprocessing(
    path: str | os.PathLike[str] | None, *, image_size: tuple[int, int] | None = None
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the settings in a file (as `vit-edge convert` takes them) for a network, and what of them is assumed.

    Raises InputError or UsageError.
    """
    origin = "nobody" if path is None else printable(path)
    specified = Facts(origin=origin) if path is None else preprocessing_facts(read_settings(path), origin=origin)
    geometry = specified.geometry or Geometry(fraction=_CROP_FRACTION)
    size = image_size or specified.input_size or specified.image_size or geometry.crop
    values = {"crop": size, "resize": specified.geometry}
    values |= {name: getattr(specified, name) for name in ("interpolation", "mean", "std")}
    size = size or (_SIDE, _SIDE)
    try:
        preprocessing = geometry.preprocessing(
            size,
            interpolation=specified.interpolation or "bicubic",  # type: ignore[arg-type]  # checked there
            mean=specified.mean or IMAGENET[0],
            std=specified.std or IMAGENET[1],
        )
    except ValueError as error:
        remedy = "correct the file of --preprocessing, or --image-size"
        raise UsageError("cannot use the preprocessing", file=path, reason=str(error), remedy=remedy) from error
    return preprocessing, tuple(f"preprocessing.{name}" for name, value in values.items() if value is None)


def _called(factory: Any, source: str) -> object:
    try:
        made: object = factory()
    except (Exception, SystemExit) as error:  # whatever a factory raises
        reason = f"the factory fails: {type(error).__name__}: {error}"
        raise _unusable(source, reason, "give a factory that needs no arguments") from error
    return made


def _load(network: nn.Module, path: str | os.PathLike[str]) -> None:
    tensors = read_weights(path).tensors
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())][:_NUM_NAMED]
    problems += [f"{name} is not expected" for name in sorted(tensors.keys() - expected.keys())][:_NUM_NAMED]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ][:_NUM_NAMED]
    if problems:
        reason = f"the weights do not fit the network: {'; '.join(problems)}"
        raise _rejected(path, reason, "give weights of exactly this architecture")
    network.load_state_dict(tensors)


def _unusable(source: str, reason: str, remedy: str) -> UsageError:
    return UsageError("cannot make the network", file=source, reason=reason, remedy=remedy)


def _rejected(path: str | os.PathLike[str], reason: str, remedy: str) -> CheckpointRejected:
    return CheckpointRejected("cannot use the weights", file=path, reason=reason, remedy=remedy)
