"""Sandbox subprocesses that are forked from one that has imported the engines already: the fuzzer runs thousands.

Each mutant still has a process to itself. The sandbox's own code starts it by `subprocess.run`, which asks this server.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["SandboxServer", "main"]

_IMPORTED = ("vit_edge.model_file.openvino_ir", "vit_edge.runtime.loading", "onnxruntime", "openvino")
_INTERRUPTED = "timeout"


class SandboxServer:
    """A `subprocess.run` for `python -W ignore -c CODE ARGUMENTS`; `cpu_s` is what all of them took."""

    TimeoutExpired = subprocess.TimeoutExpired
    DEVNULL = subprocess.DEVNULL

    def __init__(self, folder: Path) -> None:
        self.cpu_s, self._folder = 0.0, folder
        command = [sys.executable, "-W", "ignore", "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, command: list[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        """Return how the process ended and what it printed; raises TimeoutExpired."""
        files = [self._folder / "sandbox.stdout", self._folder / "sandbox.stderr"]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"code": command[4], "arguments": command[5:], "files": [str(file) for file in files], "seconds": timeout}
        self._process.stdin.write(f"{json.dumps(job)}\n")
        self._process.stdin.flush()
        code, cpu_s = json.loads(self._process.stdout.readline())
        self.cpu_s += cpu_s
        if code == _INTERRUPTED:
            raise subprocess.TimeoutExpired(command, timeout)
        stdout, stderr = (file.read_text(errors="replace") for file in files)
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def main() -> None:
    """Run jobs until stdin ends."""
    for name in _IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(f"{json.dumps(_ended(json.loads(line)))}\n")
        answers.flush()


def _ended(job: dict[str, Any]) -> tuple[int | str, float]:
    """Return the exit code of a job, and its seconds of CPU."""
    child, end = os.fork(), time.monotonic() + job["seconds"]
    if child == 0:
        _run(job)
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() > end:
            os.kill(child, 9)
            used = os.wait4(child, 0)[2]
            return _INTERRUPTED, used.ru_utime + used.ru_stime
        time.sleep(0.002)


def _run(job: dict[str, Any]) -> None:
    for number, name in enumerate(job["files"], start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["-c", *job["arguments"]]
    try:
        exec(job["code"], {"__name__": "__main__"})
    except BaseException as error:  # as an interpreter ends
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
