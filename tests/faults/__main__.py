"""`python -m tests.faults`: run every row and print a table: the fault, its result, and the seconds it took.

Arguments go to pytest, for example `-k golden`.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vit_edge.cli.output import make_table

_WORST = ("failed", "error", "skipped", "passed")


class _Table:
    """A pytest plugin that keeps one row for each test."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::", 1)[-1].removeprefix("test_").replace("_", " ")
        result = "error" if report.failed and report.when != "call" else report.outcome
        before, seconds = self.rows.get(name, ("passed", 0.0))
        self.rows[name] = min(before, result, key=_WORST.index), seconds + report.duration


def main(arguments: list[str]) -> int:
    """Print the table; return pytest's exit code."""
    table = _Table()
    folder = str(Path(__file__).parent)
    with contextlib.redirect_stdout(sys.stderr):  # progress and failures; the table alone goes to stdout
        code = pytest.main([folder, "-n", "0", "-q", "--no-header", *arguments], plugins=[table])
    rows = [(name, result, f"{seconds:.1f}") for name, (result, seconds) in table.rows.items()]
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(make_table("", ("fault", "result", "seconds"), rows))
    results = [result for result, _ in table.rows.values()]
    console.print(", ".join(f"{results.count(kind)} {kind}" for kind in reversed(_WORST) if kind in results))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
