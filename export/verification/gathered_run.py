"""Verification with what a job on a cluster computed: its shards have the outputs of both models for each image."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_edge.data import Rejections
from vit_edge.errors import ImageRejected, printable
from vit_edge.export.verification.paired_run import EvaluationImages, OpenCandidate, ReferenceRun
from vit_edge.metrics import Logits
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress
from vit_edge.runtime.batch.inputs import JobInput
from vit_edge.runtime.batch.shard_files import read_rows

__all__ = ["GatheredRun", "job_inputs"]

_log = logging.getLogger(__name__)


def job_inputs(images: EvaluationImages) -> tuple[JobInput, ...]:
    """Return the evaluation images as the inputs of a job, in their order."""
    return tuple(JobInput(name=printable(path), source=path) for path in images.paths)


class GatheredRun(ReferenceRun):
    """Evaluation images and what both models gave for them, from the shards of a job; nothing is decoded or run here.

    Raises DataRejected as a verification on this machine does: if over 1 % of the images cannot be used.
    """

    def __init__(self, reference: ModelFile, images: EvaluationImages, shards: Sequence[Path]) -> None:
        super().__init__(reference, images)
        self._shards = tuple(shards)
        self._used: list[int] = []
        self._find_different()

    def outputs(
        self, model: ModelFile, *, engine: str, progress: Progress, candidate: OpenCandidate | None = None
    ) -> Iterator[tuple[Logits, Logits]]:
        """Yield what both models gave for the different images of one shard after the other."""
        used, position = set(self._used), 0
        for number, shard in enumerate(self._shards):
            progress(f"comparing in {engine}", number, len(self._shards))
            rows = read_rows(shard, [f"reference_{engine}", f"candidate_{engine}"])
            kept = [row for place, row in enumerate(rows, start=position) if place in used]
            position += len(rows)
            if kept:
                yield _stacked(kept, f"reference_{engine}"), _stacked(kept, f"candidate_{engine}")
        progress(f"comparing in {engine}", len(self._shards), len(self._shards))

    def _find_different(self) -> None:
        """Find each distinct image that could be used."""
        rejections, position, num_good = Rejections(self.images.num_images), 0, 0
        found: dict[str, tuple[int, str]] = {}
        for shard in self._shards:
            for row in read_rows(shard, ["path", "error", "pixels_sha256", "fingerprint"]):
                if row["error"] is not None:
                    rejections.add(_rejected(row))
                else:
                    num_good += 1
                    found.setdefault(row["pixels_sha256"], (position, row["fingerprint"]))
                position += 1
        rejections.conclude()
        if num_good > len(found):
            _log.warning("%d images are duplicates of others and were counted once", num_good - len(found))
        self._used = [place for place, _ in found.values()]
        self._hashes, self._fingerprints = tuple(found), tuple(mark for _, mark in found.values())
        self.images = self.images.at(self._used)


def _stacked(rows: Sequence[dict[str, Any]], name: str) -> Logits:
    return np.stack([row[name] for row in rows]).astype(np.float32, copy=False)


def _rejected(row: dict[str, Any]) -> ImageRejected:
    return ImageRejected("cannot read the image", file=row["path"], reason=row["error"], remedy="mend or remove it")
