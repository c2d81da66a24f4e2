"""The record of a deployment: every input and output by its hash, every path relative to the record."""

from __future__ import annotations

import datetime
import glob
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import vit_edge
from vit_edge.data.shards import find_shards
from vit_edge.errors import InputError, printable
from vit_edge.files import finite, read_file, sha256_hex, write_atomic
from vit_edge.machine.cpu import cpu_name, instruction_set, usable_threads
from vit_edge.model_file.fields import Shape, check_fields
from vit_edge.progress import Progress, silent

__all__ = [
    "FLOAT32_FILE",
    "INT8_FILE",
    "RECORD_FILE",
    "SCHEMA",
    "content_sha256",
    "file_sha256",
    "folder_sha256",
    "machine",
    "made_with",
    "read_record",
    "relative",
    "speed_of",
    "verification_of",
    "versions",
    "write_record",
]

SCHEMA = 1
FLOAT32_FILE, INT8_FILE, RECORD_FILE = "model.onnx", "model.int8.onnx", "record.json"
_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "numpy", "Pillow", "scipy")
_MAX_RECORD_BYTES = 20_000_000
_REMEDY = "give the record.json of a deployment"
_KEYS = {"schema", "files", "folders", "images", "steps"}
_NUMBER = (int, float, type(None))
_VERIFICATION: Shape = {"verification": {"engines": [dict]}}
_ASKED: Shape = {"max_drop_points": _NUMBER, "min_agreement": _NUMBER, "unlabelled": bool}
_QUANTIZE: Shape = {"inputs": {"options": _ASKED}, "result": _VERIFICATION}
# What is read of a record before the files are verified again.
_SHAPE: Shape = {
    "schema": int,
    "files": {str: str},
    "folders": {"data": str},
    "images": {"data": str},
    "steps": {"quantize": _QUANTIZE, "speed?": dict},
    "check?": _VERIFICATION,
}


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a record; raises InputError if the file is no record, or has a later schema."""
    data = read_file(path, what="record", max_bytes=_MAX_RECORD_BYTES)
    try:
        record = json.loads(data)
        if not isinstance(record, dict) or not record.keys() >= _KEYS:
            raise ValueError("the file is not a record of `vit-edge deploy`")
        check_fields(record, _SHAPE, path="record")
        if record["schema"] > SCHEMA:
            raise ValueError(f"the record has schema {record['schema']}; this vit-edge reads {SCHEMA}")
        if not set(record["files"]) <= {FLOAT32_FILE, INT8_FILE}:
            raise ValueError("the record names other files than a deployment has")
    except (ValueError, RecursionError) as error:
        raise InputError("cannot use the record", file=path, reason=str(error)[:200], remedy=_REMEDY) from error
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of the deployment in `folder`."""
    text = json.dumps(finite(record), indent=1, sort_keys=True, default=str) + "\n"
    write_atomic(folder / RECORD_FILE, text.encode())


def verification_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the latest verification in a record: that of its last check, or of the deployment."""
    found: Mapping[str, Any] = record.get("check", record["steps"]["quantize"]["result"])["verification"]
    return found


def speed_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the latest measurement of speed in a record, with `engines` and `noise`; None if there is none."""
    if "check" in record:
        found: Mapping[str, Any] | None = record["check"]["speed"]
        return found
    return record["steps"]["speed"]["result"] if "speed" in record["steps"] else None


def made_with() -> dict[str, Any]:
    """Return when and with what something is made: date, versions, machine."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "vit_edge": vit_edge.__version__, "versions": versions(), **machine()}


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide on bytes and figures."""
    return {name: metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """Return what of this machine decides on bytes and figures."""
    return {"cpu": cpu_name(), "instruction_set": instruction_set(), "usable_threads": usable_threads()}


def relative(path: str | os.PathLike[str], folder: Path) -> str:
    """Return a path as a record keeps it, relative to the record's folder; what is no path here stays as it is."""
    if not os.path.lexists(path) and not glob.has_magic(os.fspath(path)):
        return printable(path)
    return printable(Path(os.path.relpath(path, folder)).as_posix())


def folder_sha256(folder: str | os.PathLike[str], *, option: str = "--data", progress: Progress = silent) -> str:
    """Return one hash of the names and bytes of all files below a folder, or of shards; links to files are followed."""
    root, parts = Path(folder), list[str]()
    found = [path for path in sorted(root.rglob("*")) if path.is_file()] if root.is_dir() else find_shards(root)
    if not found and not root.is_dir():
        reason, remedy = "there is no such folder", f"give the folder or the shards of the images with {option}"
        raise InputError("cannot read the images", file=folder, reason=reason, remedy=remedy)
    for number, path in enumerate(found):
        progress(f"hashing {root.name}", number, len(found))
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        parts.append(f"{name}\0{file_sha256(path)}")
    progress(f"hashing {root.name}", len(found), len(found))
    return sha256_hex("\n".join(parts).encode("utf-8", errors="surrogateescape"))


def content_sha256(source: str | os.PathLike[str] | None) -> str | None:
    """Return the hash of a file or folder; a name on a hub stands for itself."""
    if source is None:
        return None
    path = Path(source)
    if path.is_dir():
        return folder_sha256(path)
    return file_sha256(path) if path.is_file() else os.fspath(source)


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    return sha256_hex(path.read_bytes())
