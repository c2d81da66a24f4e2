"""What is told of an ONNX classifier made elsewhere: its class names and its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from vit_edge.errors import InputError

__all__ = ["read_told", "third_party_options"]

_PATH = click.Path(path_type=Path)
_MAX_BYTES = 1_000_000
_Function = TypeVar("_Function", bound=Callable[..., Any])


def third_party_options(function: _Function) -> _Function:
    """Give a command `--labels` and `--preprocessing`."""
    what = "JSON: resize, crop, interpolation, mean, std, for an ONNX file made elsewhere."
    more = click.option("--preprocessing", type=_PATH, metavar="FILE", help=what)
    named = "Class names, for an ONNX file made elsewhere."
    labels = click.option("--labels", type=_PATH, metavar="FILE|DIR", help=named)
    return labels(more(function))


def read_told(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `labels` and the `preprocessing` that were given, as `load` takes them; raises InputError."""
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.files import read_file

    told: dict[str, Any] = {}
    if values["labels"] is not None:
        told["labels"] = read_labels(values["labels"])
    path = values["preprocessing"]
    if path is not None:
        data = read_file(path, what="preprocessing", max_bytes=_MAX_BYTES)
        try:
            told["preprocessing"] = dict(json.loads(data))
        except (TypeError, ValueError, RecursionError) as error:
            remedy = "write a JSON object with resize, crop, interpolation, mean and std"
            raise InputError("cannot read the preprocessing", file=path, reason=str(error), remedy=remedy) from error
    return told
