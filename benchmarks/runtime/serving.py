"""A pool under three times the load that it can answer: refusals at once, what was taken in time, memory flat.

    python benchmarks/runtime/serving.py MODEL.onnx --images IMAGES [--workers 1] [--queue-size 8] [--seconds 20]

First the service time: one request after the other. Then requests arrive by the clock, at three times the rate at which
the pool answers, whatever becomes of those before (an open loop). Files lie in memory: decoding is part of the service.
Writes a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from support.memory import rss_bytes
from support.results import RESULTS, find_section, machine, new_file, versions, write_section
from support.timing import count

from vit_edge.data import find_images
from vit_edge.errors import Overloaded
from vit_edge.runtime import Pool, installed_engines

SECTION = "serving"
TIMES_CAPACITY = 3
# What the bound on the 99th percentile leaves for noise.
SLACK = 1.5
# A refusal comes within this, and memory is flat where it grows by no more than this.
REFUSED_MS, GROWN_BYTES = 5.0, 5_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine under overload; times in milliseconds, memory in bytes."""

    engine: str
    service_p50_ms: float
    capacity_per_s: float
    offered_per_s: float
    accepted: int
    refused: int
    answered_per_s: float
    refusal_p99_ms: float
    refusal_max_ms: float
    accepted_p50_ms: float
    accepted_p99_ms: float
    bound_ms: float
    rss_before: int
    rss_after: int

    @property
    def broken(self) -> list[str]:
        """Return the bounds that did not hold."""
        held = {
            f"a refusal took {self.refusal_max_ms:.1f} ms": self.refusal_max_ms <= REFUSED_MS,
            "answers came later than the bound": self.accepted_p99_ms <= self.bound_ms,
            "memory grew": self.rss_after - self.rss_before <= GROWN_BYTES,
        }
        return [name for name, is_held in held.items() if not is_held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--queue-size", type=count, default=8)
    parser.add_argument("--seconds", type=count, default=20)
    parser.add_argument("--json", type=new_file, help="write every figure here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file with the section to write")
    arguments = parser.parse_args()
    find_section(SECTION, arguments.results)
    images = [path.read_bytes() for path in find_images(arguments.images)[:50]]
    rows = [overloaded(engine, images, arguments) for engine in installed_engines()]
    written = table(rows, arguments)
    print(written)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows]) + "\n", encoding="utf-8")
    write_section(SECTION, written, arguments.results)


def overloaded(engine: str, images: list[bytes], arguments: argparse.Namespace) -> Row:
    settings = {"workers": arguments.workers, "queue_size": arguments.queue_size}
    with Pool(arguments.model, engine=engine, **settings) as pool:  # type: ignore[arg-type]
        service_ms = np.array([answered(pool, image) for image in images * 4][len(images) :])
        capacity = arguments.workers * 1000 / float(np.median(service_ms))
        rate = TIMES_CAPACITY * capacity
        offered(pool, images, rate, 2)  # until memory has settled
        before = rss_bytes()
        refused_ms, taken_ms, seconds = offered(pool, images, rate, arguments.seconds)
        after = rss_bytes()
    return Row(
        engine=engine,
        service_p50_ms=float(np.median(service_ms)),
        capacity_per_s=capacity,
        offered_per_s=(len(refused_ms) + len(taken_ms)) / seconds,
        accepted=len(taken_ms),
        refused=len(refused_ms),
        answered_per_s=len(taken_ms) / seconds,
        refusal_p99_ms=float(np.percentile(refused_ms, 99)),
        refusal_max_ms=float(np.max(refused_ms)),
        accepted_p50_ms=float(np.median(taken_ms)),
        accepted_p99_ms=float(np.percentile(taken_ms, 99)),
        bound_ms=(arguments.queue_size + 1) * float(np.median(service_ms)) * SLACK,
        rss_before=before,
        rss_after=after,
    )


def answered(pool: Pool, image: bytes) -> float:
    started = time.perf_counter()
    pool.submit(image).result()
    return (time.perf_counter() - started) * 1000


def offered(pool: Pool, images: list[bytes], rate: float, seconds: float) -> tuple[list[float], list[float], float]:
    """Return the times of refusals and of answers in milliseconds, for requests that arrive by the clock."""
    refused_ms: list[float] = []
    taken_ms: list[float] = []
    waiting = []
    source = cycle(images)
    began = time.perf_counter()
    number = 0
    while (now := time.perf_counter()) - began < seconds:
        due = began + number / rate
        if now < due:
            time.sleep(min(due - now, 0.001))
            continue
        number += 1
        started = time.perf_counter()
        try:
            future = pool.submit(next(source))
        except Overloaded:
            refused_ms.append((time.perf_counter() - started) * 1000)
            continue
        future.add_done_callback(lambda _, at=started: taken_ms.append((time.perf_counter() - at) * 1000))
        waiting = [other for other in waiting if not other.done()]
        waiting.append(future)
    took = time.perf_counter() - began
    for future in waiting:
        future.result()
    return refused_ms, taken_ms, took


def table(rows: list[Row], arguments: argparse.Namespace) -> str:
    kept = f"{arguments.workers} workers with 1 thread each, a queue of {arguments.queue_size}, {arguments.seconds} s"
    bounds = f"The bound is (queue + 1) x service time x {SLACK}; the worst refusal may take {REFUSED_MS:g} ms"
    bounds += f", memory may grow by {GROWN_BYTES / 1e6:g} MB"
    columns = (
        "engine | service, p50 | offered | answered | refused | refused in, p99 / worst | accepted, p50 / p99 | bound"
    )
    return "\n".join(
        [
            f"{kept}. {machine()}, {versions()}. {bounds}.",
            "",
            f"| {columns} | memory before, after | within bounds |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row.engine} | {row.service_p50_ms:.1f} ms "
                f"| {row.offered_per_s:.0f} /s | {row.answered_per_s:.0f} /s "
                f"| {row.refused:,} of {row.refused + row.accepted:,} "
                f"| {row.refusal_p99_ms:.3f} / {row.refusal_max_ms:.2f} ms "
                f"| {row.accepted_p50_ms:.1f} / {row.accepted_p99_ms:.1f} ms | {row.bound_ms:.1f} ms "
                f"| {row.rss_before / 1e6:.1f}, {row.rss_after / 1e6:.1f} MB | {'; '.join(row.broken) or 'yes'} |"
                for row in rows
            ),
        ]
    )


if __name__ == "__main__":
    main()
