"""Tensors by name out of a third-party file: safetensors (whole or in shards), torch.save, NumPy's npz."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vit_edge.conversion.pickled_weights import read_pickled, settings_of, state_dict_of, unusable
from vit_edge.errors import CheckpointRejected, printable
from vit_edge.files import kind_of, looks_like_safetensors, read_file, sha256_hex

__all__ = ["WEIGHT_FILES", "Weights", "find_weights", "read_weights"]

# What libraries call the file in a folder, the safest first.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "checkpoint.safetensors", "open_clip_model.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth", "model.pth", "model_best.pth.tar",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt", ".pth.tar")
_MAX_BYTES, _MAX_INDEX_BYTES = 2**40, 50_000_000
# Random float32 hardly compresses; a head of zeros does.
_MOST_EXPANSION, _FREE_BYTES = 16, 64 * 2**20
_OWN_KEY = "vit_edge.checkpoint"
# What PEFT writes into its folder, and how it names its tensors.
_ADAPTER = "adapter_config.json"
_ADAPTER_KEY = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w1_a)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Tensors by their names in the file, the SHA-256 of what was read, and notes.

    `own` is whether the file is a checkpoint of vit-edge; `settings` are those that a training loop saved with them.
    """

    tensors: Mapping[str, Tensor]
    origin: str
    sha256: str
    notes: tuple[str, ...] = ()
    own: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def find_weights(folder: Path) -> Path:
    """Return the file of weights in a folder; raises CheckpointRejected where there is none, or no telling which."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / _ADAPTER).is_file():
        raise _adapter(printable(folder))
    found = sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES) and path.is_file())
    if len(found) == 1:
        return found[0]
    names = ", ".join(printable(path.name) for path in found[:5])
    reason = f"the folder holds several files of weights: {names}" if found else "the folder holds no file of weights"
    raise unusable(printable(folder), reason, f"give the path of the file, such as {WEIGHT_FILES[0]}")


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Return the tensors of a file, by what is in it and not by its name; raises CheckpointRejected."""
    origin = printable(path)
    if os.fspath(path).endswith(".index.json"):
        return _read_shards(Path(path), origin)
    data = read_file(path, what="weights", max_bytes=_MAX_BYTES, error=CheckpointRejected)
    if data.startswith(b"PK\x03\x04") and _is_npz(data, origin):
        return Weights(tensors=_read_npz(data, origin), origin=origin, sha256=sha256_hex(data))
    if data.startswith((b"PK\x03\x04", b"\x80")) and not looks_like_safetensors(data):
        found, notes = read_pickled(data, origin=origin)
        tensors, more = state_dict_of(found, origin=origin)
        _refuse_adapter(tensors, origin)
        return Weights(
            tensors=tensors, origin=origin, sha256=sha256_hex(data), notes=notes + more, settings=settings_of(found)
        )
    kind = kind_of(data)
    if kind is not None:
        raise unusable(origin, *kind)
    tensors, metadata = _read_safetensors(data, origin)
    _refuse_adapter(tensors, origin)
    return Weights(tensors=tensors, origin=origin, sha256=sha256_hex(data), own=_is_own(metadata))


def _refuse_adapter(keys: Iterable[str], origin: str) -> None:
    if any(_ADAPTER_KEY.search(key) for key in keys):
        raise _adapter(origin)


def _adapter(origin: str) -> CheckpointRejected:
    remedy = (
        "merge the adapter first, where it was made:\n"
        '    model.merge_and_unload().save_pretrained("merged")  # model is the PeftModel'
    )
    return unusable(origin, "these are the weights of a PEFT adapter (LoRA), not of a network", remedy)


def _is_own(metadata: Mapping[str, Any]) -> bool:
    """Return whether this is a checkpoint of ours, even where damage hit its mark: reading it then shows."""
    return _OWN_KEY in metadata or any(
        '"sha256"' in str(text) and '"schema"' in str(text) for text in metadata.values()
    )


def _read_safetensors(data: bytes, origin: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        reason = f"the file is neither safetensors, nor of torch.save, nor npz, or it is cut short ({error})"
        raise unusable(origin, reason, "copy or download it again") from error
    return tensors, metadata


def _read_shards(index: Path, origin: str) -> Weights:
    text = read_file(index, what="index of weights", max_bytes=_MAX_INDEX_BYTES, error=CheckpointRejected)
    try:
        files = {str(name): str(file) for name, file in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unusable(origin, f"the file is no index of shards ({error})", "download it again") from error
    tensors: dict[str, Tensor] = {}
    hashes, notes = [sha256_hex(text)], [f"{len(set(files.values()))} shards joined"]
    for name in sorted(set(files.values())):
        if Path(name).name != name or name.endswith(".index.json"):
            raise unusable(origin, f"the file points outside of its folder, to {printable(name)}", "download it again")
        shard = read_weights(index.parent / name)
        hashes.append(shard.sha256)
        notes += [note for note in shard.notes if note not in notes]
        tensors |= shard.tensors
    absent = sorted(set(files) - set(tensors))
    if absent:
        raise unusable(origin, f"the file's shards have no {', '.join(absent[:5])}", "download every shard again")
    return Weights(tensors=tensors, origin=origin, sha256=sha256_hex("".join(hashes).encode()), notes=tuple(notes))


def _is_npz(data: bytes, origin: str) -> bool:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        reason = "the file is a zip archive that is cut short or damaged"
        raise unusable(origin, reason, "copy or download it again") from error
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(data: bytes, origin: str) -> dict[str, Tensor]:
    unpacked = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(data)).infolist())
    if unpacked > _MOST_EXPANSION * len(data) + _FREE_BYTES:
        reason = f"{len(data):,} bytes would unpack to {unpacked:,}; weights hardly compress"
        raise unusable(origin, reason, "take it from where it was published")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(_plain(arrays[name]))) for name in arrays.files}
    # NumPy and zipfile raise zlib.error, EOFError, ValueError, TypeError and more on damaged files.
    except Exception as error:
        reason = f"the file's arrays cannot be read ({type(error).__name__}: {error})"
        raise unusable(origin, reason, "copy it again; arrays of Python objects are refused") from error


def _plain(array: Any) -> Any:
    """Return the array; bfloat16, which NumPy stores as two opaque bytes, as float32."""
    if array.dtype == np.dtype("V2"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array
