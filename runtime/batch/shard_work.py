"""What one worker does with a shard: read its images, run the model, return a Parquet file. No Ray here.

A task is sent to each worker once, with the bytes of its models; `open` loads them there, with all checks.
"""

from __future__ import annotations

import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from vit_edge.data.near_duplicates import fingerprint
from vit_edge.errors import ImageRejected
from vit_edge.files import sha256_hex
from vit_edge.image import Pixels, pixel_hash
from vit_edge.machine.cpu import cpu_name, instruction_set
from vit_edge.runtime.batch.inputs import JobInput, read_input
from vit_edge.runtime.batch.shard_files import Origin, to_parquet
from vit_edge.runtime.classifier import Classifier, as_classifier
from vit_edge.runtime.encoder import Encoder, as_encoder
from vit_edge.runtime.loaded_model import LoadedModel, Prepared
from vit_edge.runtime.loading import load

__all__ = ["ClassifyTask", "CompareTask", "EmbedTask", "ShardWorker", "Task"]

# One image after the other, as `classify` does: its logits do not depend on others of a batch.
_AT_ONCE = 1
# As `vit-edge verify` does.
_AT_ONCE_COMPARED = 16
# A row, and the image that belongs to it.
_Ready: TypeAlias = "tuple[dict[str, Any], Prepared]"


class ShardWorker(ABC):
    """Loaded models that run shards; `columns` are those of `to_parquet`, besides path, sha256 and error."""

    columns: Mapping[str, int | None]

    def __init__(self, model: LoadedModel, options: Mapping[str, Any], *, at_once: int) -> None:
        self._model, self._limits, self._at_once = model, options.get("limits"), at_once
        self._engine = _engine_of(model)

    def run(self, shard: int, inputs: Sequence[JobInput], *, node: str = "") -> bytes:
        """Return the Parquet file of one shard; an image that cannot be used is a row with its error."""
        started = time.perf_counter()
        columns = {"path": None, "sha256": None, **self.columns, "error": None}
        rows, part = list[dict[str, Any]](), list[_Ready]()
        for item in inputs:
            rows.append(dict.fromkeys(columns) | {"path": item.name})
            part += self._ready(item, rows[-1])
            if len(part) == self._at_once:
                self._fill(part)
                part.clear()
        if part:
            self._fill(part)
        origin = Origin(
            shard=shard,
            images=len(rows),
            errors=sum(row["error"] is not None for row in rows),
            seconds=time.perf_counter() - started,
            worker=f"{platform.node()}:{os.getpid()}",
            node=node or platform.node(),
            cpu=cpu_name(),
            instruction_set=instruction_set(),
            engine=self._engine,
        )
        return to_parquet(rows, columns, origin)

    def close(self) -> None:
        """Free the models."""
        self._model.close()

    def _ready(self, item: JobInput, row: dict[str, Any]) -> list[_Ready]:
        """Return the row with its image, or nothing if the image cannot be used: the row has the error then."""
        try:
            data = read_input(item, self._limits)
            row["sha256"] = sha256_hex(data)
            return [(row, self._model.prepare(data))]
        except ImageRejected as error:
            row["error"] = error.reason
            return []

    @abstractmethod
    def _fill(self, part: Sequence[_Ready]) -> None:
        """Put what the model gives for the images into their rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task(ABC):
    """What all workers of a job do: with the bytes of this model file, and these options of `load`."""

    model: bytes
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        """Return what the job does, for its folder and its messages."""
        return type(self).__name__.removesuffix("Task").lower()

    @property
    def models(self) -> tuple[bytes, ...]:
        """Return the model files."""
        return (self.model,)

    @abstractmethod
    def open(self) -> ShardWorker:
        """Load the models; raises as `load` does."""


class ClassifyTask(Task):
    """The most likely label of each image, and its probability."""

    def open(self) -> ShardWorker:
        """Load the classifier."""
        return _Classifying(as_classifier(load(self.model, **self.options), "the model"), self.options)


class EmbedTask(Task):
    """The vector of each image."""

    def open(self) -> ShardWorker:
        """Load the encoder."""
        return _Embedding(as_encoder(load(self.model, **self.options), "the model"), self.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareTask(Task):
    """What a model and its float32 reference give for each image in each engine, for a verification."""

    reference: bytes
    engines: tuple[str, ...]

    @property
    def models(self) -> tuple[bytes, ...]:
        """Return both model files."""
        return self.model, self.reference

    def open(self) -> ShardWorker:
        """Load both in every engine."""
        loaded: dict[str, LoadedModel] = {
            f"{name}_{engine}": load(data, engine=engine, **self.options)  # type: ignore[arg-type]
            for engine in self.engines
            for name, data in (("reference", self.reference), ("candidate", self.model))
        }
        return _Comparing(loaded, self.options)


class _Classifying(ShardWorker):
    def __init__(self, model: Classifier, options: Mapping[str, Any]) -> None:
        super().__init__(model, options, at_once=options.get("batch_size") or _AT_ONCE)
        self._classifier, self.columns = model, {"label": None, "probability": 1}

    def _fill(self, part: Sequence[_Ready]) -> None:
        predictions = self._classifier.predict([image for _, image in part], tops=[1] * len(part))
        for (row, _), found in zip(part, predictions, strict=True):
            row.update(label=found.label, probability=found.probability)


class _Embedding(ShardWorker):
    def __init__(self, model: Encoder, options: Mapping[str, Any]) -> None:
        super().__init__(model, options, at_once=options.get("batch_size") or _AT_ONCE)
        self.columns = {"embedding": model.width}

    def _fill(self, part: Sequence[_Ready]) -> None:
        for (row, _), vector_D in zip(part, self._model.run(_pixels(part)), strict=True):
            row["embedding"] = vector_D


class _Comparing(ShardWorker):
    def __init__(self, loaded: Mapping[str, LoadedModel], options: Mapping[str, Any]) -> None:
        super().__init__(next(iter(loaded.values())), options, at_once=_AT_ONCE_COMPARED)
        self._loaded, self._engine = loaded, ", ".join(dict.fromkeys(map(_engine_of, loaded.values())))
        outputs = {name: model.manifest.num_values for name, model in loaded.items()}
        self.columns = {"pixels_sha256": None, "fingerprint": None, **outputs}

    def _fill(self, part: Sequence[_Ready]) -> None:
        outputs = {name: model.run(_pixels(part)) for name, model in self._loaded.items()}
        for number, (row, image) in enumerate(part):
            row.update(pixels_sha256=pixel_hash(image.pixels), fingerprint=fingerprint(image.pixels))
            row.update({name: values_BK[number] for name, values_BK in outputs.items()})

    def close(self) -> None:
        """Free all of them."""
        for model in self._loaded.values():
            model.close()


def _engine_of(model: LoadedModel) -> str:
    described = model.describe()
    return f"{described['engine']} {described['engine_version']} {described['float_precision']}"


def _pixels(part: Sequence[_Ready]) -> Pixels:
    return np.stack([image.pixels for _, image in part])
