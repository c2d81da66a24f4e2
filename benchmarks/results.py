"""Where measured figures go: a section of docs/results.md between two markers, and the machine they came from."""

from __future__ import annotations

import re
from pathlib import Path

from vit_edge.cpu import cpu_name, instruction_set, usable_threads

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"


def write_section(name: str, markdown: str) -> None:
    """Replace what docs/results.md has between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = RESULTS.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"{RESULTS} has no section {begin} ... {end}; add the two lines where it belongs")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
    RESULTS.write_text(pattern.sub(lambda _: f"{begin}\n{markdown.strip()}\n{end}", text), encoding="utf-8")


def machine() -> str:
    """Return the CPU, its strongest integer instructions and the threads that this process may use."""
    return f"{cpu_name()} ({instruction_set()}), {usable_threads()} threads"
