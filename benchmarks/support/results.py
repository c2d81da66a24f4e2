"""Where measured figures go: a section of docs/results.md between two markers, and the machine they came from."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from vit_edge import __version__
from vit_edge.machine.cpu import cpu_name, instruction_set, usable_threads

RESULTS = Path(__file__).resolve().parent.parent.parent / "docs" / "results.md"


def write_section(name: str, markdown: str, path: Path = RESULTS) -> None:
    """Replace what docs/results.md, or `path`, has between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end, text = find_section(name, path)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
    path.write_text(pattern.sub(lambda _: f"{begin}\n{markdown.strip()}\n{end}", text), encoding="utf-8")


def find_section(name: str, path: Path = RESULTS) -> tuple[str, str, str]:
    """Return the section's two markers and the whole text; ends the program where they are not there."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from error
    if begin not in text or end not in text:
        raise SystemExit(f"{path} has no section {begin} ... {end}; add the two lines where it belongs")
    return begin, end, text


def new_file(text: str) -> Path:
    """Return the path of a file to write, from the command line: better refused now than after the run."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: no such folder, or a folder itself")
    return path


def machine() -> str:
    """Return the CPU, its strongest integer instructions and the threads that this process may use."""
    return f"{cpu_name()} ({instruction_set()}), {usable_threads()} threads"


def versions() -> str:
    """Return the versions of ours, of the engines and of the tools that are installed."""
    names = [name for name in ("onnxruntime", "openvino", "nncf") if importlib.util.find_spec(name)]
    return ", ".join([f"vit-edge {__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in names)])
