"""How long work reports where it stands, without knowing who listens, and what shows it.

with shown_progress() as progress:
    quantize("model.onnx", calibration="images", out="model.int8.onnx", progress=progress)
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Display", "Progress", "ProgressBar", "ProgressLines", "Stage", "duration", "shown_progress", "silent"]

# Work that ends sooner shows nothing.
_FIRST_S = 0.2
# Ten seconds without a line look like a program that hangs.
_EVERY_S = 8.0
# A shorter time is not shown.
_SHORTEST_S = 1.0
# The longest text behind the bar is 53 characters, in a terminal of 80.
_BAR_WIDTH = 12


class Progress(Protocol):
    """Called with the stage's name, what is done of it and the whole; the same stage is called again as it goes on."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def shown_progress(*, write: Callable[[str], None] | None = None) -> Display:
    """Return a Progress that shows itself while it is used as a context manager.

    It is a bar in a notebook, or if stderr is a terminal; else it writes lines, to stderr unless `write` is given.

        >>> with shown_progress() as progress:
        ...     for number in range(3):
        ...         progress("counting", number + 1, 3)
    """
    in_notebook = "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
    if not (in_notebook or sys.stderr.isatty()):
        return ProgressLines(write)
    from rich.console import Console

    console = Console() if in_notebook else Console(stderr=True)
    return ProgressBar(console) if console.is_terminal or console.is_jupyter else ProgressLines(write)


@dataclass(slots=True)
class Stage:
    """Where a stage stands; nothing can be counted if `total` is below 2; `detail` replaces the estimate."""

    name: str
    done: int = 0
    total: int = 0
    detail: str = ""
    first_done: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Return whether all of it is done."""
        return 0 < self.total <= self.done

    def position(self) -> str:
        """Return "120 of 360, about 40 s left", as far as it is known; nothing if the stage has just begun."""
        seconds = time.monotonic() - self.begun
        if self.detail:
            return self.detail
        if self.done == self.first_done and seconds < _SHORTEST_S:
            return ""
        return f"{self.done} of {self.total}{self._estimate(seconds)}" if self.total > 1 else duration(seconds)

    def _estimate(self, seconds: float) -> str:
        done = self.done - self.first_done
        left = seconds / done * (self.total - self.done) if done else 0.0
        return f", about {duration(left)} left" if min(left, seconds) >= _SHORTEST_S else ""


class Display(ABC):
    """A Progress that shows the current stage, from a thread too: a library that computes reports nothing."""

    def __init__(self, *, first_s: float = _FIRST_S, every_s: float = _EVERY_S) -> None:
        self._stage, self._every_s = Stage("starting"), every_s
        self._first = self._due = time.monotonic() + first_s
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True, name="vit-edge progress")

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            is_new = stage != self._stage.name
            if is_new:
                self._stage = Stage(stage, first_done=done)
            self._stage.done, self._stage.total = done, total
            if is_new and not self._stage.is_over and time.monotonic() >= self._first:
                self._show_now()
            if self._stage.is_over:
                self._stage = Stage("working")
            self._changed()

    def detail(self, text: str) -> None:
        """Show this behind the name of the stage."""
        with self._lock:
            self._stage.detail = text
            self._changed()

    def announce(self, stage: str) -> None:
        """Begin a stage that cannot be counted, and show it at once."""
        with self._lock:
            self._first = time.monotonic()
            self(stage, 0, 0)

    @abstractmethod
    def _show(self, stage: Stage) -> None:
        """Show where the stage stands."""

    def _changed(self) -> None:  # noqa: B027 - lines are written when they are due, not at every change
        """Note that the stage changed."""

    def _show_now(self) -> None:
        self._due = time.monotonic() + self._every_s
        self._show(self._stage)

    def _repeat(self) -> None:
        while not self._ended.wait(max(0.01, min(0.25, self._due - time.monotonic()))):
            with self._lock:
                if time.monotonic() >= self._due and not self._ended.is_set():
                    self._show_now()


class ProgressLines(Display):
    """A line when a stage begins, and one at least every 8 seconds."""

    def __init__(
        self, write: Callable[[str], None] | None = None, *, first_s: float = _FIRST_S, every_s: float = _EVERY_S
    ) -> None:
        super().__init__(first_s=first_s, every_s=every_s)
        self._write = write or _to_stderr

    def _show(self, stage: Stage) -> None:
        position = stage.position()
        self._write(f"{stage.name}: {position}" if position else stage.name)


class ProgressBar(Display):
    """One bar for the current stage, drawn by rich; it disappears at the end."""

    def __init__(self, console: Console, *, first_s: float = _FIRST_S, every_s: float = _EVERY_S) -> None:
        super().__init__(first_s=first_s, every_s=every_s)
        self._console = console
        self._drawn: Stage | None = None
        self._bar: Any = None  # rich is imported when something is drawn
        self._task: Any = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        if self._bar is not None:
            self._bar.stop()

    def _show(self, stage: Stage) -> None:
        if self._bar is None:
            self._bar = _rich_bar(self._console)
            self._bar.start()
        self._changed()

    def _changed(self) -> None:
        if self._bar is None:
            return
        stage = self._stage
        if self._drawn is not stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._drawn, self._task = stage, self._bar.add_task(stage.name, total=None, position="")
        total = stage.total if stage.total > 1 else None
        self._bar.update(self._task, completed=stage.done, total=total, position=stage.position())


def duration(seconds: float) -> str:
    """Return "1 h 02 min", "3 min 05 s" or "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _rich_bar(console: Console) -> Any:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), BarColumn(_BAR_WIDTH))
    return Progress(*columns, TextColumn("{task.fields[position]}"), console=console, transient=True)


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
