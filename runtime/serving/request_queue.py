"""Requests in the order they came: as many as may wait, each until a worker takes it or its time is over."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vit_edge.errors import Closed, DeadlineExceeded, Overloaded
from vit_edge.image import Color, ImageSource, Pixels
from vit_edge.runtime.classifier import Prediction
from vit_edge.runtime.engines.protocol import Logits

__all__ = ["Request", "RequestQueue", "finish"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One image, and the future that its answer goes to; times are those of time.monotonic.

    With `images_NHWC` it is images as the network takes them instead, whose logits are asked for.
    """

    source: ImageSource = b""
    images_NHWC: Pixels | None = None
    top: int = 1
    color: Color = "rgb"
    taken: float
    deadline: float | None
    future: Future[Any]

    @property
    def is_late(self) -> bool:
        """Return whether its time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline


class RequestQueue:
    """A bounded queue between callers and workers; futures are always set without its lock, as they call back.

    A worker takes up to `max_batch` requests together, and waits up to `max_delay_s` for them after the first one came.
    """

    def __init__(self, size: int, *, max_batch: int, max_delay_s: float) -> None:
        self._size, self._max_batch, self._max_delay_s = size, max_batch, max_delay_s
        self._waiting: deque[Request] = deque()
        self._num_reserved, self._is_closed = 0, False
        lock = threading.RLock()
        self._changed, self._earlier = threading.Condition(lock), threading.Condition(lock)
        self._next_deadline: float | None = None  # what `expire` sleeps for

    def __len__(self) -> int:
        return len(self._waiting)

    def reserve(self) -> None:
        """Keep a place free for `enter`, or `release`; raises Overloaded or Closed at once."""
        hopeless: list[Request] = []
        with self._changed:
            self._check_open()
            if len(self._waiting) + self._num_reserved >= self._size:
                hopeless = self._take_out(lambda request: request.is_late or request.future.cancelled())
            num_waiting = len(self._waiting) + self._num_reserved
            if num_waiting < self._size:
                self._num_reserved += 1
        for request in hopeless:
            is_wanted(request)
        if num_waiting >= self._size:
            reason = f"{num_waiting} requests wait already, as many as may"
            raise Overloaded("the pool is overloaded", reason=reason, remedy="send it later, or to another machine")

    def release(self) -> None:
        """Give a place back that was kept free."""
        with self._changed:
            self._num_reserved -= 1

    def enter(self, request: Request) -> None:
        """Put a request in the place that was kept free; raises Closed."""
        with self._changed:
            self._num_reserved -= 1
            self._check_open()
            self._waiting.append(request)
            self._changed.notify()
            sleeps_for = self._next_deadline
            if request.deadline is not None and (sleeps_for is None or request.deadline < sleeps_for):
                self._earlier.notify()

    def take(self) -> list[Request]:
        """Return the requests to answer together, in the order they came; none where it is closed and empty."""
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
                if self._is_closed and not self._waiting:
                    self._earlier.notify()
            taken = [request for request in candidates if is_wanted(request)]
            if taken or is_over:
                return taken

    def expire(self) -> None:
        """Tell every request when its time is over, until the queue is closed and empty: for a thread of its own.

        Workers that are busy, with a driver that hangs perhaps, would tell it only when they are done.
        """
        while True:
            with self._earlier:
                late = self._take_out(lambda request: request.is_late)
                if not late:
                    if self._is_closed and not self._waiting:
                        return
                    self._sleep()
            for request in late:
                if request.future.set_running_or_notify_cancel():
                    _tell_late(request)

    def close(self, *, drain: bool) -> None:
        """Take no more requests; with `drain` False, cancel those that wait."""
        with self._changed:
            self._is_closed = True
            dropped = [] if drain else list(self._waiting)
            if dropped:
                self._waiting.clear()
            self._changed.notify_all()
            self._earlier.notify_all()
        for request in dropped:
            request.future.cancel()

    def _check_open(self) -> None:
        if self._is_closed:
            raise Closed("cannot classify", reason="the pool is closed", remedy="make another")

    def _sleep(self) -> None:
        """Wait until the first deadline has passed, or an earlier one came."""
        self._next_deadline = min((r.deadline for r in self._waiting if r.deadline is not None), default=None)
        left = None if self._next_deadline is None else self._next_deadline - time.monotonic()
        # Late is what is beyond its deadline: at the very moment itself it would be looked for again and again.
        self._earlier.wait(None if left is None else max(left, 0.0) + 0.0005)
        self._next_deadline = None

    def _gather(self) -> None:
        """Wait until a batch is full, or the oldest request has waited as long as it may, or one might become late."""
        while self._waiting and not self._is_closed and len(self._waiting) < self._max_batch:
            end = self._waiting[0].taken + self._max_delay_s
            if any(request.deadline is not None and request.deadline <= end for request in self._waiting):
                return
            left = end - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take_out(self, is_meant: Callable[[Request], bool]) -> list[Request]:
        """Take out and return the requests that are meant."""
        found = [request for request in self._waiting if is_meant(request)]
        if found:
            gone = set(found)
            self._waiting = deque(request for request in self._waiting if request not in gone)
        return found


def is_wanted(request: Request) -> bool:
    """Return whether the request still has to be answered; from then on it cannot be cancelled."""
    if not request.future.set_running_or_notify_cancel():
        return False
    if request.is_late:
        _tell_late(request)
        return False
    return True


def finish(
    future: Future[Any], *, answer: Prediction | Logits | None = None, error: BaseException | None = None
) -> None:
    """Set the future; what its callbacks raise beyond an Exception goes to the log, and no further."""
    try:
        if answer is not None:
            future.set_result(answer)
        else:
            future.set_exception(error)
    except BaseException:
        _log.exception("a callback of a request failed")


def _tell_late(request: Request) -> None:
    waited_ms = (time.monotonic() - request.taken) * 1000
    reason = f"no worker took it in {waited_ms:.0f} ms, later than its deadline"
    remedy = "give it more time, or send fewer"
    finish(request.future, error=DeadlineExceeded("the request timed out", reason=reason, remedy=remedy))
