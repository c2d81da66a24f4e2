"""Many callers, one model: a bounded queue in front of workers, each with what it must not share with others.

A full queue refuses at once: 16 callers on one session wait 64 ms at the 99th percentile where one has 0.4 ms, at the
same throughput (ONNX Runtime, digits).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from vit_edge.errors import Closed, UsageError, VitEdgeError
from vit_edge.image import Color, Decoding, ImageSource, Limits, Pixels, Preprocessing
from vit_edge.machine.cpu import MOST_THREADS, usable_threads
from vit_edge.model_file.artifact import MOST_BATCH, Manifest
from vit_edge.runtime.checks.load_policy import Sandbox, policy_with
from vit_edge.runtime.classifier import Classifier, Prediction, as_classifier, check_top
from vit_edge.runtime.engines.protocol import EngineName, EngineOptions, FloatPrecision, Logits, check_count
from vit_edge.runtime.loaded_model import Prepared
from vit_edge.runtime.loading import check_decode, load_model, open_any
from vit_edge.runtime.serving.file_signature import Signature, signature_of
from vit_edge.runtime.serving.model_slot import ModelSlot, ModelVersion
from vit_edge.runtime.serving.request_queue import Request, RequestQueue, finish

__all__ = ["Pool"]

_MOST = {"threads": MOST_THREADS, "workers": 256, "queue_size": 1_000_000, "max_batch": MOST_BATCH}
_MOST_DELAY_MS, _MOST_TIMEOUT_S = 60_000, 1e9
# How long the end of the interpreter waits for requests that a worker has taken.
_PATIENCE_S = 5.0
_log = logging.getLogger(__name__)

Source: TypeAlias = "str | os.PathLike[str] | bytes"


class Pool:
    """Workers over one model, for servers and camera loops; usable from any thread and from asyncio.

    - `workers` answer side by side, by default one for each usable CPU, with `threads` of the engine each.
    - `queue_size` requests may wait, by default twice as many as there are workers; one more raises Overloaded.
    - With `max_batch` over 1 a worker takes up to so many waiting requests together, and waits up to `max_delay_ms` for
      them after the first one came. No answer depends on the others of its batch.

    The other arguments are those of `load`; what a file promises is always checked. Close a pool, or leave its `with`
    block: one that is only forgotten lives, threads and all, until the process ends.

        >>> with Pool("model.int8.onnx", workers=2) as pool:
        ...     pool.submit("image.jpg").result()
        <Prediction '...': ...%...; ... ms>
    """

    def __init__(
        self,
        source: Source,
        *,
        workers: int | None = None,
        threads: int = 1,
        queue_size: int | None = None,
        max_batch: int = 1,
        max_delay_ms: float = 0.0,
        engine: EngineName | Literal["auto"] = "auto",
        device: str = "cpu",
        float_precision: FloatPrecision | None = None,
        batch_size: int | None = None,
        decode: Decoding = "full",
        limits: Limits | None = None,
        sandbox: Sandbox | None = None,
        allow_ops: Sequence[str] | None = None,
        allow_fallback: bool = False,
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        require_signature: str | os.PathLike[str] | None = None,
    ) -> None:
        counts = {"threads": threads, "workers": workers, "queue_size": queue_size, "max_batch": max_batch}
        for name, value in counts.items():
            check_count(name, value, _MOST[name], what="cannot make the pool")
        _check("max_delay_ms", max_delay_ms, most=_MOST_DELAY_MS)
        check_decode(decode)
        self._policy = policy_with(sandbox, allow_ops, is_signed=bool(require_signature))
        self._require_signature = require_signature
        workers = workers or max(1, usable_threads() // threads)
        queue_size = queue_size or 2 * workers
        self._options = EngineOptions(
            device=device,
            threads=threads,
            float_precision=float_precision,
            batch_size=batch_size,
            streams=workers,
            allow_fallback=allow_fallback,
        )
        self._engine, self._decode, self._limits, self._workers = engine, decode, limits, workers
        self._preprocessing, self._labels = preprocessing, labels
        self._queue_size, self._max_batch = queue_size, max_batch
        self._served = _served(source)
        self._slot = ModelSlot(self._loaded(source))
        self._queue = RequestQueue(queue_size, max_batch=max_batch, max_delay_s=max_delay_ms / 1000)
        self._pid, self._is_closed, self._num_working = os.getpid(), False, 0
        self._ending = threading.Condition()
        self._swapping = threading.Lock()
        self._stop_watching: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self._start("deadlines", self._queue.expire)
        for number in range(workers):
            self._start(str(number), self._work, number)
        atexit.register(self._at_exit)

    def submit(
        self, source: ImageSource, *, top: int = 5, color: Color = "rgb", timeout_s: float | None = None
    ) -> Future[Prediction]:
        """Return the future answer for one image, which `Classifier.__call__` describes; an array is copied.

        Raises Overloaded at once where the queue is full, Closed after `close` or a fork. The future raises what the
        classifier does, or DeadlineExceeded as soon as `timeout_s` is over where no worker took it by then; it can be
        cancelled until then.
        """
        check_top(top)
        return self._enter(lambda when: Request(source=_own(source), top=top, color=color, **when), timeout_s)

    def submit_logits(self, images_NHWC: Pixels, *, timeout_s: float | None = None) -> Future[Logits]:
        """Return the future float32 logits [batch, classes] of images as the network takes them, in one request.

        `images_NHWC` is uint8 RGB [batch, height, width, 3] after preprocessing; it is copied. Raises as `submit` does,
        and the future as `Classifier.logits` does.
        """
        return self._enter(lambda when: Request(images_NHWC=np.array(images_NHWC), **when), timeout_s)

    def _enter(self, make: Callable[[Mapping[str, Any]], Request], timeout_s: float | None) -> Future[Any]:
        """Return the future of a request that is put in the queue; `make` gets its times and its future."""
        self._check_process()
        if timeout_s is not None:
            _check("timeout_s", timeout_s, most=_MOST_TIMEOUT_S)
        self._queue.reserve()  # before the image is copied: a full queue refuses large ones as fast as small ones
        taken = time.monotonic()
        deadline = None if timeout_s is None else taken + timeout_s
        future: Future[Any] = Future()
        try:
            request = make({"taken": taken, "deadline": deadline, "future": future})
        except BaseException:
            self._queue.release()
            raise
        self._queue.enter(request)
        return future

    async def classify(
        self, source: ImageSource, *, top: int = 5, color: Color = "rgb", timeout_s: float | None = None
    ) -> Prediction:
        """Return the answer for one image without blocking the event loop; raises as `submit` and its future do.

        Cancelling the task cancels the request where no worker took it yet.
        """
        return await asyncio.wrap_future(self.submit(source, top=top, color=color, timeout_s=timeout_s))

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the model file that serves."""
        return self._slot.current.first.manifest

    def swap(self, source: Source) -> None:
        """Let another model file answer from now on; requests that a worker has taken finish on the one before.

        It is loaded with the same options and serves only after its golden check. Where it cannot be loaded this raises
        as `load` does, and the model before goes on.
        """
        self._check_process()
        with self._swapping:
            self._check_open("swap")
            served = _served(source)
            version = self._loaded(source)
            with self._ending:
                if not self._is_closed:
                    self._slot.replace(version)
                    self._served = served
                    return
        version.close()
        self._check_open("swap")

    def watch(self, path: str | os.PathLike[str], *, interval_s: float = 1.0) -> None:
        """Swap to the model file at `path` whenever it changes, until the pool is closed.

        A file counts as changed when it looks the same twice in a row and other than the one served: one that is still
        being written is left alone. What is wrong with it goes to the log, once, and the model before goes on.
        """
        self._check_process()
        _check("interval_s", interval_s, most=86_400)
        stop = threading.Event()
        served = self._served[1] if self._served[0] == os.path.abspath(path) else None  # noqa: PTH100 - not resolved
        with self._ending:
            self._check_open("watch")
            self._stop_watching.append(stop)
            self._start("watch", self._watch, path, served, interval_s, stop)

    def describe(self) -> dict[str, Any]:
        """Return what `Classifier.describe` does of the model that serves, and `workers`, `queue_size`, `queued`."""
        self._check_process()
        with self._slot.in_use() as version:
            described = version.first.describe()
        return {
            **described,
            "workers": self._workers,
            "queue_size": self._queue_size,
            "queued": len(self._queue),
            "max_batch": self._max_batch,
        }

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, answer those that wait (with `drain` False cancel them), and end every thread.

        Called by a request's callback it returns at once, and the workers end when they are done.
        """
        self._end(drain=drain)

    def _at_exit(self) -> None:
        """Close it, but let no worker that hangs keep the interpreter from its end."""
        self._end(drain=False, patience_s=_PATIENCE_S)

    def _end(self, *, drain: bool, patience_s: float | None = None) -> None:
        if os.getpid() != self._pid:  # the workers are the parent's, and so may be the locks
            return
        with self._ending:
            self._is_closed = True
            stops = list(self._stop_watching)
        for stop in stops:
            stop.set()
        self._queue.close(drain=drain)
        atexit.unregister(self._at_exit)
        if threading.current_thread() in self._threads:
            return
        # Not by `join` alone: one that was interrupted takes the thread for ended (CPython 3.11).
        with self._ending:
            has_ended = self._ending.wait_for(lambda: self._num_working == 0, patience_s)
        for thread in self._threads if has_ended else ():
            thread.join()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            reason = "the pool was made before a fork, and its workers are not here"
            raise Closed("cannot use the pool", reason=reason, remedy="make it in the child, or start with spawn")

    def _loaded(self, source: Source) -> ModelVersion[Classifier]:
        model = open_any(
            source,
            preprocessing=self._preprocessing,
            labels=self._labels,
            require_signature=self._require_signature,
        )
        first = load_model(
            model,
            engine=self._engine,
            options=self._options,
            decode=self._decode,
            limits=self._limits,
            policy=self._policy,
        )
        return ModelVersion(as_classifier(first, model.source), workers=self._workers)

    def _check_open(self, verb: str) -> None:
        if self._is_closed:
            raise Closed(f"cannot {verb}", reason="the pool is closed", remedy="make another")

    def _start(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        """Start a thread that the pool waits for when it is closed."""
        thread = threading.Thread(target=self._run, args=(work, *arguments), name=f"vit-edge-{name}", daemon=True)
        with self._ending:
            self._num_working += 1
            self._threads.append(thread)
            thread.start()

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        finally:
            with self._ending:
                self._num_working -= 1
                if self._num_working == 0:  # whoever closed the pool may have been a callback of a worker
                    self._slot.replace(None)
                self._ending.notify_all()  # who closes waits for it

    def _work(self, number: int) -> None:
        while batch := self._queue.take():
            self._answer(number, batch)

    def _answer(self, number: int, batch: Sequence[Request]) -> None:
        with self._slot.in_use() as version:
            classifier = version.classifiers[number]
            prepared: list[tuple[Request, Prepared]] = []
            for request in batch:
                if request.images_NHWC is not None:
                    _run(classifier, request, request.images_NHWC)
                    continue
                started = time.monotonic()
                try:
                    one = classifier.prepare(request.source, color=request.color)
                except BaseException as error:  # one bad image is the matter of the one who sent it
                    finish(request.future, error=error)
                    continue
                prepared.append((request, replace(one, waited_ms=(started - request.taken) * 1000)))
            try:
                found = classifier.predict([one for _, one in prepared], tops=[r.top for r, _ in prepared])
            except BaseException as error:  # whatever it is, those who wait must hear of it, and the worker goes on
                for request, _ in prepared:
                    finish(request.future, error=error)
                return
        for (request, _), prediction in zip(prepared, found, strict=True):
            finish(request.future, answer=prediction)

    def _watch(
        self, path: str | os.PathLike[str], served: Signature | None, interval_s: float, stop: threading.Event
    ) -> None:
        seen = served
        while not stop.wait(interval_s):
            found = signature_of(path)
            if found is not None and found == seen and found != served:
                try:
                    self.swap(path)
                    _log.info("%s was exchanged: the new one serves", path)
                    served = found
                except VitEdgeError as error:
                    served = found  # these bytes will not get better
                    if not stop.is_set():
                        _log.error("the model before goes on: %s", error)
                except Exception as error:  # memory, say: it is tried again
                    _log.warning("the model before goes on, and this one is tried again: %s", error)
            seen = found


def _run(classifier: Classifier, request: Request, images_NHWC: Pixels) -> None:
    """Finish a request for logits, which is a batch in itself."""
    try:
        finish(request.future, answer=classifier.logits(images_NHWC))
    except BaseException as error:  # as with any other: who waits must hear of it, and the worker goes on
        finish(request.future, error=error)


def _own(source: ImageSource) -> ImageSource:
    """Return an image that nobody else changes, or reads at the same time."""
    if isinstance(source, np.ndarray):
        return source.copy()  # cameras fill the same buffer again
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if isinstance(source, Image.Image):
        with contextlib.suppress(Exception):  # a damaged one is told of as any other, in its future
            return source.copy()
    return source


def _served(source: Source) -> tuple[str | None, Signature | None]:
    """Return the path that is read, and what the system says of the file before it is."""
    if isinstance(source, str | os.PathLike):
        return os.path.abspath(source), signature_of(source)  # noqa: PTH100 - links are looked through when it is read
    return None, None


def _check(name: str, value: object, *, most: float) -> None:
    """Raise UsageError where a time is given that is no number from 0 to `most`."""
    if not isinstance(value, int | float) or not 0 <= value <= most:
        raise UsageError("cannot use the pool", reason=f"{name} is {value!r}", remedy=f"give 0 to {most:,}")
