"""Run what may crash, hang or eat all memory in a throw-away process, under limits: only that one ends.

A release of an engine can be made to crash by a graph; whoever reads files of others has to expect it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vit_edge.cache import recall, remember
from vit_edge.errors import ModelRejected, VitEdgeError
from vit_edge.files import sha256_hex
from vit_edge.machine.cpu import instruction_set
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.runtime.engines.protocol import EngineOptions, engine_version, make_engine

__all__ = ["REFUSED", "limit_memory", "main", "probe", "run_apart", "start_of"]

_TIMEOUT_S = 120
# Of address space: what an engine maps by itself, and so much for each byte of the file.
_BASE_BYTES, _TIMES_FILE = 2**33, 16
# The exit code of a child that refuses the file itself.
REFUSED = 3
# Not SIGKILL, which the system sends where memory is short, or a person.
_CRASHES = [getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE", "SIGBUS")]
_log = logging.getLogger(__name__)


def run_apart(module: str, arguments: Sequence[str], *, timeout_s: int, who: str = "the engine") -> str:
    """Return what `python -m module arguments` prints; raises ModelRejected where it crashes, hangs or fails.

    The last line that it writes to stderr is why it failed; engines write above it what they like.
    """
    command = [sys.executable, "-W", "ignore", "-c", start_of(module), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise _rejected(f"{who} did not finish in {timeout_s} s") from error
    if done.returncode < 0:
        number = -done.returncode
        raise _rejected(f"{who} crashed ({signal.Signals(number).name})", is_final=number in _CRASHES)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:500] if lines else f"it ended with {done.returncode}"
        raise _rejected(reason, is_final=done.returncode == REFUSED)
    return done.stdout


def start_of(module: str) -> str:
    """Return the Python that runs `module` as a program, with the paths of this process and no others.

    `python -m` would look in the current folder first, where anybody may have put a numpy.py.
    """
    paths = [os.path.abspath(path) for path in sys.path if path]  # noqa: PTH100 - sys.path holds texts
    return f"import sys; sys.path[:] = {paths!r}; import runpy; runpy.run_module({module!r}, run_name='__main__')"


def limit_memory(most_bytes: int) -> None:
    """Let this process map no more than so many bytes, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = most_bytes if hard == resource.RLIM_INFINITY else min(hard, most_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def probe(model: ModelFile, engine: str) -> None:
    """Load a model file in `engine` and let it answer once, in a process of its own; raises ModelRejected.

    A file that was tried is remembered by its hash, the engine's version and the CPU: one that crashed or was refused
    is not tried again, one that answered need not be. What may have had another cause, such as time, is not remembered.
    """
    key = sha256_hex(json.dumps([model.sha256, engine, engine_version(engine), instruction_set()]).encode())
    known = recall("probes", key)
    if known is not None and known.get("answered") is True:
        return
    if known is not None and isinstance(known.get("reason"), str):
        raise _rejected(f"{known['reason']}; it is remembered, and was not tried again")
    _log.info("%s is tried in a process of its own first", model.source)
    with tempfile.TemporaryDirectory(prefix="vit-edge.") as name:
        path = Path(name) / "model.onnx"
        path.write_bytes(model.data)
        try:
            run_apart("vit_edge.runtime.checks.sandbox", [str(path), engine], timeout_s=_TIMEOUT_S)
        except _Refused as error:
            remember("probes", key, {"reason": error.reason})
            raise
    remember("probes", key, {"answered": True})


def main(path: str, engine: str) -> int:
    """Load the file at `path`, let it answer for one golden input, and return 0."""
    from vit_edge.runtime.checks.golden import golden_images

    limit_memory(_BASE_BYTES + _TIMES_FILE * Path(path).stat().st_size)
    try:
        model = open_model(path, warn=False)
        loaded = make_engine(engine, model, EngineOptions(threads=1))
        height, width = model.manifest.preprocessing.crop
        logits = loaded.run(golden_images([1], height=height, width=width))
    except VitEdgeError as error:
        sys.stderr.write(f"\n{' '.join(error.reason.split())}\n")
        return REFUSED
    if logits.shape != (1, len(model.manifest.labels)):
        sys.stderr.write(f"\nits answer has the shape {list(logits.shape)}, not [1, {len(model.manifest.labels)}]")
        return REFUSED
    return 0


class _Refused(ModelRejected):
    """What the file itself is the cause of: it would end so every time."""


def _rejected(reason: str, *, is_final: bool = False) -> ModelRejected:
    kind = _Refused if is_final else ModelRejected
    return kind("the engine cannot run the network", reason=reason, remedy="export it again")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
