"""A sandbox: a subprocess with limits on time and memory, for what may crash, hang or need all memory.

The engines can be made to crash by a graph, and OpenVINO stays broken after some graphs that give wrong logits. The
sandbox protects the process that loads; a subprocess of the same user does not contain code that a file might run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vit_edge import errors
from vit_edge.errors import EngineUnavailable, ModelRejected
from vit_edge.files import temporary_folder
from vit_edge.model_file.artifact import ModelFile
from vit_edge.model_file.openvino_ir import IrModel
from vit_edge.runtime.checks.acceptance import Trial, refusal, refuse

__all__ = ["JOB_NAME", "REMEDY", "WHAT", "limit_memory", "run_apart", "start_of", "try_in_sandbox"]

# A slow device needs about a minute for the golden images of a network of 100 MB.
_TIMEOUT_S, _BYTES_A_SECOND = 120, 2_000_000
# Not SIGKILL, which the system sends where memory is short, or a person.
_CRASHES = [getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE", "SIGBUS")]
JOB_NAME = "job.json"
WHAT, REMEDY = "the engine cannot run the network", "export it again"
_log = logging.getLogger(__name__)


def run_apart(module: str, arguments: Sequence[str], *, timeout_s: int, who: str = "the engine") -> str:
    """Return what `python -m module arguments` prints; raises ModelRejected if the subprocess crashes, hangs or fails.

    The last line on stderr is the reason; engines may write anything above it.
    """
    if not sys.executable:
        reason, remedy = "this program does not name its Python, so no sandbox can start", "load with sandbox='never'"
        raise EngineUnavailable("cannot load", reason=reason, remedy=remedy)
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
        raise _rejected(reason)
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


def try_in_sandbox(trial: Trial) -> None:
    """Load a model file in a sandbox subprocess, with every check; raises what loading it raised there.

    A file that crashed the engine is remembered and not tried again. What may have had another cause, such as time, is
    not remembered.
    """
    before = refusal(trial)
    if before is not None:
        raise _rejected(f"{before}; the crash is remembered, and the file was not tried again")
    _log.info("%s: not known on this machine; trying the file in a sandbox first", trial.model.source)
    with temporary_folder() as name:
        num_bytes = _write_job(Path(name), trial)
        timeout_s = int(_TIMEOUT_S + num_bytes / _BYTES_A_SECOND)
        try:
            printed = run_apart("vit_edge.runtime.sandbox_child", [name], timeout_s=timeout_s)
        except _Refused as error:
            refuse(trial, error.reason)
            raise
    problem = json.loads(printed.splitlines()[-1])["error"]
    if problem is not None:
        kind = getattr(errors, problem["type"])
        raise kind(problem["what"], reason=problem["reason"], remedy=problem["remedy"])


def _write_job(folder: Path, trial: Trial) -> int:
    """Write the verified bytes and the job into `folder`; returns how many bytes the model has."""
    model = trial.model
    if isinstance(model, IrModel):
        files = {"model.xml": model.xml, "model.bin": model.weights}
    else:
        files = {"model.onnx": model.data}
        if model.weights is not None and model.manifest.weights is not None:
            files[model.manifest.weights["file"]] = model.weights
    for name, data in files.items():
        (folder / name).write_bytes(data)
    num_bytes = sum(len(data) for data in files.values())
    job = {
        "file": next(iter(files)),
        "engine": trial.engine,
        "options": asdict(trial.options),
        "verify": trial.verify,
        "bytes": num_bytes,
        "third_party": isinstance(model, ModelFile) and model.is_third_party,
    }
    (folder / JOB_NAME).write_text(json.dumps(job), encoding="utf-8")
    return num_bytes


class _Refused(ModelRejected):
    """What the file itself is the cause of: it would end so every time."""


def _rejected(reason: str, *, is_final: bool = False) -> ModelRejected:
    kind = _Refused if is_final else ModelRejected
    return kind(WHAT, reason=reason, remedy=REMEDY)
