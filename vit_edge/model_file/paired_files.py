"""Files that belong together, such as a graph and its weights: a killed write leaves a pair that can be read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from vit_edge.errors import VitEdgeError
from vit_edge.files import prepared, read_file, sha256_hex, sync_folder

__all__ = ["read_partner", "remove_set_aside", "write_together"]

# What an older file is called until the file that belongs to its successor is in place.
_SET_ASIDE = ".vit-edge.previous."


def write_together(files: Mapping[Path, bytes | Iterable[bytes]]) -> None:
    """Write files that belong together as `write_atomic` does; the last one commits all of them.

    None is replaced before all are on the disk. Older versions of the files before the last are set aside until the
    last has its name: a process that is killed on the way leaves the older files, which `read_partner` finds.
    """
    with contextlib.ExitStack() as stack:
        written = [stack.enter_context(prepared(path, data)) for path, data in files.items()]
        *others, (temporary, target) = written
        stack.enter_context(_alone_in(target.absolute().parent))
        with _set_aside(other for _, other in others):
            for new, other in others:
                new.replace(other)
                sync_folder(other.absolute().parent)
            temporary.replace(target)
        sync_folder(target.absolute().parent)
        for _, other in others:
            remove_set_aside(other)


def read_partner(
    path: Path, *, what: str, max_bytes: int, error: type[VitEdgeError], belongs: Callable[[bytes], bool]
) -> bytes | None:
    """Return the bytes of `path` if they belong to the file that names them, else None; raises what `read_file` does.

    If they do not, a process may have been killed in `write_together`: what it had set aside is looked at too.
    """
    problem = None
    for place in (path, *_found_aside(path)):
        try:
            data = read_file(place, what=what, max_bytes=max_bytes, error=error)
        except error as caught:
            problem = problem or caught
            continue
        if belongs(data):
            return data
    if problem is not None:
        raise problem
    return None


def remove_set_aside(path: Path) -> None:
    """Remove older versions of a file that killed processes had set aside: nothing names them any more."""
    for place in _found_aside(path):
        with contextlib.suppress(OSError):
            place.unlink()


def _aside_prefix(target: Path) -> str:
    return f"{_SET_ASIDE}{sha256_hex(os.fsencode(target.name))[:16]}."


def _found_aside(path: Path) -> list[Path]:
    target = path.resolve() if path.is_symlink() else path
    prefix = _aside_prefix(target)
    with contextlib.suppress(OSError):
        return [target.with_name(name) for name in sorted(os.listdir(target.parent)) if name.startswith(prefix)]
    return []


@contextlib.contextmanager
def _set_aside(targets: Iterable[Path]) -> Iterator[None]:
    """Rename files before the block; each has its name again if the block cannot replace it."""
    kept: list[tuple[Path, Path]] = []
    try:
        for target in targets:
            place = target.with_name(f"{_aside_prefix(target)}{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):
                target.replace(place)
                kept.append((place, target))
        yield
    except OSError:  # not for Ctrl-C, which may come after the last rename
        for place, target in kept:
            place.replace(target)
        raise


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time rename files that belong together, so that two do not leave a mixed pair."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
