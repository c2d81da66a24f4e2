"""Labels of images with several labels or values each: a label file with a column of names, or a column for each."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from vit_edge.data.folders import rejected
from vit_edge.data.label_files import column_name, read_rows
from vit_edge.data.labelled import is_below, label_file_of, read_labelled
from vit_edge.data.shards import find_shards

__all__ = ["Truths", "read_label_sets", "read_values"]

# Of each image one number for each label or output of the network.
Truths: TypeAlias = Mapping[Path, tuple[float, ...]]
_Read: TypeAlias = Callable[[Mapping[str, str]], tuple[float, ...]]
_SET_COLUMNS = ("labels", "label", "classes", "class", "tags", "categories", "category", "class_name")
_VALUE_COLUMNS = ("value", "label", "target", "score", "y")
_SEPARATORS = (r"[|;,]", r"\s+")
_PRESENT = 0.5


def read_label_sets(folder: str | os.PathLike[str], *, names: Sequence[str], splits: Sequence[str] = ()) -> Truths:
    """Return the images of `folder`, and 1 for each of the labels `names` that an image has; raises DataRejected.

    A label file has a column for each label (0 or 1), or one column of names between `|`, `;`, `,` or spaces; an image
    may have several rows. In class folders and shards an image has one label.
    """
    if not find_shards(folder):
        root, file = label_file_of(folder, splits=splits)
        if file is not None:
            return _read(root, file, lambda columns: _reader_of_sets(file, columns, names), are_sets=True)
    found = read_labelled(folder, splits=splits, class_names=names)
    return {
        path: tuple(float(number == label) for number in range(len(names)))
        for path, label in zip(found.paths, found.labels, strict=True)
    }


def read_values(folder: str | os.PathLike[str], *, names: Sequence[str], splits: Sequence[str] = ()) -> Truths:
    """Return the images of `folder` and the value of each output `names`; raises DataRejected.

    The label file has a column for each output; one output may also be in a column `value`, `label` or `target`.
    """
    if not find_shards(folder):
        root, file = label_file_of(folder, splits=splits)
        if file is not None:
            return _read(root, file, lambda columns: _reader_of_values(file, columns, names), are_sets=False)
    remedy = "write a labels.csv with the columns file and value"
    raise rejected(Path(folder), "the values of a regression come from a label file; there is none", remedy)


def _read(root: Path, file: Path, reader: Callable[[Sequence[str]], _Read], *, are_sets: bool) -> Truths:
    rows = [(path, row) for path, row in read_rows(file) if file.parent == root or is_below(path, root)]
    if not rows:
        raise rejected(file, "no image of the folder is in the file", "write one row for each image")
    read, found = reader([*rows[0][1]]), dict[str, tuple[Path, tuple[float, ...]]]()
    for path, row in rows:
        try:
            values = read(row)
        except ValueError as error:
            raise rejected(file, f"the row of {path.name!r}: {error}", "correct the row") from error
        key = os.path.normpath(path)
        before = found[key][1] if key in found else values
        if not are_sets and values != before:
            raise rejected(file, f"{path.name!r} has two values", "give each image one row")
        found[key] = (path, tuple(map(max, before, values)))
    return dict(sorted(found.values(), key=lambda pair: os.fsencode(pair[0])))


def _reader_of_sets(file: Path, columns: Sequence[str], names: Sequence[str]) -> _Read:
    own = [column_name(name) for name in names]
    if set(own) <= {*columns}:
        return lambda row: tuple(float(_number(row[name]) >= _PRESENT) for name in own)
    column = _first(file, columns, _SET_COLUMNS, "the labels")
    index = {str(number): number for number in range(len(names))}
    index |= {unicodedata.normalize("NFC", name): number for number, name in enumerate(names)}

    def read(row: Mapping[str, str]) -> tuple[float, ...]:
        present = {index[name] for name in _names_in(row[column], index)}
        return tuple(float(number in present) for number in range(len(names)))

    return read


def _reader_of_values(file: Path, columns: Sequence[str], names: Sequence[str]) -> _Read:
    own = [column_name(name) for name in names]
    if not set(own) <= {*columns}:
        if len(names) > 1:
            lacking = ", ".join(repr(name) for name, column in zip(names, own, strict=True) if column not in columns)
            raise rejected(file, f"the header has no column for {lacking}", "name a column for each output")
        own = [_first(file, columns, _VALUE_COLUMNS, "the value")]
    return lambda row: tuple(_number(row[name]) for name in own)


def _first(file: Path, columns: Sequence[str], known: Sequence[str], what: str) -> str:
    name = next((name for name in known if name in columns), None)
    if name is None:
        found = ", ".join(map(repr, columns))
        raise rejected(file, f"the header has no column for {what}; the columns are {found}", f"name one {known[0]}")
    return name


def _names_in(cell: str, index: Mapping[str, int]) -> list[str]:
    """Return the names in a cell, none if it is empty; raises ValueError if one is unknown."""
    if cell in index:
        return [cell]
    for separator in _SEPARATORS:
        parts = [part.strip() for part in re.split(separator, cell) if part.strip()]
        if all(part in index for part in parts):
            return parts
    unknown = next(part.strip() for part in re.split(_SEPARATORS[0], cell) if part.strip() not in index)
    raise ValueError(f"{unknown!r} is not a label of the model")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value
