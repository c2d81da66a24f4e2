"""Progress of a command on stderr: one bar in a terminal, lines elsewhere, nothing with -q."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from vit_edge.progress import Display, Progress, shown_progress, silent

__all__ = ["command_progress", "progress_bar", "show_detail"]

_KEY = "vit_edge.progress"


@contextmanager
def command_progress(*, quiet: bool) -> Iterator[None]:
    """Show what the command reports, and that it works while it reports nothing, for the time of the block."""
    if quiet or os.environ.get("RANK", "0") != "0":  # one process of many speaks
        yield
        return
    with shown_progress() as display:
        loading = _Loading(display)
        sys.meta_path.insert(0, loading)
        try:
            click.get_current_context().meta[_KEY] = display
            yield
        finally:
            sys.meta_path.remove(loading)


@contextmanager
def progress_bar(stage: str = "") -> Iterator[Progress]:
    """Yield what shows the progress of the command; `stage` is what it does first."""
    progress = click.get_current_context().meta.get(_KEY, silent)
    if stage:
        progress(stage, 0, 0)
    yield progress


def show_detail(text: str) -> None:
    """Show this behind the stage that the command reported last."""
    display = click.get_current_context().meta.get(_KEY)
    if display is not None:
        display.detail(text)


class _Loading:
    """Announces PyTorch before its import, which takes seconds, up to half a minute from a cold disk."""

    def __init__(self, display: Display) -> None:
        self._display, self._announced = display, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> None:
        """Find nothing: the real finders come next."""
        if fullname == "torch" and not self._announced:
            self._announced = True
            self._display.announce("loading PyTorch")
