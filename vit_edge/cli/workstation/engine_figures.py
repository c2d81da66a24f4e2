"""What is printed of every verification, of a classifier or an encoder: the engines side by side, and the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vit_edge.cli.output import make_table

if TYPE_CHECKING:
    from rich.table import Table

    from vit_edge.export.verification.encoder_results import AnyVerification

__all__ = ["deciding_engine", "engines_table"]


def engines_table(result: AnyVerification, figures: Sequence[Mapping[str, str]], *, with_verdict: bool) -> Table:
    """Return one row for each figure and one column for each engine, whose `figures` are given."""
    each = [dict(entry) for entry in figures]
    if with_verdict:
        verdicts = [found.verdict for found in result.results]
        each = [{**entry, "verdict": verdict} for entry, verdict in zip(each, verdicts, strict=True)]
    rows = [(name, *(entry[name] for entry in each)) for name in each[0]]
    title = f"On {result.results[0].images} {'labelled ' if result.labels == 'all' else ''}images"
    return make_table(title, ("", *(entry.engine for entry in result.results)), rows)


def deciding_engine(result: AnyVerification) -> str:
    """Return the engine that decided the verdict, and of how many it is the worst."""
    others = len(result.results) - 1
    return result.decisive.engine + (f", the worst of {others + 1} engines" if others else "")
