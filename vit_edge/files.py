"""Files read only when they are regular files, and written so that a crash leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vit_edge.errors import InputError, ResourceExhausted, UsageError, VitEdgeError, printable

__all__ = [
    "PackedFile",
    "Part",
    "finite",
    "kind_of",
    "looks_like_safetensors",
    "may_write",
    "may_write_folder",
    "prepared",
    "read_file",
    "room_for",
    "sha256_hex",
    "sync_folder",
    "temporary_folder",
    "write_atomic",
    "write_folder",
]

# What people really hand over when it is not the file they meant; checked in this order.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "the file is a Git LFS pointer", "run `git lfs pull`"),
    (b"<!doctype html", "the file is an HTML page", "download the file itself, not the page about it"),
    (b"<html", "the file is an HTML page", "download the file itself, not the page about it"),
    (b"\x89png", "the file is a PNG image", "give an image where an image is asked for"),
    (b"\xff\xd8\xff", "the file is a JPEG image", "give an image where an image is asked for"),
    (
        b"pk\x03\x04",
        "the file is a zip archive (torch.save writes these)",
        "save the weights as safetensors where it was made",
    ),
    (b"\x80\x02", "the file is a Python pickle", "save the weights as safetensors where it was made"),
)


# The host is in the names: on a folder that hosts share, a process number alone says nothing of who is alive.
_TEMPORARY = f".vit-edge.tmp.{re.sub('[^A-Za-z0-9-]', '_', platform.node())[:60]}."
# Short, as sockets are made in these folders, and their paths have 107 bytes at most.
_FOLDER = f"vit-edge.{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}."


# What a write may hit besides a full disk.
_LIMITS = {
    errno.EFBIG: (
        "the file is larger than this process or disk allows",
        "raise `ulimit -f`, or write elsewhere",
    ),
    getattr(errno, "EDQUOT", -1): ("your quota on this disk is used up", "free some space, or write elsewhere"),
}


class Part(Protocol):
    """Where a packed file is in its archive; raises OSError or ValueError if it cannot be read."""

    @property
    def size_bytes(self) -> int:
        """Return the size of the file, 0 if it is known only once it is read."""
        ...

    def read(self, archive: Path) -> bytes:
        """Return the bytes of the file."""
        ...


# A path of this system, so that packed files sort, print and pickle among the paths of other images.
if TYPE_CHECKING:
    _SystemPath = Path
else:
    _SystemPath = type(Path())


class PackedFile(_SystemPath):
    """A file inside an archive, by a path below that of the archive; `read_file` reads it, and nothing else can."""

    archive: Path
    part: Part

    @classmethod
    def of(cls, archive: Path, name: str, part: Part) -> PackedFile:
        """Return the file `name` of an archive."""
        path = cls(archive, name)
        path.archive, path.part = Path(archive), part
        return path

    def read_part(self, *, what: str, max_bytes: int, error: type[VitEdgeError]) -> bytes:
        """Return the bytes of the file; raises `error`."""
        if self.part.size_bytes > max_bytes:
            reason = f"the file has {self.part.size_bytes:,} bytes; at most {max_bytes:,} are read"
            raise error(f"cannot read the {what}", file=self, reason=reason, remedy="give a smaller file")
        try:
            return self.part.read(self.archive)
        except (OSError, ValueError) as problem:
            remedy = "write the archive again"
            raise error(f"cannot read the {what}", file=self, reason=_why(problem), remedy=remedy) from problem

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedFile.of, (self.archive, str(self.relative_to(self.archive)), self.part)


def looks_like_safetensors(data: bytes) -> bool:
    """Return whether `data` begins as safetensors: the length of the header in 8 bytes, little-endian, then JSON.

    Asked before any other kind: the length alone can be the first bytes of a pickle (0x80, 0x02).
    """
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def kind_of(data: bytes) -> tuple[str, str] | None:
    """Return (what this file is instead, what to do) for the files people hand over by mistake, else None."""
    if not data:
        return "the file is empty (0 bytes)", "copy or download it again"
    if looks_like_safetensors(data):
        return None
    head = data[:64].lstrip().lower() if data[:1] not in (b"\x80", b"\x89", b"\xff") else data[:64].lower()
    for magic, reason, remedy in _KINDS:
        if head.startswith(magic):
            return reason, remedy
    return None


def read_file(
    path: str | os.PathLike[str], *, what: str, max_bytes: int, error: type[VitEdgeError] = InputError
) -> bytes:
    """Return the bytes of a regular file (a link to one is followed); raises `error`.

    Devices, sockets and FIFOs are never opened for reading: they could block for ever or never end. A PackedFile is
    read from its archive.
    """
    if isinstance(path, PackedFile):
        return path.read_part(what=what, max_bytes=max_bytes, error=error)
    try:
        # O_NONBLOCK: opening a FIFO without a writer must not hang before fstat can refuse it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:
        raise error(f"cannot read the {what}", file=path, reason=_why(problem), remedy="check the path") from problem
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise error(
            f"cannot read the {what}", file=path, reason=f"the path is {kind}", remedy="give the path of a file"
        )
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            reason = f"the file has {status.st_size:,} bytes; at most {max_bytes:,} are read"
            raise error(f"cannot read the {what}", file=path, reason=reason, remedy="give a smaller file")
        try:
            return file.read(status.st_size)
        except OSError as problem:
            remedy = "check the disk"
            raise error(f"cannot read the {what}", file=path, reason=_why(problem), remedy=remedy) from problem


def may_write(path: str | os.PathLike[str], *, force: bool, made_from: str | os.PathLike[str] | None = None) -> Path:
    """Return `path` if a result may be written there; raises UsageError early, before any work is done.

    The file `made_from` is never overwritten, even with `force`.
    """
    try:
        return _may_write(Path(path), force=force, made_from=made_from)
    except (OSError, ValueError) as problem:  # a name too long, or with a zero byte in it
        raise UsageError("cannot write", file=path, reason=_why(problem), remedy="choose another name") from problem


def _may_write(target: Path, *, force: bool, made_from: str | os.PathLike[str] | None) -> Path:
    if target.is_dir():
        raise UsageError("cannot write", file=target, reason="the path is a folder", remedy="give the path of a file")
    if made_from is not None and target.exists() and Path(made_from).exists() and target.samefile(made_from):
        raise UsageError(
            "will not overwrite", file=target, reason="the path is the input", remedy="choose another name"
        )
    if os.path.lexists(target) and not force:
        remedy = "choose another name, or add --force to replace it"
        raise UsageError("will not overwrite", file=target, reason="the file exists", remedy=remedy)
    if not target.absolute().parent.is_dir():
        reason = f"the folder {printable(target.absolute().parent)} does not exist"
        raise UsageError("cannot write", file=target, reason=reason, remedy="create the folder first")
    return target


def may_write_folder(target: Path, *, holding: Collection[str], force: bool) -> Path:
    """Return `target` if a folder with these files may be written there; raises UsageError.

    With `force` an older folder is replaced, but never one that has any other file in it.
    """
    if not target.is_dir():
        if os.path.lexists(target):
            reason = "the path is a file"
            raise UsageError("will not overwrite", file=target, reason=reason, remedy="give the path of a folder")
        return may_write(target, force=False)
    held = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    others = sorted(held - {*holding})
    if others or not force:
        reason = f"the folder exists{f', with {printable(others[0])} in it' if others else ''}"
        remedy = "choose another name" + ("" if others else ", or add --force")
        raise UsageError("will not overwrite", file=target, reason=reason, remedy=remedy)
    return target


def is_file(path: object) -> bool:
    """Return whether `path` is the path of a file; False too where that cannot be found out."""
    with contextlib.suppress(OSError, ValueError):
        return isinstance(path, str | os.PathLike) and Path(path).is_file()
    return False


def write_atomic(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Write `data` to `path` so that a reader, or a power cut, sees the old file or the new one, never a part.

    Temporary file in the same folder, flush, fsync, replace, fsync of the folder. Raises ResourceExhausted when the
    disk is full; the old file is kept and the temporary file removed.
    """
    with prepared(Path(path), data) as (temporary, target):
        temporary.replace(target)
        sync_folder(target.absolute().parent)


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files so that nothing appears under its name before it is whole; an older one is replaced.

    Two renames replace a folder: a process that is killed between them leaves the older one, `.vit-edge.previous.NAME`.
    """
    old = target.absolute().with_name(f".vit-edge.previous.{target.name}")
    with temporary_folder(next_to=target) as name:
        new = Path(name) / "new"
        for path, data in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(new / path, data)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.replace(old)
        try:
            new.replace(target)
        except BaseException:
            if old.exists():
                old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def room_for(target: Path) -> Iterator[None]:
    """Raise ResourceExhausted if the disk of the target gets full in the block, or a limit of it is reached."""
    try:
        yield
    except OSError as problem:
        if full := _exhausted(problem, target, 0):
            raise full from problem
        raise


def _exhausted(problem: OSError, target: Path, size_bytes: int) -> ResourceExhausted | None:
    if problem.errno == errno.ENOSPC:
        return _disk_full(target, size_bytes)
    if problem.errno not in _LIMITS:
        return None
    reason, remedy = _LIMITS[problem.errno]
    return ResourceExhausted("cannot write", file=target, reason=reason, remedy=remedy)


@contextlib.contextmanager
def prepared(target: Path, data: bytes | Iterable[bytes]) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary file that holds `data`, to be moved to the target, which is yielded too."""
    if target.is_symlink():  # the link stays, what it points to is replaced
        target = target.resolve()
    chunks = [data] if isinstance(data, bytes) else data
    size_bytes = len(data) if isinstance(data, bytes) else 0
    _remove_stale(target.absolute().parent, _TEMPORARY)
    _check_space(target, size_bytes)
    temporary = target.absolute().parent / f"{_TEMPORARY}{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as file:
            _keep_mode(target, file.fileno())
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        yield temporary, target
    except OSError as problem:
        if full := _exhausted(problem, target, size_bytes):
            raise full from problem
        raise UsageError("cannot write", file=target, reason=_why(problem), remedy="choose another folder") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(*, next_to: Path | None = None) -> Iterator[str]:
    """Yield a new folder, removed at the end; folders that this user's killed processes left are removed first.

    It is in the system's folder for temporary files, or `next_to` a file that is made in it and then moved.
    """
    parent = Path(tempfile.gettempdir()) if next_to is None else next_to.absolute().parent
    prefix = _FOLDER if next_to is None else _TEMPORARY
    _remove_stale(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}.", dir=parent) as name:
        yield name


def finite(value: Any) -> Any:
    """Return a value with None for infinite and undefined numbers: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _why(problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError):
        return "there is no such file"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror.lower()
    return str(problem)


def _keep_mode(target: Path, descriptor: int) -> None:
    """Give the new file the permissions of the one that it replaces."""
    with contextlib.suppress(OSError, AttributeError):  # no such file yet; no fchmod on Windows
        os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))


def _check_space(target: Path, size_bytes: int) -> None:
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(target.absolute().parent)
        if usage.total > 0 and usage.free < size_bytes:  # /proc and the like have no size at all
            raise _disk_full(target, size_bytes)


def _disk_full(target: Path, size_bytes: int) -> ResourceExhausted:
    free = shutil.disk_usage(target.absolute().parent).free
    reason = f"the disk is full: {size_bytes:,} bytes are needed, {free:,} are free"
    return ResourceExhausted("cannot write", file=target, reason=reason, remedy="free some space and run it again")


def _remove_stale(folder: Path, prefix: str) -> None:
    """Remove what killed processes of this user and host left in the folder."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            owner = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
            if not owner.isdigit() or _alive(int(owner)):
                continue
            status = (folder / name).lstat()
            if hasattr(os, "getuid") and status.st_uid != os.getuid():
                continue
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                (folder / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there, os.kill with signal 0 is Ctrl-C, not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # Windows cannot open a folder; its replace is durable with the file
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
