"""Classify every image that appears in a folder: one line of JSON each, until Ctrl-C.

    pip install "vit-edge[onnxruntime]"
    python examples/folder_watcher.py model.int8.onnx incoming/
    python examples/folder_watcher.py model.int8.onnx incoming/ --once        # what is there now, then the end
    python examples/folder_watcher.py model.int8.onnx incoming/ --seen seen.json    # remembered over a restart

A file is taken when neither its size nor its time changed between two looks: whoever writes slowly is waited for. One
that is no image is reported once on stderr. A file that is written anew under its old name counts as a new one. Names
that begin with a dot are left alone, so `mv .image.part image.jpg` hands a file over in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from vit_edge.errors import InputError, VitEdgeError, printable
from vit_edge.files import write_atomic
from vit_edge.runtime import Classifier, load

# Size in bytes and time of the last change in nanoseconds: another of either is another file.
State = tuple[int, int]


class Watcher:
    """The files of one folder, and which of them were handed out; `memory` is where that is kept over a restart."""

    def __init__(self, folder: Path, *, memory: Path | None = None) -> None:
        self._folder, self._memory = folder, memory
        self._before: dict[str, State] = {}
        self._seen = _read_seen(memory) if memory is not None and memory.exists() else {}

    def look(self) -> Iterator[Path]:
        """Yield the files that are complete and new, by name; raises OSError where the folder cannot be read."""
        there = dict(self._files())
        # An empty file is one that somebody has just opened.
        complete = {name: state for name, state in there.items() if state[0] and self._before.get(name) == state}
        self._before = there
        # What is gone is forgotten: a folder that is emptied again and again does not fill the memory.
        self._seen = {name: state for name, state in self._seen.items() if name in there}
        for name in sorted(complete):
            if self._seen.get(name) != complete[name]:
                yield self._folder / name
                self._seen[name] = complete[name]
                self._remember()

    def unfinished(self) -> list[Path]:
        """Return the files of the last look that were not handed out: still empty, or still changing."""
        return [self._folder / name for name in sorted(self._before) if self._seen.get(name) != self._before[name]]

    def _remember(self) -> None:
        if self._memory is not None:
            write_atomic(self._memory, json.dumps(self._seen).encode())

    def _files(self) -> Iterator[tuple[str, State]]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                state = None if entry.name.startswith(".") else _state(entry)
                if state is not None:
                    yield entry.name, state


def _read_seen(memory: Path) -> dict[str, State]:
    try:
        kept = json.loads(memory.read_text(encoding="utf-8"))
        return {name: (int(size), int(time_ns)) for name, (size, time_ns) in kept.items()}
    except (AttributeError, TypeError, ValueError) as error:
        remedy = "remove it: then every image is classified once more"
        raise InputError("cannot tell what was seen", file=memory, reason=str(error), remedy=remedy) from error


def _state(entry: os.DirEntry[str]) -> State | None:
    """Return the state of a file; None for anything else, and for one that was taken away meanwhile."""
    try:
        status = entry.stat()
        return (status.st_size, status.st_mtime_ns) if entry.is_file() else None
    except FileNotFoundError:
        return None


def classify(classifier: Classifier, path: Path) -> None:
    """Print one line of JSON for an image, or on stderr why it is none."""
    try:
        prediction = classifier(path, top=1)
    except InputError as error:
        if path.exists():  # else it was taken away before its turn
            print(error, file=sys.stderr, flush=True)
        return
    answer = {
        "file": os.fspath(path),
        "label": prediction.label,
        "probability": round(prediction.probability, 6),
        "total_ms": round(prediction.timings.total_ms, 3),
    }
    print(json.dumps(answer), flush=True)


def watch(classifier: Classifier, watcher: Watcher, *, interval_s: float, once: bool, stop: threading.Event) -> None:
    """Classify what comes until `stop` is set; with `once`, what is complete after two looks."""
    for _ in watcher.look():  # nothing is complete yet: that takes two looks
        pass
    while not stop.wait(interval_s):
        for path in watcher.look():
            classify(classifier, path)
            if stop.is_set():  # the image in work was finished, the next is not begun
                return
        if once:
            for path in watcher.unfinished():
                print(f"{printable(path)}: left out, it is still being written", file=sys.stderr)
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model file made by vit-edge")
    parser.add_argument("folder", type=Path, help="where the images appear")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    parser.add_argument("--once", action="store_true", help="classify what is there, then end")
    parser.add_argument("--seen", type=Path, metavar="FILE", help="remember here, over a restart, what was classified")
    parser.add_argument("--threads", type=int, help="of the engine; by default what the machine grants")
    arguments = parser.parse_args()
    if not arguments.interval > 0:
        parser.error("--interval is 0 or less")
    if arguments.seen is not None and arguments.seen.resolve().parent == arguments.folder.resolve():
        parser.error("--seen lies in the folder that is watched, and would be taken for an image")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        watcher = Watcher(arguments.folder, memory=arguments.seen)
        with load(arguments.model, threads=arguments.threads) as classifier:
            watch(classifier, watcher, interval_s=arguments.interval, once=arguments.once, stop=stop)
    except VitEdgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        sys.exit(f"cannot watch {printable(arguments.folder)}: {error}")


if __name__ == "__main__":
    main()
