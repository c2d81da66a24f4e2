"""A network out of one file with its code inside: a program of `torch.export` (.pt2)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Return whether a file is a program of torch.export."""
    path = Path(source)
    return path.suffix.lower() == ".pt2" and path.is_file()


def open_program(source: str | os.PathLike[str], given: Given) -> TorchNetwork:
    """Return the network in the file, whose code runs when it is exported; raises CheckpointRejected.

    The program needs a dynamic batch: `dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)`.
    """
    data = read_file(source, what="program", max_bytes=_MAX_BYTES, error=CheckpointRejected)
    preprocessing, assumed = settled_preprocessing(given.preprocessing, image_size=given.image_size)
    return TorchNetwork(
        module=_opened(data, source),
        name=printable(Path(source).stem),
        preprocessing=preprocessing,
        labels=given.labels,
        activation=given.activation,
        assumed=assumed,
        source={"program_sha256": sha256_hex(data)},
    )


def _opened(data: bytes, source: str | os.PathLike[str]) -> nn.Module:
    try:
        with _only_tensors():
            module: nn.Module = torch.export.load(io.BytesIO(data)).module()
    # Damaged or of another torch: the reader raises nearly anything.
    except Exception as error:
        reason = f"torch {torch.__version__} cannot read the program ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointRejected(
            "cannot use the program", file=source, reason=reason, remedy="export it again with this torch"
        ) from error
    # Programs have no modes: what was exported for evaluation stays so, and eval() or train() would raise.
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    module.eval = lambda: module  # type: ignore[method-assign]
    return module


@contextmanager
def _only_tensors() -> Iterator[None]:
    before = os.environ.get(_ONLY_TENSORS)
    os.environ[_ONLY_TENSORS] = "1"
    try:
        yield
    finally:
        del os.environ[_ONLY_TENSORS]
        if before is not None:
            os.environ[_ONLY_TENSORS] = before
