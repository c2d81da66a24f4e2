"""The Parquet shards of a job: one row for each image, and in the metadata who computed them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vit_edge.errors import DataRejected, require

__all__ = ["Origin", "read_origin", "read_rows", "shard_path", "to_parquet"]

_KEY = b"vit_edge.origin"
_DAMAGED = "delete the shard and run the job again with --resume"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Who computed a shard, of how many images and errors, and in how many seconds.

    `worker` is the process, `node` the machine: its name and the first 8 characters of its number in the cluster.
    """

    shard: int
    images: int
    errors: int
    seconds: float
    worker: str
    node: str
    cpu: str
    instruction_set: str
    engine: str


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"part-{shard:06d}.parquet"


def to_parquet(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, int | None], origin: Origin) -> bytes:
    """Return a shard; a column is text, or if it has a width numbers: float64 for width 1, else that many float32."""
    arrow, parquet = _arrow()
    metadata = {_KEY: json.dumps(asdict(origin)).encode()}
    schema = arrow.schema([(name, _type(arrow, width)) for name, width in columns.items()], metadata=metadata)
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows], schema=schema), buffer)
    return buffer.getvalue()


def read_origin(path: Path) -> Origin:
    """Return who computed a shard, without its rows; raises DataRejected if the file is damaged."""
    _, parquet = _arrow()
    try:
        return Origin(**json.loads(parquet.read_schema(path).metadata[_KEY]))
    except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataRejected("cannot read the shard", file=path, reason=str(error)[:200], remedy=_DAMAGED) from error


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return these columns of a shard row by row, numbers as NumPy has them; raises DataRejected if it is damaged."""
    _, parquet = _arrow()
    try:
        table = parquet.read_table(path, columns=list(columns))
    except (OSError, ValueError) as error:
        raise DataRejected("cannot read the shard", file=path, reason=str(error)[:200], remedy=_DAMAGED) from error
    values = [table[name].to_numpy(zero_copy_only=False) for name in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _type(arrow: Any, width: int | None) -> Any:
    if width is None:
        return arrow.string()
    return arrow.float64() if width == 1 else arrow.list_(arrow.float32(), width)


def _arrow() -> tuple[Any, Any]:
    what = "read or write the results"
    return require("pyarrow", extra="ray", what=what), require("pyarrow.parquet", extra="ray", what=what)
