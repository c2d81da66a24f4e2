"""`vit-edge` in a process of its own that need not import PyTorch first: it is forked from one that has."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

__all__ = ["run_forked"]

# What takes seconds to import, and starts no threads: PyTorch, and what its exporter imports when it is called first.
_IMPORTED = ("torch._dynamo", "torch.export", "torch.onnx", "onnx", "onnxscript.optimizer", "onnxscript.rewriter")
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, *_IMPORTED])


def run_forked(arguments: list[str], *, cwd: str | os.PathLike[str] | None) -> subprocess.CompletedProcess[str]:
    """Return the exit code and what was printed, as `subprocess.run` of `python -m vit_edge` does."""
    command = [sys.executable, "-m", "vit_edge", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = (Path(folder) / "stdout", Path(folder) / "stderr")
        process = _CONTEXT.Process(
            target=_run, args=(arguments, os.fspath(cwd or Path.cwd()), dict(os.environ), streams)
        )
        process.start()
        process.join(1800)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, 1800)
        printed = [stream.read_text(encoding="utf-8", errors="replace") for stream in streams]
    return subprocess.CompletedProcess(command, process.exitcode, *printed)


def _run(arguments: list[str], cwd: str, environment: Mapping[str, str], streams: tuple[Path, Path]) -> None:
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = ["vit-edge", *arguments]
    from vit_edge.__main__ import run

    try:
        run()
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends without them
