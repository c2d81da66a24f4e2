"""Statistics of a calibration kept on disk: one that was stopped goes on from where it was, a whole one is read back.

An entry is what was gathered over the first images, and a chained hash of these: it counts only while the images
that come are those. Whatever is damaged, edited or not ours is deleted and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from safetensors.numpy import load, save

import vit_edge
from vit_edge.cache import cache_folder
from vit_edge.errors import InputError, VitEdgeError
from vit_edge.files import read_file, sha256_hex, write_atomic
from vit_edge.image import Preprocessing
from vit_edge.machine.cpu import cpu_name, instruction_set

__all__ = ["CacheEntry", "CalibrationCache", "ImageChain", "Saved", "calibration_key", "default_folder"]

State: TypeAlias = dict[str, npt.NDArray[Any]]

# Of the statistics and of the file; raised where either changes.
_VERSION = 1
_MAGIC = b"vit-edge calibration cache\n"
_SUFFIX = ".calibration"
_MOST_ENTRIES, _MOST_ENTRY_BYTES = 32, 2**28
_SNAPSHOT_S = 2.0
_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return where entries go: a folder of their own in the user's cache."""
    return cache_folder() / "calibration"


def calibration_key(
    model: onnx.ModelProto, tensors: tuple[str, ...], *, statistic: str, preprocessing: Preprocessing | None
) -> str:
    """Return the hash of all that decides statistics but the images: graph, tensors, preprocessing, engine, CPU."""
    parts = {
        "version": _VERSION,
        "vit_edge": vit_edge.__version__,
        "model": sha256_hex(model.SerializeToString(deterministic=True)),
        "tensors": tensors,
        "statistic": statistic,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "engine": ["onnxruntime", onnxruntime.__version__],
        "cpu": [cpu_name(), instruction_set()],
    }
    return sha256_hex(json.dumps(parts, sort_keys=True).encode())


class ImageChain:
    """A running hash over images in their order, equal only where all of them were equal."""

    def __init__(self) -> None:
        self.num_images = 0
        self.digest = ""

    def add(self, image: npt.NDArray[Any]) -> None:
        """Count one more image, as the graph takes it."""
        head = f"{self.digest}{image.dtype}{image.shape}".encode()
        self.digest = hashlib.sha256(head + hashlib.sha256(np.ascontiguousarray(image).data).digest()).hexdigest()
        self.num_images += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Statistics over the first `num_images` images, whose chain ends in `digest`."""

    num_images: int
    digest: str
    state: State


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationCache:
    """Where statistics are kept between runs; `preprocessing` is what made the images.

    The newest 32 entries stay. A folder that cannot be written is warned of, and calibration goes on without it. A
    snapshot is taken every `snapshot_s` seconds, which decides how much is lost and never what comes out.
    """

    folder: Path = field(default_factory=default_folder)
    preprocessing: Preprocessing | None = None
    snapshot_s: float = _SNAPSHOT_S

    def entry(self, key: str, first_digest: str) -> CacheEntry:
        """Return the entry of a calibration by its key and its first image: others are distinguished by the chain."""
        name = sha256_hex(f"{key} {first_digest}".encode())
        return CacheEntry(self.folder / f"{name}{_SUFFIX}", name=name, snapshot_s=self.snapshot_s)


class CacheEntry:
    """One file of the cache, which two processes may write: each writes it whole, and the last one stays."""

    def __init__(self, path: Path, *, name: str, snapshot_s: float) -> None:
        self.path, self._name, self._snapshot_s = path, name, snapshot_s
        self._last = time.monotonic()
        self._writable = True

    def read(self) -> Saved | None:
        """Return what is saved, or None; a file that is damaged or not ours is deleted."""
        try:
            data = read_file(self.path, what="calibration cache", max_bytes=_MOST_ENTRY_BYTES)
            os.utime(self.path)
        except (InputError, OSError):
            if self.path.is_file() and not self.path.is_symlink():
                self.discard("the file is too large")
            return None
        try:
            return _unpacked(data, self._name)
        except Exception as error:  # whatever a damaged file makes of its reader
            self.discard(str(error))
            return None

    def discard(self, reason: str) -> None:
        """Delete the file, which is then made again."""
        _log.warning("a cached calibration cannot be used and is computed again (%s): %s", reason, self.path)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the cached calibration cannot be deleted: %s", error)

    def save_sometimes(self, saved: Callable[[], Saved]) -> None:
        """Write a snapshot where the last one is old enough."""
        if time.monotonic() - self._last >= self._snapshot_s:
            self.save(saved())

    def save(self, saved: Saved) -> None:
        """Write the entry; where that cannot be, say so once and go on."""
        if not self._writable:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self.path, _packed(saved, self._name))
            _remove_oldest(self.path.parent)
        except (OSError, VitEdgeError) as error:
            self._writable = False
            _log.warning("the calibration is not kept in the cache: %s", error)
        self._last = time.monotonic()


def _packed(saved: Saved, name: str) -> bytes:
    head = json.dumps({"name": name, "num_images": saved.num_images, "digest": saved.digest}).encode() + b"\n"
    body = head + save({key: np.ascontiguousarray(value) for key, value in saved.state.items()})
    return _MAGIC + sha256_hex(body).encode() + b"\n" + body


def _unpacked(data: bytes, name: str) -> Saved:
    magic, digest, body = data[: len(_MAGIC)], data[len(_MAGIC) : len(_MAGIC) + 64], data[len(_MAGIC) + 65 :]
    if magic != _MAGIC or digest != sha256_hex(body).encode():
        raise ValueError("the file is damaged")
    head, _, tensors = body.partition(b"\n")
    fields: Mapping[str, Any] = json.loads(head)
    if fields["name"] != name:
        raise ValueError("the file belongs to another calibration")
    return Saved(num_images=int(fields["num_images"]), digest=str(fields["digest"]), state=load(tensors))


def _remove_oldest(folder: Path) -> None:
    """Keep the newest entries; one that another process removes meanwhile is gone too."""
    ages = {path: _modified_ns(path) for path in folder.glob(f"*{_SUFFIX}")}
    for path in sorted(ages, key=lambda path: (ages[path], path.name))[:-_MOST_ENTRIES]:
        path.unlink(missing_ok=True)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
