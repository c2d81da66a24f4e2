"""What one worker does: load the model once, classify the images of a shard, write its Parquet file. No Ray here."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.errors import ImageRejected, MissingExtra
from vit_edge.files import sha256_hex, write_atomic
from vit_edge.runtime.batch.inputs import JobInput, read_input
from vit_edge.runtime.loading import load

__all__ = ["COLUMNS", "ShardClassifier", "ShardSummary", "shard_path"]

COLUMNS = ("path", "sha256", "label", "probability", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSummary:
    """One finished shard: how many images and errors, how long it took, and what ran it."""

    shard: int
    images: int
    errors: int
    seconds: float
    worker: str
    instruction_set: str
    engine: str


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"part-{shard:06d}.parquet"


class ShardClassifier:
    """A loaded model that classifies shards; `options` are those of `load`."""

    def __init__(self, model: bytes, *, out: Path, options: Mapping[str, Any]) -> None:
        self._classifier = load(model, **options)
        self._limits, self._out = options.get("limits"), out
        described = self._classifier.describe()
        self._instruction_set = str(described["instruction_set"])
        self._engine = f"{described['engine']} {described['engine_version']}"

    def run(self, shard: int, inputs: Sequence[JobInput]) -> ShardSummary:
        """Classify the images of one shard and write its file, whole or not at all; a bad image is a row."""
        started = time.perf_counter()
        rows = [self._row(item) for item in inputs]
        write_atomic(shard_path(self._out, shard), _parquet(rows))
        return ShardSummary(
            shard=shard,
            images=len(rows),
            errors=sum(row["error"] is not None for row in rows),
            seconds=time.perf_counter() - started,
            worker=f"{platform.node()}:{os.getpid()}",
            instruction_set=self._instruction_set,
            engine=self._engine,
        )

    def close(self) -> None:
        """Free the model."""
        self._classifier.close()

    def _row(self, item: JobInput) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"path": item.name}
        try:
            data = read_input(item, self._limits)
            row["sha256"] = sha256_hex(data)
            prediction = self._classifier(data, top=1)
        except ImageRejected as error:
            return row | {"error": error.reason}
        return row | {"label": prediction.label, "probability": prediction.probability}


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        remedy = 'pip install "vit-edge[ray]"'
        raise MissingExtra("cannot write the results", reason="Parquet needs pyarrow", remedy=remedy) from error
    kinds = {"probability": pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COLUMNS])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema), buffer)
    return buffer.getvalue()
