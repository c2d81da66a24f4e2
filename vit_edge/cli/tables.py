"""Tables that fit the terminal: where a word would be broken, the rows are stacked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["make_table"]

_NUMBER = re.compile(r"-?[\d.e+-]+( %| MB| GB)?")


class _Table(Table):
    """A table that shows each row as a list of its cells where the columns do not fit side by side."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = [[str(column.header), *map(str, column.cells)] for column in self.columns]
        least = [max((cell_len(word) for text in each for word in text.split()), default=1) for each in texts]
        spare = options.max_width - self._extra_width - sum(least) - len(least)
        if spare >= 0:
            _widen(self, least, [max(map(cell_len, each)) for each in texts], spare)
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), style="italic")
        names = [str(column.header) for column in self.columns]
        for row in zip(*(list(column.cells) for column in self.columns), strict=True):
            block = Table.grid(padding=(0, 2))
            block.add_column(no_wrap=True)
            block.add_column(overflow="fold")
            for name, cell in zip(names, row, strict=True):
                block.add_row(name, cell)
            yield ""
            yield block


def _widen(table: Table, least: Sequence[int], most: Sequence[int], spare: int) -> None:
    """Give each column its longest word, and what is left to the columns that need least of it first."""
    for position in sorted(range(len(least)), key=lambda n: most[n] - least[n]):
        more = min(most[position] - least[position], spare)
        table.columns[position].width = least[position] + more
        spare -= more


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table: text to the left, numbers (given as text) to the right; columns without any value are dropped."""
    kept = [n for n in range(len(columns)) if not rows or n == 0 or any(str(row[n]) != "-" for row in rows)]
    table = _Table(title=title or None, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for position in kept:
        numeric = bool(rows) and _NUMBER.fullmatch(str(rows[0][position])) is not None
        table.add_column(columns[position], justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(row[position]) for position in kept))
    return table
