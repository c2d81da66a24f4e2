"""Another model every 200 ms under load, every third of them damaged: who gets no answer, or a wrong one.

    python benchmarks/runtime/swapping.py ONE.onnx OTHER.onnx --images IMAGES [--seconds 30] [--interval-ms 200]

Two files that answer differently, a float one and its INT8 say, take turns in a pool that callers ask all the time. A
candidate with a changed byte, or with golden vectors of another network, must be refused. Every answer is held, bit for
bit, against those that each of the two files gave alone: one that neither gave is mixed. A swap that takes longer than
the interval is followed by the next at once. Writes a section of docs/results.md; ends with an error where an answer
was missing or mixed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from support.results import RESULTS, find_section, machine, new_file, versions, write_section
from support.timing import count

from vit_edge.data import find_images
from vit_edge.errors import GoldenMismatch, NotTrusted, Overloaded
from vit_edge.model_file.artifact import open_model
from vit_edge.runtime import Pool, installed_engines, load

SECTION = "swapping"
IMAGES = 24
# Swaps, refused ones too, however long they take.
FEWEST = 6

Verdict = Literal["one", "other", "both", "mixed", "failed"]


@dataclass(kw_only=True, slots=True)
class Asked:
    """What callers got: how many answers of each kind, and how long each took."""

    answers: Counter[Verdict] = field(default_factory=Counter)
    taken_ms: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, verdict: Verdict, taken_ms: float) -> None:
        with self.lock:
            self.answers[verdict] += 1
            self.taken_ms.append(taken_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine; times in milliseconds."""

    engine: str
    answers: int
    of_one: int
    of_other: int
    failed: int
    mixed: int
    swaps: int
    refused: int
    swap_p50_ms: float
    interval_p50_ms: float
    p50_ms: float
    p99_ms: float
    max_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs=2, metavar="MODEL.onnx")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seconds", type=count, default=30, help="for each engine")
    parser.add_argument("--interval-ms", type=count, default=200)
    parser.add_argument("--callers", type=count, default=4)
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--json", type=new_file, help="write every figure here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file with the section to write")
    arguments = parser.parse_args()
    find_section(SECTION, arguments.results)
    images = [path.read_bytes() for path in find_images(arguments.images)[:IMAGES]]
    with tempfile.TemporaryDirectory() as name:
        bad = damaged(arguments.models[1], Path(name))
        rows = [exchanged(engine, images, bad, arguments) for engine in installed_engines()]
    written = table(rows, arguments)
    print(written)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows]) + "\n", encoding="utf-8")
    write_section(SECTION, written, arguments.results)
    if any(row.failed or row.mixed or not row.of_one or not row.of_other for row in rows):
        raise SystemExit("an answer failed or was mixed, or one of the two files never answered")


def damaged(good: Path, folder: Path) -> list[Path]:
    """Write candidates that must never serve: one with a changed byte, one with golden vectors of another network."""
    data, model = good.read_bytes(), open_model(good)
    golden = dict(model.manifest.golden or {})
    golden["seeds"] = [seed + 1000 for seed in golden["seeds"]]
    (folder / "changed.onnx").write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    (folder / "another.onnx").write_bytes(model.with_manifest(replace(model.manifest, golden=golden)))
    return [folder / "changed.onnx", folder / "another.onnx"]


def exchanged(engine: str, images: Sequence[bytes], bad: Sequence[Path], arguments: argparse.Namespace) -> Row:
    """Return what became of the answers of one engine."""
    alone = [answers_of(path, engine, images) for path in arguments.models]
    asked, stop = Asked(), threading.Event()
    settings: dict[str, Any] = {"engine": engine, "workers": arguments.workers, "queue_size": 2 * arguments.callers}
    with Pool(arguments.models[0], **settings) as pool:
        callers = [
            threading.Thread(target=call, args=(pool, images, alone, asked, stop, number))
            for number in range(arguments.callers)
        ]
        for caller in callers:
            caller.start()
        taken_ms, begun, refused = swap_by_the_clock(pool, arguments, bad)
        stop.set()
        for caller in callers:
            caller.join()
    return Row(
        engine=engine,
        answers=len(asked.taken_ms),
        of_one=asked.answers["one"],
        of_other=asked.answers["other"],
        failed=asked.answers["failed"],
        mixed=asked.answers["mixed"],
        swaps=len(taken_ms) - refused,
        refused=refused,
        swap_p50_ms=float(np.median(taken_ms)),
        interval_p50_ms=float(np.median(np.diff(begun)) * 1000),
        p50_ms=float(np.median(asked.taken_ms)),
        p99_ms=float(np.percentile(asked.taken_ms, 99)),
        max_ms=float(np.max(asked.taken_ms)),
    )


def answers_of(path: Path, engine: str, images: Sequence[bytes]) -> list[Any]:
    with load(path, engine=engine, threads=1) as classifier:  # type: ignore[arg-type]
        return [classifier(image).answers for image in images]


def call(
    pool: Pool, images: Sequence[bytes], alone: list[list[Any]], asked: Asked, stop: threading.Event, position: int
) -> None:
    """Ask until `stop`; where the pool is full, ask again."""
    while not stop.is_set():
        position = (position + 1) % len(images)
        started = time.perf_counter()
        try:
            answers = pool.submit(images[position]).result(60).answers
        except Overloaded:
            time.sleep(0.001)
            continue
        except Exception:  # whatever it is, it is no answer
            asked.keep("failed", (time.perf_counter() - started) * 1000)
            continue
        asked.keep(judged(answers, *(each[position] for each in alone)), (time.perf_counter() - started) * 1000)


def judged(answers: Any, of_one: Any, of_other: Any) -> Verdict:
    if answers == of_one:
        return "both" if of_one == of_other else "one"
    return "other" if answers == of_other else "mixed"


def swap_by_the_clock(
    pool: Pool, arguments: argparse.Namespace, bad: Sequence[Path]
) -> tuple[list[float], list[float], int]:
    """Return how long each swap took, when it began in seconds, and how many were refused as they should."""
    taken_ms: list[float] = []
    begun: list[float] = []
    refused, start = 0, time.monotonic()
    while time.monotonic() - start < arguments.seconds or len(begun) < FEWEST:
        number = len(begun)
        time.sleep(max(0.0, begun[-1] + arguments.interval_ms / 1000 - time.monotonic()) if begun else 0.0)
        begun.append(time.monotonic())
        if number % 3 == 2:
            try:
                pool.swap(bad[number % 2])
            except (GoldenMismatch, NotTrusted):
                refused += 1
            else:
                raise SystemExit("a damaged candidate serves")
        else:
            pool.swap(arguments.models[1 - number % 3])
        taken_ms.append((time.monotonic() - begun[-1]) * 1000)
    return taken_ms, begun, refused


def table(rows: list[Row], arguments: argparse.Namespace) -> str:
    names = " and ".join(f"`{path.name}`" for path in arguments.models)
    asked = f"{arguments.callers} callers, {arguments.workers} workers, {arguments.seconds} s an engine"
    rhythm = f"a swap every {arguments.interval_ms} ms, or as soon as the one before is over"
    columns = "engine | swaps | refused | a swap, every | answers | of each file | failed | mixed | p50 / p99 / worst"
    return "\n".join(
        [
            f"{names} in turn, {rhythm}; {asked}. {machine()}, {versions()}.",
            "",
            f"| {columns} |",
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row.engine} | {row.swaps} | {row.refused} "
                f"| {row.swap_p50_ms:.0f} ms, {row.interval_p50_ms:.0f} ms "
                f"| {row.answers:,} | {row.of_one:,}, {row.of_other:,} | {row.failed} | {row.mixed} "
                f"| {row.p50_ms:.1f} / {row.p99_ms:.1f} / {row.max_ms:.1f} ms |"
                for row in rows
            ),
        ]
    )


if __name__ == "__main__":
    main()
