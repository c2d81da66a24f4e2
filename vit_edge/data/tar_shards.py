"""Tar shards by the naming of WebDataset: `key.jpg` with its label in `key.cls` or `key.json`, files of a key in a row.

Only the headers are read; an image is read from its place in the archive when it is needed. So an archive must be
uncompressed, and it must hold plain files only: links, devices and paths that lead out of it are refused.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vit_edge.data.folders import SUFFIXES, is_passed_over, rejected
from vit_edge.files import PackedFile

__all__ = ["LabelledPath", "read_tar"]

# An image, and the text of its label; None if the archive has none for it.
LabelledPath = tuple[Path, str | None]
_MOST_LABEL_BYTES = 1_000_000
_JSON_KEYS = ("cls", "label", "class", "class_name")


@dataclass(frozen=True, kw_only=True, slots=True)
class _TarPart:
    """Bytes from `offset` on."""

    offset: int
    size_bytes: int

    def read(self, archive: Path) -> bytes:
        with archive.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size_bytes)
        if len(data) != self.size_bytes:
            raise ValueError("the archive is shorter than when it was opened")
        return data


@dataclass(kw_only=True, slots=True)
class _Sample:
    """The files of one key."""

    key: str
    image: PackedFile | None = None
    label: str | None = None
    endings: set[str] = field(default_factory=set)


def read_tar(archive: Path) -> list[LabelledPath]:
    """Return the images of a tar archive in its order, with their labels; raises DataRejected."""
    found: list[LabelledPath] = []
    seen: set[str] = set()
    current = _Sample(key="")
    for key, ending, member, tar in _members(archive):
        if key != current.key:
            if key in seen:
                raise _refused(archive, f"the key {key!r} is there twice", "give every image its own key")
            seen.add(key)
            found += _finished(current)
            current = _Sample(key=key)
        _add(current, ending, member, tar, archive)
    return found + _finished(current)


def _members(archive: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Yield key, ending, header and archive of each file; none of the headers is kept."""
    try:
        size_bytes = archive.stat().st_size
        with tarfile.open(archive, "r:") as tar:
            if tar.firstmember is None:  # type: ignore[attr-defined] # Python 3.10 would look in front of the file
                return
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # else they pile up
                if member.isdir():
                    continue
                _check_member(archive, member, size_bytes)
                name = member.name.removeprefix("./")
                folder, _, base = name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not is_passed_over(base) and stem:
                    yield f"{folder}/{stem}" if folder else stem, ending.lower(), member, tar
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # headers may hold any number
        reason = f"the file is not an uncompressed tar archive, or it is damaged ({error})"
        raise _refused(archive, reason, "write it again without compression") from error
    except OSError as error:
        raise _refused(archive, (error.strerror or str(error)).lower(), "check the path") from error


def _check_member(archive: Path, member: tarfile.TarInfo, size_bytes: int) -> None:
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "not a plain file"
        raise _refused(archive, f"{member.name!r} is {kind}", "write plain files only")
    if member.name.startswith(("/", "\\")) or ".." in member.name.split("/") or "\0" in member.name:
        raise _refused(archive, f"the name {member.name!r} leads out of the archive", "write relative names")
    if member.size < 0:  # the next header would be read from before this one, for ever
        raise _refused(archive, f"{member.name!r} has {member.size:,} bytes", "copy or write it again")
    if member.offset_data + member.size > size_bytes:
        reason = f"the archive ends before {member.name!r} does, which has {member.size:,} bytes"
        raise _refused(archive, reason, "copy or write it again")


def _add(sample: _Sample, ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile, archive: Path) -> None:
    if ending in sample.endings:
        raise _refused(archive, f"the file {member.name!r} is there twice", "give every image its own key")
    sample.endings.add(ending)
    if f".{ending}" in SUFFIXES:
        if sample.image is not None:
            names = f"{sample.image.name!r} and {member.name!r}"
            raise _refused(archive, f"the key {sample.key!r} has two images, {names}", "give every image its own key")
        part = _TarPart(offset=member.offset_data, size_bytes=member.size)
        sample.image = PackedFile.of(archive, member.name, part)
    elif ending in ("cls", "json"):
        if member.size > _MOST_LABEL_BYTES:
            reason = f"{member.name!r} has {member.size:,} bytes; a label has at most {_MOST_LABEL_BYTES:,}"
            raise _refused(archive, reason, "write the label alone into it")
        file = tar.extractfile(member)
        label = _label(file.read() if file else b"", ending, member.name, archive)
        sample.label = label if ending == "cls" or sample.label is None else sample.label


def _label(data: bytes, ending: str, name: str, archive: Path) -> str | None:
    try:
        text = data.decode("utf-8").strip()
        if ending == "cls":
            return text
        values = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise _refused(archive, f"{name!r} cannot be read ({error})", "write it in UTF-8") from error
    found = [values[key] for key in _JSON_KEYS if key in values] if isinstance(values, dict) else []
    return str(found[0]) if found and isinstance(found[0], str | int) else None


def _finished(sample: _Sample) -> list[LabelledPath]:
    return [] if sample.image is None else [(sample.image, sample.label)]


def _refused(archive: Path, reason: str, remedy: str) -> Exception:
    return rejected(archive, reason, remedy)
