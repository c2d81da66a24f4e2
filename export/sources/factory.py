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
from vit_edge.errors import UsageError
from vit_edge.export.sources.torch_network import Given, TorchNetwork, settled_preprocessing
from vit_edge.export.sources.weights import load_weights

__all__ = ["is_factory", "make_network", "open_factory"]

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


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
        load_weights(network, weights)
    return network


def open_factory(source: str, given: Given) -> TorchNetwork:
    """Return the network of a factory with what the user specifies of it; raises what `make_network` raises."""
    preprocessing, assumed = settled_preprocessing(given.preprocessing, image_size=given.image_size)
    return TorchNetwork(
        module=make_network(source, weights=given.weights),
        name=source.partition(":")[2],
        preprocessing=preprocessing,
        labels=given.labels,
        activation=given.activation,
        assumed=assumed,
    )


def _called(factory: Any, source: str) -> object:
    try:
        made: object = factory()
    except (Exception, SystemExit) as error:  # whatever a factory raises
        reason = f"the factory fails: {type(error).__name__}: {error}"
        raise _unusable(source, reason, "give a factory that needs no arguments") from error
    return made


def _unusable(source: str, reason: str, remedy: str) -> UsageError:
    return UsageError("cannot make the network", file=source, reason=reason, remedy=remedy)
