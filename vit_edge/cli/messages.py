"""What commands print on stderr, and the colours of verdicts: only in a terminal, and not with NO_COLOR."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["coloured", "print_message"]

_COLOURS = {
    "pass": "green",
    "fail": "red",
    "inconclusive": "yellow",
    "INVALID": "red",
    "problem": "red",
    "error": "red",
    "warning": "yellow",
    "advice": "yellow",
}
# A verdict is a cell of its own, or the first word of a line or of what follows its subject: "speed: fail, ...".
_VERDICT = re.compile(rf"(?:[\w ]+: )?({'|'.join(_COLOURS)})(?=[:,]|$)")


def coloured(text: str) -> Text:
    """Return a line or a cell with its verdict in colour."""
    from rich.text import Text

    shown, found = Text(text), _VERDICT.match(text)
    if found:
        shown.stylize(f"bold {_COLOURS[found[1]]}", *found.span(1))
    return shown


def print_message(text: str, *, label: str = "") -> None:
    """Print a text on stderr, `label: ` in its colour before it; in a terminal lines end between words.

    It is written to `sys.stderr` as it is now: while a bar is drawn, the text goes above it.
    """
    text = f"{label}: {text}" if label else text
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        lines = [
            textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
        ]
        text = "\n".join("\n".join(wrapped) for wrapped in lines)
        if label and not os.environ.get("NO_COLOR"):
            text = click.style(f"{label}:", fg=_COLOURS.get(label), bold=True) + text.removeprefix(f"{label}:")
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
