"""A torch network from `package.module:factory` and a file of weights."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from vit_edge.errors import CheckpointRejected, UsageError
from vit_edge.files import read_file

__all__ = ["is_factory", "make_network"]

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_MAX_BYTES = 2**40
_NUM_NAMED = 5
# What training scripts put around a state dict.
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def is_factory(source: str) -> bool:
    """Return whether `source` reads as `package.module:factory` and no file has that name."""
    return _FACTORY.fullmatch(source) is not None and not Path(source).exists()


def make_network(source: str, *, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Return what the factory gives without arguments, with `weights` loaded: safetensors, or tensors of torch.save.

    This runs the code of the module named, found as Python finds it from the current folder. Raises UsageError where
    there is no such factory, CheckpointRejected where the weights do not fit exactly.
    """
    module_name, _, attribute = source.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - as Python itself puts it there
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _unusable(source, str(error), "give package.module:factory as Python would import it") from error
    network = found if isinstance(found, nn.Module) else _called(found, source)
    if not isinstance(network, nn.Module):
        raise _unusable(source, f"it gives {type(network).__name__}", "name something that gives a torch.nn.Module")
    if weights is not None:
        _load(network, weights)
    return network


def _called(factory: Any, source: str) -> object:
    try:
        made: object = factory()
    except Exception as error:  # whatever a factory raises
        reason = f"it fails: {type(error).__name__}: {error}"
        raise _unusable(source, reason, "give a factory that needs no arguments") from error
    return made


def _load(network: nn.Module, path: str | os.PathLike[str]) -> None:
    tensors = _read(path)
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())][:_NUM_NAMED]
    problems += [f"{name} is not expected" for name in sorted(tensors.keys() - expected.keys())][:_NUM_NAMED]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ][:_NUM_NAMED]
    if problems:
        reason = f"its weights do not fit the network: {'; '.join(problems)}"
        raise _rejected(path, reason, "take the weights of this very architecture")
    network.load_state_dict(tensors)


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    data = read_file(path, what="weights", max_bytes=_MAX_BYTES, error=CheckpointRejected)
    try:
        if data[:2] in (b"PK", b"\x80\x02"):
            # Tensors only: a pickle that would run code is refused.
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            found = load_safetensors(data)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = f"its weights cannot be read ({' '.join(str(error).split())[:200]})"
        raise _rejected(path, reason, "save them as safetensors where they were made") from error
    for name in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise _rejected(path, "it holds no state dict", "save module.state_dict()")
    return found


def _unusable(source: str, reason: str, remedy: str) -> UsageError:
    return UsageError("cannot make the network", file=source, reason=reason, remedy=remedy)


def _rejected(path: str | os.PathLike[str], reason: str, remedy: str) -> CheckpointRejected:
    return CheckpointRejected("cannot use the weights", file=path, reason=reason, remedy=remedy)
