"""Progress as lines of text, for a stderr that is no terminal: one line per stage, and one every ten seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from vit_edge.progress import Progress

__all__ = ["progress_lines"]

_EVERY_S = 10.0


@contextmanager
def progress_lines(*, announce: bool = True, every_s: float = _EVERY_S) -> Iterator[Progress]:
    """Yield a Progress that prints each stage when it begins, and again every `every_s` seconds while it goes on.

    Without `announce` the line at the beginning is left out.
    """
    lines, ended = _Lines(announce=announce), threading.Event()
    thread = threading.Thread(target=lines.repeat, args=(ended, every_s), daemon=True)
    thread.start()
    try:
        yield lines.report
    finally:
        ended.set()
        thread.join()


class _Lines:
    """The stage that runs now, and how much of it is done."""

    def __init__(self, *, announce: bool) -> None:
        self._announce = announce
        self._stage, self._done, self._total = "", 0, 0

    def report(self, stage: str, done: int, total: int) -> None:
        is_new = stage != self._stage
        self._stage, self._done, self._total = stage, done, total
        if is_new and self._announce:
            click.echo(stage, err=True)

    def repeat(self, ended: threading.Event, every_s: float) -> None:
        """Print a line every `every_s` seconds until `ended`: also while a library reports nothing."""
        while not ended.wait(every_s):
            if self._stage:
                click.echo(f"{self._stage}: {self._done} of {self._total}", err=True)
