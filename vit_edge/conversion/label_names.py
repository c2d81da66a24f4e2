"""The names of a network's classes, in its order, from text, JSON or class folders; no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_edge.data import read_class_names
from vit_edge.errors import InputError
from vit_edge.files import read_file

__all__ = ["labels_of", "read_labels"]

_MAX_BYTES = 20_000_000
# What transformers writes if the classes have no names.
_NOBODYS = re.compile(r"LABEL_\d+")


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the class names of a text file (one a line), a JSON list or id2label, or a folder of class folders.

    Class folders count in sorted order, as torchvision's ImageFolder takes them. Raises InputError.
    """
    source = Path(path)
    if source.is_dir():
        return read_class_names(source)
    data = read_file(source, what="labels", max_bytes=_MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        names = labels_of(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else _lines(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _rejected(source, str(error), "write one name a line, as UTF-8, or a JSON list") from error
    if not names:
        raise _rejected(source, "the file holds no name", "write one name a line, as UTF-8, or a JSON list")
    return names


def labels_of(values: Any) -> tuple[str, ...] | None:
    """Return the names in a JSON value: a list, index to name, or a configuration with either; ValueError.

    None where the names are those that a library makes up ("LABEL_0").
    """
    if isinstance(values, Mapping):
        for key in ("id2label", "label_names", "labels"):
            if isinstance(values.get(key), Mapping | list):
                return labels_of(values[key])
        values = _in_order(values)
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError("the names of the classes have to be a list of texts, or index to text")
    return None if values and all(_NOBODYS.fullmatch(name) for name in values) else tuple(values)


def _in_order(values: Mapping[Any, Any]) -> list[Any]:
    """Return the values of index -> name, or the keys of name -> index, in the order of the indices."""
    if values and all(isinstance(index, int) and not isinstance(index, bool) for index in values.values()):
        values = {index: name for name, index in values.items()}
    try:
        named = {int(index): name for index, name in values.items()}
    except (TypeError, ValueError) as error:
        raise ValueError("the keys are no indices of classes") from error
    if sorted(named) != list(range(len(values))):
        raise ValueError(f"the indices of {len(values)} classes are not 0 to {len(values) - 1}")
    return [named[index] for index in range(len(named))]


def _lines(text: str) -> tuple[str, ...]:
    lines = text.rstrip().splitlines()
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise ValueError(f"line {empty} is empty")
    return tuple(line.strip() for line in lines)


def _rejected(path: Path, reason: str, remedy: str) -> InputError:
    return InputError("cannot use the labels", file=path, reason=reason, remedy=remedy)
