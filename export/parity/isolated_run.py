"""Run as a subprocess: load a model file in one engine, and write its outputs.

An engine's memory does not add to that of the process that traced the network, and a crash ends only this one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_edge.errors import ModelRejected, VerificationFailed, VitEdgeError
from vit_edge.files import temporary_folder
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.model_file.writing import write_model
from vit_edge.runtime.checks.acceptance import accept_own
from vit_edge.runtime.checks.load_policy import NO_SANDBOX
from vit_edge.runtime.checks.sandbox import run_apart
from vit_edge.runtime.engines.protocol import Array, EngineOptions, answers, make_engine
from vit_edge.runtime.loading import load_model

__all__ = ["answer_elsewhere", "load_elsewhere", "main"]

_MODEL, _RESULT = "model.onnx", "answers.npz"
_TIMEOUT_S = 3600


def answer_elsewhere(
    model: ModelFile, *, engine: str, batches: Sequence[Pixels], outputs: Sequence[str] = ("logits",)
) -> list[dict[str, Array]]:
    """Return the outputs of `engine`, run in a subprocess, for each batch of uint8 images.

    Raises VerificationFailed, with the batch at which it failed.
    """
    with temporary_folder() as name:
        folder = Path(name)
        write_model(folder / _MODEL, model)
        for number, batch in enumerate(batches):
            np.save(folder / f"{number}.npy", batch)
        _run(folder, {"engine": engine, "batches": len(batches), "outputs": list(outputs)})
        with np.load(folder / _RESULT) as found:
            return [{key: found[f"{number} {key}"] for key in outputs} for number in range(len(batches))]


def load_elsewhere(model: ModelFile, *, engine: str) -> None:
    """Load the model file in a subprocess as a user's application would, with the golden check.

    Raises VerificationFailed.
    """
    with temporary_folder() as name:
        write_model(Path(name) / _MODEL, model)
        _run(Path(name), {"engine": engine, "batches": 0, "outputs": []})
    accept_own(model, engine=engine)


def _run(folder: Path, job: dict[str, object]) -> None:
    arguments, engine = [str(folder), json.dumps(job)], str(job["engine"])
    try:
        run_apart("vit_edge.export.parity.isolated_run", arguments, timeout_s=_TIMEOUT_S, who=engine)
    except ModelRejected as error:
        raise _failed(error.reason) from error


def _failed(reason: str) -> VerificationFailed:
    remedy = "the batch must stay free: no shape of the forward pass may depend on it"
    if "at batch" not in reason:
        remedy = "report it with the checkpoint, or try another version of the engine"
    return VerificationFailed("the exported graph does not run", reason=reason, remedy=remedy)


def main(folder: str, text: str) -> int:
    """Run the job in `folder`; without batches, load the file with every check."""
    job = json.loads(text)
    try:
        model = open_model(Path(folder) / _MODEL)
        if not job["batches"]:
            load_model(model, engine=job["engine"], options=EngineOptions(), policy=NO_SANDBOX).close()
            return 0
        engine = make_engine(job["engine"], model, EngineOptions())
    except VitEdgeError as error:
        return _say(f"{job['engine']} cannot load it: {error.reason}")
    found: dict[str, Array] = {}
    for number in range(job["batches"]):
        batch = np.load(Path(folder) / f"{number}.npy")
        try:
            results = answers(engine, model.manifest, batch, job["outputs"])
        except VitEdgeError as error:
            return _say(f"{job['engine']} fails at batch {len(batch)}: {error.reason}")
        found |= {f"{number} {name}": value for name, value in zip(job["outputs"], results, strict=True)}
    np.savez(Path(folder) / _RESULT, **found)  # type: ignore[arg-type]
    return 0


def _say(text: str) -> int:
    sys.stderr.write(f"\n{' '.join(text.split())[-500:]}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
