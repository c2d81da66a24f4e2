"""A network out of one file with its code inside: `torch.export` (.pt2) and TorchScript."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_edge.errors import CheckpointRejected, printable
from vit_edge.export.sources.torch_network import Given, TorchNetwork, settled_preprocessing
from vit_edge.files import read_file, sha256_hex

__all__ = ["is_program", "open_program"]

_MAX_BYTES = 2**40
# torch refuses every pickle in the file that is more than tensors, also if its own reader would fall back to them.
_ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def is_program(source: str | os.PathLike[str]) -> bool:
    """Return whether a file holds a network with its code: a `.pt2`, or a TorchScript archive of any name."""
    path = Path(source)
    return path.is_file() and (_is_exported(path) or _is_script(path))


def open_program(source: str | os.PathLike[str], given: Given) -> TorchNetwork:
    """Return the network in the file, whose code runs when it is exported; raises CheckpointRejected.

    A program of torch.export needs a dynamic batch: `dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)`.
    """
    data = read_file(source, what="program", max_bytes=_MAX_BYTES, error=CheckpointRejected)
    module = _opened(data, source, _exported if _is_exported(Path(source)) else _scripted)
    preprocessing, assumed = settled_preprocessing(given.preprocessing, image_size=given.image_size)
    return TorchNetwork(
        module=module,
        name=printable(Path(source).stem),
        preprocessing=preprocessing,
        labels=given.labels,
        activation=given.activation,
        assumed=assumed,
        source={"program_sha256": sha256_hex(data)},
    )


def _is_exported(path: Path) -> bool:
    return path.suffix.lower() == ".pt2"


def _is_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _opened(data: bytes, source: str | os.PathLike[str], read: Callable[[io.BytesIO], Any]) -> nn.Module:
    before = os.environ.get(_ONLY_TENSORS)
    os.environ[_ONLY_TENSORS] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated is no news to its user
            module: nn.Module = read(io.BytesIO(data))
    # Damaged or of another torch: the readers raise nearly anything.
    except Exception as error:
        reason = f"torch {torch.__version__} cannot read the program ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointRejected(
            "cannot use the program", file=source, reason=reason, remedy="export it again with this torch"
        ) from error
    finally:
        del os.environ[_ONLY_TENSORS]
        if before is not None:
            os.environ[_ONLY_TENSORS] = before
    return module


def _exported(file: io.BytesIO) -> Any:
    module = torch.export.load(file).module()
    # Programs have no modes: what was exported for evaluation stays so, and eval() or train() would raise.
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    module.eval = lambda: module  # type: ignore[method-assign]
    return module


def _scripted(file: io.BytesIO) -> Any:
    # Frozen, the weights are constants of the program; as its parameters torch.export would not have them.
    return torch.jit.freeze(torch.jit.load(file, map_location="cpu").eval())  # type: ignore[no-untyped-call]
