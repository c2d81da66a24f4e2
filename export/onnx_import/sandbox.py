"""Run a third-party graph in a subprocess with limits: a crash, a hang or a memory bomb ends only the subprocess."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.machine.cpu import usable_threads
from vit_edge.runtime.checks.sandbox import limit_memory, run_apart

__all__ = ["main", "probe"]

Array: TypeAlias = npt.NDArray[Any]

_TIMEOUT_S = 600
# Of address space: what ONNX Runtime maps by itself, and so much for each byte of the file: tensors at three batches.
_BASE_BYTES, _TIMES_FILE = 2**33, 16
_THREADS = 4


def probe(model: bytes, feeds: Sequence[Mapping[str, Array]], outputs: Sequence[str]) -> list[dict[str, Array] | str]:
    """Return the outputs of a serialized graph for each of `feeds`, or the error as text.

    Raises ModelRejected if the graph does not load, or ends the subprocess.
    """
    with tempfile.TemporaryDirectory(prefix="vit-edge.") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model)
        for number, feed in enumerate(feeds):
            np.savez(folder / f"feed{number}.npz", **feed)  # type: ignore[arg-type]
        job = json.dumps({"feeds": len(feeds), "outputs": list(outputs)})
        answer = run_apart("vit_edge.export.onnx_import.sandbox", [name, job], timeout_s=_TIMEOUT_S)
        errors: list[str] = json.loads(answer)
        return [error or _read(folder / f"found{number}.npz", outputs) for number, error in enumerate(errors)]


def _read(path: Path, outputs: Sequence[str]) -> dict[str, Array]:
    with np.load(path) as found:
        return {name: found[str(position)] for position, name in enumerate(outputs)}


def main(folder: str, text: str) -> int:
    """Run the job in `folder`; print a list with the error of each feed, empty if there was none."""
    path = Path(folder) / "model.onnx"
    limit_memory(_BASE_BYTES + _TIMES_FILE * path.stat().st_size)
    import onnxruntime

    job = json.loads(text)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = min(usable_threads(), _THREADS)
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        sys.stderr.write(f"\n{' '.join(str(error).split())}\n")
        return 1
    errors = []
    for number in range(job["feeds"]):
        with np.load(Path(folder) / f"feed{number}.npz") as feed:
            given = dict(feed)
        try:
            found = session.run(job["outputs"], given)
        except Exception as error:
            errors.append(" ".join(str(error).split())[:400])
            continue
        errors.append("")
        np.savez(Path(folder) / f"found{number}.npz", **{str(i): value for i, value in enumerate(found)})
    print(json.dumps(errors))  # noqa: T201 - for the parent process
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
