"""Classify every `world`-th image of a list with a Pool of one worker: what a job is compared with.

python pool_process.py MODEL LIST RANK WORLD OUT.parquet
"""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from vit_edge.runtime import Pool


def main() -> None:
    model, listed, rank, world, out = sys.argv[1:]
    paths = Path(listed).read_text().split()[int(rank) :: int(world)]
    waiting: deque[tuple[str, Future[Any]]] = deque()
    rows = list[dict[str, Any]]()

    def take() -> None:
        path, future = waiting.popleft()
        found = future.result()
        rows.append({"path": path, "label": found.label, "probability": found.probability})

    with Pool(model, workers=1, threads=1, queue_size=8) as pool:
        for path in paths:
            if len(waiting) == 8:
                take()
            waiting.append((path, pool.submit(path, top=1)))
        while waiting:
            take()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)


if __name__ == "__main__":
    main()
