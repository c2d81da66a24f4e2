"""Every error that vit-edge raises on purpose. Catch `VitEdgeError` to catch them all.

    VitEdgeError                 exit 1
    |- UsageError                exit 2    the call or its options are wrong
    |  `- Closed                           it was closed, or loaded before a fork
    |- InputError                exit 3    a file given is missing, broken or does not fit
    |  |- ImageRejected                    an image cannot be used
    |  |- DataRejected                     a folder of images cannot be used
    |  |- CheckpointRejected               a checkpoint cannot be used
    |  |  `- NotPlainViT                   the weights are of another network than a plain Vision Transformer
    |  `- ModelRejected                    a model file cannot be used
    |- NotTrusted                exit 4    a model file is not the one that was sealed
    |- ResourceExhausted         exit 5    disk, memory or time
    |  |- Overloaded                       the queue of a pool is full
    |  `- DeadlineExceeded                 a request's time was over before its turn
    |- VerificationFailed        exit 6    unexpected predictions, or too few images
    |  `- GoldenMismatch                   the golden vectors give other logits here
    |- EngineUnavailable         exit 7    no such engine or device here
    |  `- MissingExtra                     a package has to be installed first
    `- Interrupted               exit 130  stopped by the user, work saved

A message has two lines: `cannot read FILE: reason`, then `try: what to do`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

__all__ = [
    "CheckpointRejected",
    "Closed",
    "DataRejected",
    "DeadlineExceeded",
    "EngineUnavailable",
    "GoldenMismatch",
    "ImageRejected",
    "InputError",
    "Interrupted",
    "MissingExtra",
    "ModelRejected",
    "NotPlainViT",
    "NotTrusted",
    "Overloaded",
    "ResourceExhausted",
    "UsageError",
    "VerificationFailed",
    "VitEdgeError",
    "escaped",
    "misfit",
    "printable",
    "require",
    "version_of",
]


class VitEdgeError(Exception):
    """What failed, in which file, why, and what to do about it; `exit_code` is the command line's."""

    exit_code = 1
    in_json = False  # whether the command line has printed it as JSON already

    def __init__(self, what: str, *, reason: str, remedy: str, file: str | os.PathLike[str] | None = None) -> None:
        # A reason may quote a file, a label or a manifest.
        self.what, self.reason, self.remedy = escaped(what), escaped(reason), escaped(remedy)
        self.file = None if file is None else printable(file)
        super().__init__(what, reason, remedy)

    def __reduce__(self) -> tuple[Callable[[], VitEdgeError], tuple[()]]:
        # Exceptions are rebuilt from `args`, which has no keywords: it would fail in another process.
        return partial(type(self), self.what, reason=self.reason, remedy=self.remedy, file=self.file), ()

    def __str__(self) -> str:
        subject = " ".join(part for part in (self.what, self.file) if part)
        return f"{subject}: {self.reason}" + (f"\ntry: {self.remedy}" if self.remedy else "")


class UsageError(VitEdgeError):
    """The call or its options are wrong."""

    exit_code = 2


class Closed(UsageError):
    """It was closed, or belongs to the process before a fork."""


class InputError(VitEdgeError):
    """A file given is missing, broken or does not fit."""

    exit_code = 3


class ImageRejected(InputError):
    """An image cannot be used."""


class DataRejected(InputError):
    """A folder of images cannot be used."""


class CheckpointRejected(InputError):
    """A checkpoint cannot be used."""


class NotPlainViT(CheckpointRejected):
    """The weights are of another network than a plain Vision Transformer; `vit-edge export` may still take it."""


class ModelRejected(InputError):
    """A model file cannot be used."""


class NotTrusted(VitEdgeError):
    """A model file is not, byte for byte, the one that was sealed."""

    exit_code = 4


class ResourceExhausted(VitEdgeError):
    """Disk, memory or time ran out, or would have."""

    exit_code = 5


class Overloaded(ResourceExhausted):
    """The queue is full: the request was not taken."""


class DeadlineExceeded(ResourceExhausted):
    """The request's time was over before its turn came."""


class VerificationFailed(VitEdgeError):
    """A model does not give the expected predictions."""

    exit_code = 6


class GoldenMismatch(VerificationFailed):
    """The golden vectors of a model file give other logits here than where it was made."""


class EngineUnavailable(VitEdgeError):
    """The engine or device asked for is not here."""

    exit_code = 7


class MissingExtra(EngineUnavailable):
    """A package that this needs is not installed."""


class Interrupted(VitEdgeError):
    """Stopped by the user; what was done so far is saved."""

    exit_code = 130


def printable(path: str | os.PathLike[str]) -> str:
    """Return a path as text that any terminal can print: control characters and bytes that are not UTF-8 escaped."""
    text = os.fsencode(Path(path)).decode("utf-8", errors="backslashreplace")
    return escaped(text, keep="")


def escaped(text: str, *, keep: str = "\n") -> str:
    """Return text from outside as a terminal, log or table may show it, control characters and the like escaped.

    So are marks that turn the direction of writing, and lone surrogates. Characters in `keep` stay.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """Import and return `module`; raises MissingExtra, which says what to install, if it cannot be imported.

    A package that is installed may fail with an older protobuf or another NumPy: then the versions are named.
    """
    package = module.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(module)
    except Exception as error:  # protobuf raises its own VersionError, a wheel for another NumPy ImportError or worse
        remedy = f'pip install --upgrade "vit-edge[{extra}]"'
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package:
            reason, remedy = f"the package {package} is not installed", f'pip install "vit-edge[{extra}]"'
        else:
            beside = " and ".join(f"{name} {version_of(name)}" for name in ("protobuf", "numpy"))
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            reason = f"{package} {version_of(package)} cannot be imported with {beside} ({why})"
        raise MissingExtra(f"cannot {what}", reason=reason, remedy=remedy) from error


def misfit(error: Exception) -> MissingExtra:
    """Return the error for an import that failed: packages that are missing, or do not fit each other."""
    installed = {name: version_of(name) for name in ("protobuf", "numpy", "Pillow", "click", "rich", "onnx")}
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in installed.items())
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (installed: {found})"
    return MissingExtra("cannot import a package", reason=reason, remedy="pip install --upgrade vit-edge")


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    from importlib import metadata  # 30 ms, and most commands ask for no version

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
