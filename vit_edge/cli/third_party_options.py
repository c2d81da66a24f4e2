"""The options for a third-party ONNX model: its class names and its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from vit_edge.cli.options import option_group
from vit_edge.errors import InputError

__all__ = ["read_third_party_options", "third_party_options"]

_PATH = click.Path(path_type=Path)
_MAX_BYTES = 1_000_000
_Function = TypeVar("_Function", bound=Callable[..., Any])


def third_party_options(function: _Function) -> _Function:
    """Give a command `--labels` and `--preprocessing`."""
    what = "JSON file with the preprocessing of a third-party ONNX model: resize, crop, interpolation, mean, std."
    more = click.option("--preprocessing", type=_PATH, metavar="FILE", help=what)
    named = "Class names of a third-party ONNX model."
    labels = click.option("--labels", type=_PATH, metavar="FILE|DIR", help=named)
    decorated: _Function = option_group("Third-party ONNX models", labels, more)(function)
    return decorated


def read_third_party_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `labels` and `preprocessing` as `load` takes them; raises InputError."""
    from vit_edge.conversion.label_names import read_labels
    from vit_edge.files import read_file

    found: dict[str, Any] = {}
    if values["labels"] is not None:
        found["labels"] = read_labels(values["labels"])
    path = values["preprocessing"]
    if path is not None:
        data = read_file(path, what="preprocessing", max_bytes=_MAX_BYTES)
        try:
            found["preprocessing"] = dict(json.loads(data))
        except (TypeError, ValueError, RecursionError) as error:
            remedy = "write a JSON object with resize, crop, interpolation, mean and std"
            raise InputError("cannot read the preprocessing", file=path, reason=str(error), remedy=remedy) from error
    return found
