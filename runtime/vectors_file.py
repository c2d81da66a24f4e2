"""A file of vectors, written batch by batch: NumPy's `.npy` with the names of the images next to it, or Parquet.

Rows go to a temporary file first, for the finished one begins with their number or appears whole. Memory holds one
batch.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from vit_edge.errors import UsageError, require
from vit_edge.files import may_write, room_for, temporary_folder, write_atomic
from vit_edge.model_file.paired_files import write_together
from vit_edge.runtime.engines.protocol import Array

__all__ = ["VectorsFile", "open_vectors"]

_CHUNK_BYTES = 2**20


class VectorsFile(Protocol):
    """Vectors on their way to a file: `files` are those that `finish` writes."""

    files: tuple[Path, ...]

    def add(self, names: Sequence[str], vectors_BD: Array) -> None:
        """Append one row for each image: its name and its vector."""
        ...

    def finish(self) -> int:
        """Write the files, whole or not at all, and return the number of vectors."""
        ...


@contextmanager
def open_vectors(
    out: str | os.PathLike[str], *, width: int, force: bool = False, made_from: str | os.PathLike[str] | None = None
) -> Iterator[VectorsFile]:
    """Give a file to add vectors to; without `finish` nothing is written.

    The suffix of `out` decides: `.npy` is float32 [images, width], and a `.txt` next to it has the name of each image
    in one line; `.parquet` has the columns `file` and `vector`. Raises UsageError for other suffixes and existing
    files, MissingExtra if Parquet cannot be written here.
    """
    target = may_write(out, force=force, made_from=made_from)
    kinds: dict[str, type[_Npy | _Parquet]] = {".npy": _Npy, ".parquet": _Parquet}
    kind = kinds.get(target.suffix.lower())
    if kind is None:
        reason = f"the suffix is {target.suffix or 'missing'}"
        raise UsageError("cannot write the vectors", file=out, reason=reason, remedy="name it .npy or .parquet")
    if kind is _Npy:
        may_write(target.with_suffix(".txt"), force=force, made_from=made_from)
    with room_for(target), temporary_folder(next_to=target) as folder:
        vectors = kind(target, Path(folder), width)
        try:
            yield vectors
        finally:
            vectors.close()


class _Npy:
    """Raw rows in a temporary file; the header, which has their number, is put before them at the end."""

    def __init__(self, target: Path, folder: Path, width: int) -> None:
        self.files: tuple[Path, ...] = (target, target.with_suffix(".txt"))
        self._width, self._count = width, 0
        self._rows, self._names = (folder / "rows").open("w+b"), (folder / "names").open("w+b")

    def add(self, names: Sequence[str], vectors_BD: Array) -> None:
        self._count += len(names)
        self._rows.write(np.ascontiguousarray(vectors_BD, dtype="<f4").tobytes())
        self._names.write("".join(f"{name}\n" for name in names).encode())

    def finish(self) -> int:
        header = io.BytesIO()
        fields = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self._width)}
        write_header: Any = np.lib.format.write_array_header_1_0  # it has no types in numpy 2.2
        write_header(header, fields)
        rows = _chunks(self._rows, first=header.getvalue())
        write_together({self.files[1]: _chunks(self._names), self.files[0]: rows})
        return self._count

    def close(self) -> None:
        self._rows.close()
        self._names.close()


class _Parquet:
    """A row group for each batch, written by pyarrow."""

    def __init__(self, target: Path, folder: Path, width: int) -> None:
        what = "write Parquet"
        self._arrow = require("pyarrow", extra="parquet", what=what)
        parquet = require("pyarrow.parquet", extra="parquet", what=what)
        self.files: tuple[Path, ...] = (target,)
        self._width, self._count, self._path = width, 0, folder / "rows.parquet"
        vector = self._arrow.list_(self._arrow.float32(), width)
        self._schema = self._arrow.schema([("file", self._arrow.string()), ("vector", vector)])
        self._writer: Any = parquet.ParquetWriter(self._path, self._schema)

    def add(self, names: Sequence[str], vectors_BD: Array) -> None:
        self._count += len(names)
        flat = self._arrow.array(np.ascontiguousarray(vectors_BD, dtype=np.float32).reshape(-1))
        vectors = self._arrow.FixedSizeListArray.from_arrays(flat, self._width)
        self._writer.write_table(self._arrow.table([self._arrow.array(list(names)), vectors], schema=self._schema))

    def finish(self) -> int:
        self._writer.close()
        with self._path.open("rb") as rows:
            write_atomic(self.files[0], _chunks(rows))
        return self._count

    def close(self) -> None:
        self._writer.close()


def _chunks(file: IO[bytes], *, first: bytes = b"") -> Iterator[bytes]:
    yield first
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
