"""A secret that only this user can read: with it a run recognises what an earlier run of the same user wrote."""

from __future__ import annotations

import functools
import hashlib
import hmac
import logging
import os
import secrets
import stat
from pathlib import Path

from vit_edge.errors import printable

__all__ = ["config_folder", "signature", "user_folder"]

_KEY_BYTES = 32
_log = logging.getLogger(__name__)


def config_folder() -> Path:
    """Return the folder: $VIT_EDGE_CONFIG, else $XDG_CONFIG_HOME/vit-edge, else ~/.config/vit-edge."""
    return user_folder("CONFIG", ".config")


def user_folder(kind: str, in_home: str) -> Path:
    """Return vit-edge's folder of this user (XDG base directories); raises RuntimeError if no home folder is known."""
    # Not by platformdirs: a bundled application and a device that `--on` measures have numpy and Pillow only.
    chosen = os.environ.get(f"VIT_EDGE_{kind}")
    if chosen:
        return Path(chosen)
    base = os.environ.get(f"XDG_{kind}_HOME")
    home = Path(base) if base and Path(base).is_absolute() else Path.home() / in_home
    return home / "vit-edge"


def signature(data: bytes) -> str | None:
    """Return the HMAC-SHA256 of `data` under this user's key, made at the first call; None if no key can be kept."""
    try:
        key = _key(config_folder() / "cache.key")
    except RuntimeError:  # no home folder is known
        return None
    return None if key is None else hmac.new(key, data, hashlib.sha256).hexdigest()


@functools.cache
def _key(path: Path) -> bytes | None:
    try:
        if not os.path.lexists(path):
            _write_key(path)
        return _read_key(path)
    except OSError as error:  # a read-only or full disk: nothing is remembered
        _log.info("cannot keep a key in %s: %s", printable(path), error.strerror)
        return None


def _read_key(path: Path) -> bytes | None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        key = file.read(_KEY_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    is_private = os.name == "nt" or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    if len(key) == _KEY_BYTES and is_private:
        return key
    _log.warning(
        "%s is ignored: the key is not a file of %d bytes that only this user can read; remove the file",
        printable(path), _KEY_BYTES,
    )  # fmt: skip
    return None


def _write_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        os.link(temporary, path)
    except FileExistsError:  # another process was first: its key counts
        pass
    except OSError:  # a file system without hard links
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
