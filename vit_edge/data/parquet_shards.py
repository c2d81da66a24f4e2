"""Parquet shards as Hugging Face stores data sets: a column `image` of {bytes, path}, and a column `label`.

The labels are read when a shard is opened; an image is read with its row group when it is needed, and the last row
groups are kept. Memory is that of a few row groups.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.data.folders import rejected
from vit_edge.data.tar_shards import LabelledPath
from vit_edge.errors import MissingExtra
from vit_edge.files import PackedFile

__all__ = ["MOST_IMAGES", "read_parquet"]

_IMAGE_COLUMNS = ("image", "img", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")
_ROW_GROUPS_KEPT = 4
# A row group is read whole: that of a usual data set has a hundred to a thousand images.
_MOST_ROW_GROUP_BYTES = 2**31
MOST_IMAGES = 10_000_000
# What pyarrow raises on damaged files: its own errors are subclasses of these.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ParquetPart:
    """One row of a row group; `size_bytes` is 0, as it is known only when the row is read."""

    column: str
    row_group: int
    row: int
    size_bytes: int = 0

    def read(self, archive: Path) -> bytes:
        try:
            value = _row_group(archive, self.column, self.row_group)[self.row].as_py()
        except _DAMAGED as error:
            raise ValueError(f"the row cannot be read ({_said(error)})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the row holds no bytes of an image")
        return data


def read_parquet(archive: Path) -> list[LabelledPath]:
    """Return the images of a Parquet file, and the label of each or None; raises DataRejected, MissingExtra."""
    parquet = _pyarrow_parquet()
    try:
        return _rows(parquet.ParquetFile(archive), archive)
    except _DAMAGED as error:
        reason = f"the file is not Parquet, or it is damaged ({_said(error)})"
        raise rejected(archive, reason, "copy or write it again") from error


def _rows(file: Any, archive: Path) -> list[LabelledPath]:
    names = list(file.schema_arrow.names)
    image, label = _column(names, _IMAGE_COLUMNS), _column(names, _LABEL_COLUMNS)
    if image is None:
        reason = f"the file has no column {' or '.join(_IMAGE_COLUMNS)}; its columns are {', '.join(names)}"
        raise rejected(archive, reason, "name the column of the images so")
    _check_sizes(file.metadata, archive)
    titles = _class_names(file, label)
    found: list[LabelledPath] = []
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        labels = [None] * count if label is None else file.read_row_group(group, columns=[label])[label].to_pylist()
        for row, value in enumerate(labels):
            part = _ParquetPart(column=image, row_group=group, row=row)
            found.append((PackedFile.of(archive, f"{len(found):08d}", part), _text(value, titles)))
    return found


def _check_sizes(metadata: Any, archive: Path) -> None:
    """Raise DataRejected before more is read than a data set of images has."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    counts = [group.num_rows for group in groups]
    if min(counts, default=0) < 0 or sum(counts) > MOST_IMAGES:
        reason = f"the file says that it has {sum(counts):,} rows; at most {MOST_IMAGES:,} are read"
        raise rejected(archive, reason, "divide it into several files")
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > _MOST_ROW_GROUP_BYTES:
        reason = f"a row group has {largest:,} bytes; at most {_MOST_ROW_GROUP_BYTES:,} are read at once"
        raise rejected(archive, reason, "write it with smaller row groups, such as 100 images")


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@functools.lru_cache(maxsize=_ROW_GROUPS_KEPT)
def _row_group(archive: Path, column: str, group: int) -> Any:
    return _pyarrow_parquet().ParquetFile(archive).read_row_group(group, columns=[column])[column]


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        reason, remedy = "Parquet files need pyarrow", 'pip install "vit-edge[parquet]"'
        raise MissingExtra("cannot read the images", reason=reason, remedy=remedy) from error
    return parquet


def _column(names: list[str], known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in names), None)


def _class_names(file: Any, label: str | None) -> list[str]:
    """Return the names of the classes that Hugging Face keeps in the metadata of the schema; none if there are none."""
    metadata = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(metadata)["info"]["features"][label]["names"] if metadata else []
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _text(value: Any, titles: list[str]) -> str | None:
    if isinstance(value, int) and 0 <= value < len(titles):
        return titles[value]
    return str(value) if isinstance(value, int | str) else None
