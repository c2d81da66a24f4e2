"""What a job reads: images in folders and shards, and lists of URIs, each under a name that is unique in the job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.data import images_named
from vit_edge.errors import DataRejected, ImageRejected, MissingExtra, printable
from vit_edge.files import read_file, sha256_hex
from vit_edge.image import Limits

__all__ = ["JobInput", "find_inputs", "inputs_sha256", "read_input"]

_LIST_SUFFIX = ".txt"
_LIST_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class JobInput:
    """One image: its path, in a folder or a shard that all machines share, or its URI."""

    name: str
    source: Path | str


def find_inputs(sources: Sequence[str | os.PathLike[str]]) -> tuple[JobInput, ...]:
    """Return the images of folders, shards, patterns, files, and `.txt` lists of URIs; raises DataRejected.

    An image that two sources name is there once.
    """
    found: dict[str, JobInput] = {}
    for source in sources:
        for item in _found(source):
            found.setdefault(item.name, item)
    return tuple(found.values())


def read_input(item: JobInput, limits: Limits | None = None) -> bytes:
    """Return the bytes of an image; raises ImageRejected with the reason."""
    most = (limits or Limits.default()).max_file_bytes
    if isinstance(item.source, Path):
        return read_file(item.source, what="image", max_bytes=most, error=ImageRejected)
    try:
        with _fsspec().open(item.source, "rb") as file:
            data: bytes = file.read(most + 1)
    except MissingExtra:
        raise
    except Exception as error:  # each file system of fsspec has its own errors
        raise _unreadable(item, f"{type(error).__name__}: {str(error)[:200]}") from error
    if len(data) > most:
        raise _unreadable(item, f"the file has more than {most:,} bytes")
    return data


def inputs_sha256(inputs: Sequence[JobInput]) -> str:
    """Return one hash of the names in their order: a job goes on only with the inputs that it began with."""
    return sha256_hex("\n".join(item.name for item in inputs).encode("utf-8", "surrogateescape"))


def _found(source: str | os.PathLike[str]) -> Sequence[JobInput]:
    text = os.fspath(source)
    if "://" in text:
        return [JobInput(name=text, source=text)]
    if text.lower().endswith(_LIST_SUFFIX):
        data = read_file(text, what="list of URIs", max_bytes=_LIST_BYTES, error=DataRejected)
        lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
        return [item for line in lines if line for item in _line(line, Path(text).parent)]
    path = Path(text).absolute()
    images = images_named(path)
    if images == (path,) and not path.exists():
        raise DataRejected("cannot start the job", file=path, reason="no such file or folder", remedy="check the path")
    return [JobInput(name=printable(one), source=one) for one in images]


def _line(line: str, folder: Path) -> Sequence[JobInput]:
    """Return the image of one line: a URI, or a path relative to the folder of the list."""
    if "://" in line:
        return [JobInput(name=line, source=line)]
    path = (folder / line).absolute()
    return [JobInput(name=printable(path), source=path)]


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        remedy = 'pip install "vit-edge[ray]"'
        raise MissingExtra("cannot read URIs", reason="URIs need fsspec", remedy=remedy) from error
    return fsspec


def _unreadable(item: JobInput, reason: str) -> ImageRejected:
    return ImageRejected("cannot read the image", file=item.name, reason=reason, remedy="check the URI")
