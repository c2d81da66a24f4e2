"""Tables that never break a word: if a table is wider than the terminal, each row becomes lines of `column: value`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vit_edge.cli.messages import coloured
from vit_edge.errors import escaped

__all__ = ["FittingTable"]

# Between two columns of the box that is used.
_GAP = 2
# Names and values.
_FIELDS = 2
_NO_VALUE = ("-", "")


class FittingTable(Table):
    """A table: text to the left, numbers (given as text) to the right; a column without any value is dropped."""

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        kept = [
            at
            for at in range(len(columns))
            if at == 0 or not rows or any(str(row[at]) not in _NO_VALUE for row in rows)
        ]
        columns, rows = [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]
        super().__init__(
            title=escaped(title) or None, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True
        )
        self.names, self.cells = tuple(columns), [tuple(escaped(str(cell)) for cell in row) for row in rows]
        for at, name in enumerate(self.names):
            numeric = bool(rows) and re.fullmatch(r"-?[\d.e+-]+( %| MB)?", self.cells[0][at]) is not None
            least = max(_longest_word(row[at]) for row in (self.names, *self.cells))
            self.add_column(name, justify="right" if numeric else "left", overflow="fold", min_width=least)
        for row in self.cells:
            self.add_row(*map(coloured, row))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        spare = options.max_width - sum((column.min_width or 0) + _GAP for column in self.columns)
        if spare < 0 and len(self.columns) == _FIELDS and (self.columns[1].min_width or 0) + spare > 0:
            self.columns[1].min_width = (self.columns[1].min_width or 0) + spare  # only a value is that long
            spare = 0
        if spare >= 0:
            self._widen(spare)
            yield from super().__rich_console__(console, options)
            return
        yield Text(str(self.title)) if self.title else ""
        for first, *others in self.cells:
            yield Padding(Text(first or "-"), (0, 0, 0, 2))
            for name, value in zip(self.names[1:], others, strict=True):
                if value:
                    yield Padding(coloured(f"{name}: {value}" if name else value), (0, 0, 0, 6))
        yield ""

    def _widen(self, spare: int) -> None:
        """Give what is left of the line to the columns that need least of it first."""
        least = [column.min_width or 0 for column in self.columns]
        most = [max(map(cell_len, texts)) for texts in zip(self.names, *self.cells, strict=True)]
        for at in sorted(range(len(least)), key=lambda at: most[at] - least[at]):
            more = max(0, min(most[at] - least[at], spare))
            self.columns[at].width, spare = least[at] + more, spare - more


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)
