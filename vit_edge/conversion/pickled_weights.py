"""Tensors out of a file of `torch.save`, without running anything that is in it."""

from __future__ import annotations

import argparse
import io
import logging
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vit_edge.errors import CheckpointRejected, NotPlainViT

__all__ = ["not_plain", "read_pickled", "settings_of", "state_dict_of", "unusable"]

_UNSAFE_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# Where training loops put the weights; averaged weights first, as timm does: they are the ones that were evaluated.
_CONTAINERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "net",
    "network", "module", "teacher", "encoder", "weights",
)  # fmt: skip
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_DEEPEST = 4
_NUM_NAMED = 5
_log = logging.getLogger(__name__)


def unusable(origin: str, reason: str, remedy: str) -> CheckpointRejected:
    """Return the error for weights that cannot be used."""
    return CheckpointRejected("cannot use the weights", file=origin, reason=reason, remedy=remedy)


def not_plain(origin: str, reason: str, remedy: str) -> NotPlainViT:
    """Return the error for weights of another network than a plain Vision Transformer."""
    return NotPlainViT("cannot use the weights", file=origin, reason=reason, remedy=remedy)


def read_pickled(data: bytes, *, origin: str) -> tuple[Any, tuple[str, ...]]:
    """Return what `torch.save` wrote, and notes for the report; raises CheckpointRejected.

    Only tensors, plain values and argparse.Namespace (timm's checkpoints; inert data) come out. A file that needs
    anything else imported is refused by the name of what it wants; there is no way round that.
    """
    if data.startswith(b"PK"):
        _check_archive(data, origin)
    with _switch_removed() as notes:
        try:
            # What torch says of the way the file was written is no business of who reads it.
            with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
                warnings.simplefilter("ignore")
                found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(data, str(error), origin) from error
        # A damaged file makes the readers raise nearly anything.
        except Exception as error:
            reason = f"the file is cut short, damaged, or no file of torch.save ({type(error).__name__})"
            raise unusable(origin, reason, "copy or download it again") from error
    return found, notes


def state_dict_of(found: Any, *, origin: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors by name out of what a training loop saved, and what was chosen; CheckpointRejected."""
    path: list[str] = []
    notes: list[str] = []
    while isinstance(found, Mapping) and not _holds_tensors(found) and len(path) < _DEEPEST:
        inside = [key for key in _CONTAINERS if isinstance(found.get(key), Mapping)]
        if not inside:
            break
        path.append(inside[0])
        if inside[0] in _AVERAGED and len(inside) > 1:
            notes.append(f"averaged weights ({inside[0]}) taken; those in {', '.join(inside[1:])} left out")
        found = found[inside[0]]
    if not isinstance(found, Mapping) or not _holds_tensors(found):
        kind = type(found).__name__
        keys = f" with {', '.join(map(str, list(found)[:_NUM_NAMED]))}" if isinstance(found, Mapping) else ""
        raise unusable(
            origin, f"the file holds no state dict, but {kind}{keys}", "save `model.state_dict()` where it was made"
        )
    if path:
        notes.insert(0, f"weights found under {'.'.join(path)}")
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, origin)
    return tensors, tuple(notes)


def settings_of(found: Any) -> dict[str, Any]:
    """Return the plain settings that a training loop saved with the weights.

    They are timm's `args` and `arch` and Lightning's `hyper_parameters`; the later counts.
    """
    if not isinstance(found, Mapping):
        return {}
    saved: dict[str, Any] = {}
    for name in ("args", "hyper_parameters"):
        values = found.get(name)
        values = vars(values) if isinstance(values, argparse.Namespace) else values
        saved |= {str(key): value for key, value in values.items()} if isinstance(values, Mapping) else {}
    return saved | ({"arch": found["arch"]} if isinstance(found.get("arch"), str) else {})


def _holds_tensors(values: Mapping[Any, Any]) -> bool:
    # An optimiser's or a scheduler's state holds a tensor or two; a network has them under dotted names.
    return sum(isinstance(value, Tensor) and "." in str(key) for key, value in values.items()) > 1


def _check_archive(data: bytes, origin: str) -> None:
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise unusable(origin, "the file is a zip archive that is cut short or damaged", "copy it again") from error
    # torch.save never compresses: an archive that does could unpack to a thousand times its size.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise unusable(
            origin, "the file's zip archive is compressed, which torch.save never does", "save it with torch.save"
        )
    if sum(entry.file_size for entry in entries) > len(data):
        raise unusable(origin, "the file's zip archive claims more bytes than the file has", "copy it again")
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        reason, remedy = (
            "the file is a TorchScript program, not weights",
            "save `model.state_dict()`, or a program of torch.export, where it was made",
        )
        raise unusable(origin, reason, remedy)


def _check_tensor(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
        raise unusable(origin, f"{name} is {kind}", "save ordinary dense tensors")
    size_bytes, stored_bytes = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    # An expanded view costs nothing to load, and everything at the first copy: 1,549 bytes can claim 4 TB.
    if size_bytes > stored_bytes:
        reason = f"{name} claims {size_bytes:,} bytes {tuple(tensor.shape)}, and the file stores {stored_bytes:,}"
        raise unusable(origin, reason, "save the tensor with .contiguous() where it was made")


@contextmanager
def _switch_removed() -> Iterator[tuple[str, ...]]:
    """Take away the variables that change how torch loads, for the time of one load."""
    names = (_UNSAFE_SWITCH, "TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    note = f"{_UNSAFE_SWITCH} is set; nothing in the file was run all the same"
    if _UNSAFE_SWITCH in removed:
        _log.warning("%s", note)
    try:
        yield (note,) if _UNSAFE_SWITCH in removed else ()
    finally:
        os.environ.update(removed)


def _refused(data: bytes, message: str, origin: str) -> CheckpointRejected:
    wanted = re.findall(r"GLOBAL ([\w.]+)", message) or _imports(data)
    if not wanted:
        return unusable(origin, "the file's pickle is damaged or of an unknown kind", "copy it again")
    remedy = (
        "save its weights as safetensors where it was made:\n"
        "    from safetensors.torch import save_file\n"
        '    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, "model.safetensors")'
    )
    reason = f"the file needs unpickling of `{'`, `'.join(dict.fromkeys(wanted[:_NUM_NAMED]))}`, which could run code"
    return unusable(origin, reason, remedy)


def _imports(data: bytes) -> list[str]:
    """Return what the pickle of a file would import, read and never run."""
    names: list[str] = []
    texts: list[str] = []
    try:
        if data.startswith(b"PK"):
            archive = zipfile.ZipFile(io.BytesIO(data))
            data = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    # Damaged bytes make it raise nearly anything; what was read so far is enough.
    except Exception:
        return names
    return names
