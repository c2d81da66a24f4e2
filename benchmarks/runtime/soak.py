"""Does anything grow? Hundreds of thousands of answers, and hundreds of loads, in one process for each engine.

    python benchmarks/runtime/soak.py MODEL.onnx [--runs 200000] [--cycles 200]

Resident memory is read 200 times along the runs; its slope is a least squares line through what comes after the first
fifth. After a warm-up of a tenth of the cycles, threads, file handles and memory have to be what they were.
Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from support.memory import num_files, num_threads, rss_bytes
from support.results import RESULTS, find_section, machine, new_file, versions, write_section
from support.timing import count

from vit_edge.runtime import installed_engines, load
from vit_edge.runtime.checks.golden import golden_images

SECTION = "soak"
SAMPLES = 200
# For each 100,000 answers, and of all loads together.
MOST_BYTES = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--cycles", type=count, default=200)
    parser.add_argument("--json", type=new_file, help="write every figure here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file with the section to write")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # a process of its own for each
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(soak(arguments)))
        return
    find_section(SECTION, arguments.results)
    rows = [in_a_process(engine, arguments) for engine in installed_engines()]
    written = table(rows, arguments)
    print(written)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    write_section(SECTION, written, arguments.results)


def in_a_process(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--runs", str(arguments.runs), "--cycles", str(arguments.cycles), "--engine", engine]
    done = subprocess.run(
        [sys.executable, __file__, arguments.model, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "engine": arguments.engine,
        **answers(arguments.model, arguments.engine, arguments.runs),
        **cycles(arguments.model, arguments.engine, arguments.cycles),
    }


def answers(model: Path, engine: str, runs: int) -> dict[str, Any]:
    """Return the slope of the resident memory over `runs` answers, in bytes for each 100,000."""
    with load(model, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
        height, width = classifier.manifest.preprocessing.crop
        images = golden_images(range(16), height=height, width=width)
        expected = [classifier(image).label for image in images]
        position, memory = [], []
        wrong = 0
        for number in range(runs):
            wrong += classifier(images[number % 16]).label != expected[number % 16]
            if number % max(1, runs // SAMPLES) == 0:
                position.append(number)
                memory.append(rss_bytes())
                print(f"{engine}: {number:,} of {runs:,}", file=sys.stderr, end="\r")
    kept = len(position) // 5
    slope = float(np.polyfit(position[kept:], memory[kept:], 1)[0])
    grown = memory[-1] - memory[kept]
    return {"runs": runs, "wrong": wrong, "slope_bytes": slope * 100_000, "grown_bytes": grown, "rss": memory[-1]}


def cycles(model: Path, engine: str, count_of: int) -> dict[str, Any]:
    """Return what is left after `count_of` loads beyond what was there after the first tenth of them."""

    def once() -> None:
        with load(model, engine=engine, threads=2) as classifier:  # type: ignore[arg-type]
            height, width = classifier.manifest.preprocessing.crop
            classifier(golden_images([1], height=height, width=width)[0])

    def state() -> tuple[int, int, int]:
        gc.collect()
        return num_threads(), num_files(), rss_bytes()

    for _ in range(max(1, count_of // 10)):
        once()
    before = state()
    for number in range(count_of):
        once()
        print(f"{engine}: {number} of {count_of} loads  ", file=sys.stderr, end="\r")
    left = [now - then for now, then in zip(state(), before, strict=True)]
    return {"cycles": count_of, "threads_left": left[0], "files_left": left[1], "rss_left": left[2]}


def broken(row: dict[str, Any]) -> list[str]:
    """Return the bounds that did not hold."""
    held = {
        "answers were wrong": row["wrong"] == 0,
        "answers cost memory": row["slope_bytes"] <= MOST_BYTES,
        "loads left threads or files": max(row["threads_left"], row["files_left"]) <= 0,
        "loads left memory": row["rss_left"] <= MOST_BYTES,
    }
    return [name for name, is_held in held.items() if not is_held]


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    grown = "memory for each 100,000 | grown after the first fifth"
    columns = f"engine | answers | wrong | {grown} | loads | threads, files left | memory left | within bounds"
    return "\n".join(
        [
            f"`{arguments.model.name}`, batch 1. {machine()}, {versions()}.",
            "",
            f"| {columns} |",
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row['engine']} | {row['runs']:,} | {row['wrong']} | {row['slope_bytes'] / 1e6:+.3f} MB "
                f"| {row['grown_bytes'] / 1e6:+.2f} MB | {row['cycles']} | {row['threads_left']}, {row['files_left']} "
                f"| {row['rss_left'] / 1e6:+.2f} MB | {'; '.join(broken(row)) or 'yes'} |"
                for row in rows
            ),
        ]
    )


if __name__ == "__main__":
    main()
