"""Standard output and standard error as people have them: not UTF-8, closed, or a pipe without a reader."""

from __future__ import annotations

import codecs
import io
import os
import sys

__all__ = ["drop_stdout", "holds_unicode", "prepare_streams"]


def prepare_streams() -> None:
    """Let any text be printed: characters that the encoding lacks are escaped, and a closed stream takes everything."""
    for descriptor in (0, 1, 2):
        _occupy(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def holds_unicode() -> bool:
    """Return whether standard output can encode every character."""
    try:
        return codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name.startswith("utf")
    except LookupError:
        return False


def drop_stdout() -> None:
    """Keep the interpreter from flushing what is left into an output that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _occupy(descriptor: int) -> None:
    """Give a closed descriptor a place to write to: the next file that is opened would take its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
