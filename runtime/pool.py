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
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from vit_edge.artifact import MOST_BATCH
from vit_edge.cpu import MOST_THREADS, usable_threads
from vit_edge.errors import Closed, DeadlineExceeded, Overloaded, UsageError, VitEdgeError
from vit_edge.image import Color, Decoding, Picture, Preprocessing
from vit_edge.runtime.classifier import Prediction, Prepared, check_top
from vit_edge.runtime.engine import EngineName, EngineOptions, FloatPrecision, check_count
from vit_edge.runtime.generation import Generation, Holder
from vit_edge.runtime.loading import check_decode, load_model, open_any
from vit_edge.runtime.watching import Signature, signature_of

__all__ = ["Pool"]

_MOST = {"threads": MOST_THREADS, "workers": 256, "queue_size": 1_000_000, "max_batch": MOST_BATCH}
_MOST_DELAY_MS, _MOST_TIMEOUT_S = 60_000, 1e9
_log = logging.getLogger(__name__)

Source: TypeAlias = "str | os.PathLike[str] | bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    picture: Picture
    top: int
    color: Color
    taken: float  # on time.monotonic, as is the deadline
    deadline: float | None
    future: Future[Prediction]


class Pool:
    """Workers over one model, for servers and camera loops; usable from any thread and from asyncio.

    - `workers` answer side by side, by default one for each usable CPU, with `threads` of the engine each.
    - `queue_size` requests may wait, by default twice as many as there are workers; one more raises Overloaded.
    - With `max_batch` over 1 a worker takes up to so many waiting requests together, and waits up to `max_delay_ms` for
      them after the first one came. No answer depends on the others of its batch.

    The other arguments are those of `load`; what a file promises is always checked. Close a pool, or leave its `with`
    block: one that is only forgotten lives, threads and all, until the process ends.

        >>> with Pool("model.int8.onnx", workers=2) as pool:      # doctest: +SKIP
        ...     pool.submit("picture.jpg").result().label
        'pizza'
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
        precision: FloatPrecision | None = None,
        batch_size: int | None = None,
        decode: Decoding = "full",
        allow_fallback: bool = False,
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        counts = {"threads": threads, "workers": workers, "queue_size": queue_size, "max_batch": max_batch}
        for name, value in counts.items():
            check_count(name, value, _MOST[name], what="cannot make the pool")
        _check("max_delay_ms", max_delay_ms, most=_MOST_DELAY_MS)
        check_decode(decode)
        workers = workers or max(1, usable_threads() // threads)
        queue_size = queue_size or 2 * workers
        self._options = EngineOptions(
            device=device,
            threads=threads,
            precision=precision,
            batch_size=batch_size,
            streams=workers,
            allow_fallback=allow_fallback,
        )
        self._engine, self._decode, self._workers = engine, decode, workers
        self._preprocessing, self._labels = preprocessing, labels
        self._queue_size, self._max_batch, self._max_delay_s = queue_size, max_batch, max_delay_ms / 1000
        self._served = _served(source)
        self._holder = Holder(self._loaded(source))
        self._pid, self._is_closed, self._num_working = os.getpid(), False, workers
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._swapping = threading.Lock()
        self._stop_watching: list[threading.Event] = []
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"vit-edge-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close, drain=False)

    def submit(
        self, picture: Picture, *, top: int = 5, color: Color = "rgb", timeout_s: float | None = None
    ) -> Future[Prediction]:
        """Return the future answer for one picture, which `Classifier.__call__` describes; an array is copied.

        Raises Overloaded at once where the queue is full, Closed after `close` or a fork. The future raises what the
        classifier does, or DeadlineExceeded where `timeout_s` was over before a worker took it; it can be cancelled
        until then.
        """
        self._check_process()
        check_top(top)
        if timeout_s is not None:
            _check("timeout_s", timeout_s, most=_MOST_TIMEOUT_S)
        picture = _own(picture)
        taken = time.monotonic()
        future: Future[Prediction] = Future()
        deadline = None if timeout_s is None else taken + timeout_s
        request = _Request(picture=picture, top=top, color=color, taken=taken, deadline=deadline, future=future)
        hopeless: list[_Request] = []
        with self._changed:
            if self._is_closed:
                raise Closed("cannot classify", reason="the pool is closed", remedy="make another")
            if len(self._waiting) >= self._queue_size:
                hopeless = self._without_hopeless()
            num_waiting = len(self._waiting)
            if num_waiting < self._queue_size:
                self._waiting.append(request)
                self._changed.notify()
        for other in hopeless:
            _is_wanted(other)
        if num_waiting >= self._queue_size:
            reason = f"{num_waiting} requests wait already, as many as may"
            raise Overloaded("the pool is overloaded", reason=reason, remedy="send it later, or to another machine")
        return future

    async def classify(
        self, picture: Picture, *, top: int = 5, color: Color = "rgb", timeout_s: float | None = None
    ) -> Prediction:
        """Return the answer for one picture without blocking the event loop; raises as `submit` and its future do.

        Cancelling the task cancels the request where no worker took it yet.
        """
        return await asyncio.wrap_future(self.submit(picture, top=top, color=color, timeout_s=timeout_s))

    def swap(self, source: Source) -> None:
        """Let another model file answer from now on; requests that a worker has taken finish on the one before.

        It is loaded with the same options and serves only after its golden check. Where it cannot be loaded this raises
        as `load` does, and the model before goes on.
        """
        self._check_process()
        with self._swapping:
            served = _served(source)
            generation = self._loaded(source)
            with self._changed:
                closed = self._is_closed
                if not closed:
                    self._holder.replace(generation)
                    self._served = served
        if closed:
            generation.close()
            raise Closed("cannot swap", reason="the pool is closed", remedy="make another")

    def watch(self, path: str | os.PathLike[str], *, interval_s: float = 1.0) -> None:
        """Swap to the model file at `path` whenever it changes, until the pool is closed.

        A file counts as changed when it looks the same twice in a row and other than the one served: one that is still
        being written is left alone. What is wrong with it goes to the log, once, and the model before goes on.
        """
        self._check_process()
        _check("interval_s", interval_s, most=86_400)
        stop = threading.Event()
        served = self._served[1] if self._served[0] == os.path.abspath(path) else None  # noqa: PTH100 - not resolved
        arguments = (path, served, interval_s, stop)
        thread = threading.Thread(target=self._watch, args=arguments, name="vit-edge-watch", daemon=True)
        with self._changed:
            if self._is_closed:
                raise Closed("cannot watch", reason="the pool is closed", remedy="make another")
            self._stop_watching.append(stop)
            self._threads.append(thread)
            thread.start()

    def describe(self) -> dict[str, Any]:
        """Return what `Classifier.describe` does of the model that serves, and `workers`, `queue_size`, `queued`."""
        self._check_process()
        with self._holder.in_use() as generation:
            described = generation.first.describe()
        return {
            **described,
            "workers": self._workers,
            "queue_size": self._queue_size,
            "queued": len(self._waiting),
            "max_batch": self._max_batch,
        }

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, answer those that wait (with `drain` False cancel them), and end every thread.

        Called by a request's callback it returns at once, and the workers end when they are done.
        """
        if os.getpid() != self._pid:  # the workers are the parent's, and so may be the locks
            return
        with self._changed:
            self._is_closed = True
            dropped = [] if drain else list(self._waiting)
            if dropped:
                self._waiting.clear()
            self._changed.notify_all()
        for stop in self._stop_watching:
            stop.set()
        for request in dropped:
            request.future.cancel()
        atexit.unregister(self.close)
        if threading.current_thread() in self._threads:
            return
        # Not by `join` alone: one that was interrupted takes the thread for ended (CPython 3.11).
        with self._changed:
            self._changed.wait_for(lambda: self._num_working == 0)
        for thread in self._threads:
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

    def _loaded(self, source: Source) -> Generation:
        model = open_any(source, preprocessing=self._preprocessing, labels=self._labels)
        first = load_model(model, engine=self._engine, options=self._options, decode=self._decode)
        return Generation(first, workers=self._workers)

    def _work(self, number: int) -> None:
        while batch := self._take():
            self._answer(number, batch)
        with self._changed:
            self._num_working -= 1
            if self._num_working == 0:  # whoever closed the pool may have been a callback of a worker
                self._holder.replace(None)
            self._changed.notify_all()  # who closes waits for it

    def _take(self) -> list[_Request]:
        """Return the requests to answer together, in the order they came; none where the pool is closed and empty."""
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._max_batch > 1:
                    self._gather()
                count = min(self._max_batch, len(self._waiting))
                candidates = [self._waiting.popleft() for _ in range(count)]
                if self._waiting:
                    self._changed.notify()  # what is left is for another worker: its call may have woken this one
                is_over = self._is_closed and not candidates
            # Without the lock: whoever waits for them is called back.
            taken = [request for request in candidates if _is_wanted(request)]
            if taken or is_over:
                return taken

    def _gather(self) -> None:
        """Wait until a batch is full, or the oldest request has waited as long as it may, or one might become late."""
        while self._waiting and not self._is_closed and len(self._waiting) < self._max_batch:
            end = self._waiting[0].taken + self._max_delay_s
            if any(request.deadline is not None and request.deadline <= end for request in self._waiting):
                return
            left = end - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _answer(self, number: int, batch: Sequence[_Request]) -> None:
        with self._holder.in_use() as generation:
            classifier = generation.classifiers[number]
            prepared: list[tuple[_Request, Prepared]] = []
            for request in batch:
                started = time.monotonic()
                try:
                    one = classifier.prepare(request.picture, color=request.color)
                except BaseException as error:  # one bad picture is the matter of the one who sent it
                    _finish(request.future, error=error)
                    continue
                prepared.append((request, replace(one, waited_ms=(started - request.taken) * 1000)))
            try:
                found = classifier.predict([one for _, one in prepared], tops=[r.top for r, _ in prepared])
            except BaseException as error:  # whatever it is, those who wait must hear of it, and the worker goes on
                for request, _ in prepared:
                    _finish(request.future, error=error)
                return
        for (request, _), prediction in zip(prepared, found, strict=True):
            _finish(request.future, answer=prediction)

    def _without_hopeless(self) -> list[_Request]:
        """Take out and return the requests that wait for nothing: those cancelled, and those whose time is over."""
        now, kept, hopeless = time.monotonic(), deque[_Request](), []
        for request in self._waiting:
            is_late = request.deadline is not None and now > request.deadline
            if is_late or request.future.cancelled():
                hopeless.append(request)
            else:
                kept.append(request)
        self._waiting = kept
        return hopeless

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


def _finish(
    future: Future[Prediction], *, answer: Prediction | None = None, error: BaseException | None = None
) -> None:
    """Set the future; what its callbacks raise beyond an Exception goes to the log, and no further."""
    try:
        if answer is not None:
            future.set_result(answer)
        else:
            future.set_exception(error)
    except BaseException:
        _log.exception("a callback of a request failed")


def _own(picture: Picture) -> Picture:
    """Return a picture that nobody else changes, or reads at the same time."""
    if isinstance(picture, np.ndarray):
        return picture.copy()  # cameras fill the same buffer again
    if isinstance(picture, bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        with contextlib.suppress(Exception):  # a damaged one is told of as any other, in its future
            return picture.copy()
    return picture


def _served(source: Source) -> tuple[str | None, Signature | None]:
    """Return the path that is read, and what the system says of the file before it is."""
    if isinstance(source, str | os.PathLike):
        return os.path.abspath(source), signature_of(source)  # noqa: PTH100 - links are looked through when it is read
    return None, None


def _is_wanted(request: _Request) -> bool:
    """Return whether the request still has to be answered; from then on it cannot be cancelled."""
    if not request.future.set_running_or_notify_cancel():
        return False
    if request.deadline is None or time.monotonic() <= request.deadline:
        return True
    waited_ms = (time.monotonic() - request.taken) * 1000
    reason = f"its turn came after {waited_ms:.0f} ms, later than its deadline"
    remedy = "give it more time, or send fewer"
    _finish(request.future, error=DeadlineExceeded("the request was not answered", reason=reason, remedy=remedy))
    return False


def _check(name: str, value: object, *, most: float) -> None:
    """Raise UsageError where a time is given that is no number from 0 to `most`."""
    if not isinstance(value, int | float) or not 0 <= value <= most:
        raise UsageError("cannot use the pool", reason=f"{name} is {value!r}", remedy=f"give 0 to {most:,}")
