"""A loaded model: what a classifier and an encoder have in common. Pixels in, the first output of the graph out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from vit_edge.errors import Closed, InputError, UsageError, VerificationFailed
from vit_edge.image import Color, Decoding, ImageSource, Limits, Pixels, decode_for
from vit_edge.machine.cpu import instruction_set
from vit_edge.machine.targets import mismatch, target_name
from vit_edge.model_file.artifact import Manifest
from vit_edge.runtime.engines.protocol import Array, Engine, Logits, answers
from vit_edge.runtime.notebook import html_table

__all__ = ["MOST_AT_ONCE", "LoadedModel", "Prepared"]

# Larger batches run in parts: memory grows with a batch, speed no longer.
MOST_AT_ONCE = 64
_Self = TypeVar("_Self", bound="LoadedModel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """An image as the network takes it, uint8 RGB [height, width, 3], and how long that took."""

    pixels: Pixels
    decode_ms: float
    resize_ms: float
    waited_ms: float = 0.0


class LoadedModel:
    """A model file in an engine, with its preprocessing; usable from several threads, not across a fork."""

    _verb = "run"

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        *,
        sha256: str,
        decoding: Decoding = "full",
        limits: Limits | None = None,
        checked: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine, self._manifest, self._sha256 = engine, manifest, sha256
        self._decoding, self._limits, self._checked = decoding, limits, dict(checked or {})
        self._pid, self._closed = os.getpid(), False

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the model file: preprocessing, labels, provenance and more."""
        return self._manifest

    def run(self, images_NHWC: Pixels) -> Logits:
        """Return float32 logits [batch, classes], or embeddings [batch, width], from uint8 RGB images.

        Images are [batch, height, width, 3]; batch 0 gives none. Raises TypeError or InputError on anything else:
        engines cast such input silently.
        """
        return self._run(images_NHWC, self._engine.run, self._manifest.num_values)

    def _output(self, name: str, images_NHWC: Pixels) -> Array:
        """Return another output of the graph; raises UsageError if the file does not have it."""
        outputs = self._manifest.outputs
        if name not in outputs:
            remedy = f"export it again with --outputs {self._manifest.output},{name}"
            reason = f"the file has only the outputs {', '.join(outputs)}"
            raise UsageError(f"cannot compute {name}", reason=reason, remedy=remedy)

        def run(part_NHWC: Pixels) -> Array:
            return np.asarray(answers(self._engine, self._manifest, part_NHWC, [name])[0], dtype=np.float32)

        return self._run(images_NHWC, run, 0)

    def _parts(self, images: Iterable[ImageSource], color: Color) -> Iterator[list[Prepared]]:
        """Yield the images prepared, 64 at a time; raises TypeError unless they are several."""
        if isinstance(images, str | bytes | bytearray | os.PathLike) or not isinstance(images, Iterable):
            raise TypeError(f"images is {type(images).__name__}; give a list of images")
        left = iter(images)
        while part := list(islice(left, MOST_AT_ONCE)):
            yield [self.prepare(source, color=color) for source in part]

    def prepare(self, source: ImageSource, *, color: Color = "rgb") -> Prepared:
        """Return an image as the network takes it; raises as a call does."""
        started = time.perf_counter()
        preprocessing = self._manifest.preprocessing
        scaled = preprocessing if self._decoding == "fast" else None
        image, upright = decode_for(scaled, source, color=color, limits=self._limits)
        decoded = time.perf_counter()
        pixels = preprocessing.fit(image, upright=upright)
        resize_ms = (time.perf_counter() - decoded) * 1000
        return Prepared(pixels=pixels, decode_ms=(decoded - started) * 1000, resize_ms=resize_ms)

    def _run(self, images_NHWC: Pixels, run: Callable[[Pixels], Logits], width: int) -> Logits:
        self._check_usable()
        images_NHWC = self._validated(images_NHWC)
        if not len(images_NHWC):
            return np.zeros((0, width), dtype=np.float32)
        parts = [run(images_NHWC[i : i + MOST_AT_ONCE]) for i in range(0, len(images_NHWC), MOST_AT_ONCE)]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        broken = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
        if len(broken):
            reason = f"the output for image {broken[0]} of {len(found)} is not finite"
            raise VerificationFailed("cannot use the output of the model", reason=reason, remedy="export it again")
        return found

    def describe(self) -> dict[str, Any]:
        """Return what really runs, as JSON-ready values.

        `engine`, `device`, `float_precision` and `threads` are read back from the engine; `placement` is the
        number of nodes of the graph on each of its devices, or "unknown" where it is too old to tell; `fallback` why it
        is not the device that was asked for, else None; `int8_fallback` why the ops of an INT8 file run in float32,
        else None; `target_warning` what differs between the CPU that the file was
        quantized for and this one, else None; `verified` how the file was checked when it was loaded.
        """
        engine, manifest = self._engine, self._manifest
        target = target_name(manifest.quantization)
        return {
            "name": manifest.name,
            "sha256": self._sha256,
            "precision": manifest.precision,
            "engine": engine.name,
            "engine_version": engine.version,
            "device": engine.device,
            "float_precision": engine.float_precision,
            "threads": engine.threads,
            "batch_size": engine.batch_size,
            "placement": "unknown" if engine.placement is None else dict(engine.placement),
            "fallback": engine.fallback,
            "int8_fallback": engine.int8_fallback,
            "instruction_set": instruction_set(),
            "decode": self._decoding,
            "target": target,
            "target_warning": mismatch(target) if target else None,
            **self._checked,
        }

    def twin(self: _Self) -> _Self:
        """Return another one over the same loaded model, for another thread; each is closed on its own."""
        self._check_usable()
        return type(self)(
            self._engine.twin(),
            self._manifest,
            sha256=self._sha256,
            decoding=self._decoding,
            limits=self._limits,
            checked=self._checked,
        )

    def close(self) -> None:
        """Free the model; the second call does nothing, nor does one in a child after a fork."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._engine.close()

    def __repr__(self) -> str:
        manifest, engine, kind = self._manifest, self._engine, type(self).__name__
        height, width = manifest.preprocessing.crop
        if self._closed:
            return f"<{kind} {manifest.name!r}, closed>"
        runs = f"{engine.name} {engine.version} on {engine.device}, threads={engine.threads}"
        return f"<{kind} {manifest.name!r}, {manifest.precision}, {height}x{width}, {self._size}, {runs}>"

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), value) for name, value in self.describe().items() if value is not None]
        return html_table(f"{type(self).__name__} with {self._size}", ("field", "value"), rows)

    @property
    def _size(self) -> str:
        return f"{self._manifest.num_values} {'values' if self._manifest.is_encoder else 'labels'}"

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise Closed(f"cannot {self._verb}", reason="the model is closed", remedy="load the model again")
        if os.getpid() != self._pid:
            reason = "the model was loaded before a fork, and engines do not survive one"
            remedy = "load the model in the child process, or start it with spawn"
            raise Closed(f"cannot {self._verb}", reason=reason, remedy=remedy)

    def _validated(self, images_NHWC: Pixels) -> Pixels:
        if not isinstance(images_NHWC, np.ndarray):
            raise TypeError(f"images_NHWC is {type(images_NHWC).__name__}; give a uint8 numpy array")
        shape = (*self._manifest.preprocessing.crop, 3)
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != shape:
            got = f"{images_NHWC.dtype} {list(images_NHWC.shape)}"
            hint = "the channels come last" if images_NHWC.shape[1:2] == (3,) else "use Preprocessing.pixels"
            reason = f"got {got}; expected uint8 [batch, {shape[0]}, {shape[1]}, 3]"
            raise InputError("cannot use the images", reason=reason, remedy=hint)
        return np.ascontiguousarray(images_NHWC)
