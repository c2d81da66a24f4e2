"""The folder of a training run: who uses it, what lies in it, and its log of every step and epoch."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vit_edge.errors import UsageError
from vit_edge.files import write_atomic
from vit_edge.training.recipe import CONFIG_NAME

__all__ = ["RunFolder", "opened"]

_MADE = ("best", "last", "state", "state.previous")


class RunFolder:
    """Paths of a run, and the lines of metrics.jsonl: {"event": "step"|"epoch", "step": n, ...}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best, self.last, self.state, self.previous_state = (path / f"{name}.safetensors" for name in _MADE)
        self.config, self.preprocessing = path / CONFIG_NAME, path / "preprocessing.json"
        self.metrics, self.tensorboard = path / "metrics.jsonl", path / "tensorboard"
        self.curves, self.confusion = path / "curves.png", path / "confusion.png"
        self._waiting: list[str] = []

    @property
    def is_used(self) -> bool:
        """Return whether a run has left checkpoints or its state here, or another tool what a run would replace."""
        if any(path.exists() for path in (self.best, self.last, self.state, self.previous_state)):
            return True
        others = (self.config, self.preprocessing, self.metrics, self.tensorboard, self.curves, self.confusion)
        return any(path.exists() for path in others) and not self._is_ours()

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for name in _MADE:
            (self.path / f"{name}.safetensors").unlink(missing_ok=True)
        for path in (self.metrics, self.curves, self.confusion):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def note(self, event: str, values: Mapping[str, Any]) -> None:
        """Add a line to the log; it reaches the disk with the next `flush`."""
        self._waiting.append(json.dumps({"event": event, **values}) + "\n")

    def flush(self) -> None:
        """Write the lines noted since the last time."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.writelines(self._waiting)
        self._waiting.clear()

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of one kind that are on the disk."""
        return [line for line in self._lines() if line["event"] == event]

    def forget_after(self, step: int) -> None:
        """Drop what the log says of later steps: they are about to be taken again."""
        kept = [line for line in self._lines() if line["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def keep_previous_state(self) -> None:
        """Give the state a second name, so that two are there while and after the next is written."""
        if not self.state.exists():
            return
        self.previous_state.unlink(missing_ok=True)
        try:
            self.previous_state.hardlink_to(self.state)
        except OSError:  # a file system without links
            shutil.copyfile(self.state, self.previous_state)

    def _is_ours(self) -> bool:
        """Return whether a run of vit-edge began here, which left nothing worth keeping."""
        try:
            return self.config.read_bytes().startswith(b"# vit-edge ")
        except OSError:
            return False

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.metrics.exists():
            return
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):  # a line cut short by a power cut
                line = json.loads(text)
                line["event"], line["step"]
                yield line


@contextlib.contextmanager
def opened(path: Path, *, resume: bool, force: bool) -> Iterator[RunFolder]:
    """Yield a run's folder, locked; raises UsageError where it is in use, or a run is in it or is missing."""
    with _locked(path) as folder:
        if resume and not folder.state.exists():
            beside = f"; {folder.previous_state.name} is there: rename it" if folder.previous_state.exists() else ""
            reason = f"there is no {folder.state.name} in it{beside}"
            raise UsageError("cannot resume", file=path, reason=reason, remedy="train without --resume")
        if not resume and not force and folder.is_used:
            remedy = "add --resume to go on with it, --force to replace it, or choose another --out"
            reason = "a run is in it, or another tool's files are that a run would replace"
            raise UsageError("will not overwrite", file=path, reason=reason, remedy=remedy)
        yield folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[RunFolder]:
    """Yield the folder, made where it was not there, which no second run can use meanwhile; raises UsageError."""
    found = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError("cannot train into", file=path, reason=reason, remedy="choose another --out") from error
    owner, lock = path / ".owner.json", path / ".lock"
    try:
        with FileLock(lock, timeout=0):
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_atomic(owner, json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}).encode())
            try:
                yield RunFolder(path)
            finally:
                owner.unlink(missing_ok=True)
                if not found and list(path.iterdir()) == [lock]:  # refused before anything was written
                    with contextlib.suppress(OSError):  # Windows: an open file stays
                        lock.unlink()
                        path.rmdir()
    except PermissionError as error:
        reason, remedy = "there is no permission to write in it", "choose another --out"
        raise UsageError("cannot train into", file=path, reason=reason, remedy=remedy) from error
    except Timeout as error:
        reason, remedy = f"it is in use by {_described(owner)}", "wait for it, or choose another --out"
        raise UsageError("cannot train into", file=path, reason=reason, remedy=remedy) from error


def _described(owner: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(owner.read_text(encoding="utf-8"))
        return f"pid {known['pid']} on host {known['host']} since {known['since']}"
    return "another run"
