"""Runs in a sandbox subprocess: loads the model file of a job with every check, and prints the error or null."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vit_edge.errors import ModelRejected, VitEdgeError
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.checks.sandbox import JOB_NAME, REMEDY, WHAT, limit_memory
from vit_edge.runtime.engines.protocol import EngineOptions, Model
from vit_edge.runtime.loading import run_checked

__all__ = ["main"]

# Of address space: what an engine maps by itself, and so much for each byte of the file.
_BASE_BYTES, _TIMES_FILE = 2**33, 16


def main(folder: str) -> int:
    """Load the file that the job in `folder` names, classify one golden image, and print the error or null."""
    job = json.loads((Path(folder) / JOB_NAME).read_text(encoding="utf-8"))
    if job["options"]["device"] == "cpu":  # drivers of other devices map far more than they use
        limit_memory(_BASE_BYTES + _TIMES_FILE * job["bytes"])
    error = None
    try:
        _load(Path(folder) / job["file"], job)
    except VitEdgeError as problem:
        fields = {"what": problem.what, "reason": problem.reason, "remedy": problem.remedy}
        error = {"type": type(problem).__name__, **fields}
    except MemoryError:
        reason = "loading the file needs more memory than the sandbox grants"
        error = {"type": "ModelRejected", "what": WHAT, "reason": reason, "remedy": REMEDY}
    sys.stdout.write(f"\n{json.dumps({'error': error})}\n")
    sys.stdout.flush()
    os._exit(0)  # an engine that crashes while it is unloaded has nothing to do with the file's fitness to run


def _load(path: Path, job: dict[str, Any]) -> None:
    model: Model = open_ir(path) if path.suffix == ".xml" else open_model(path, warn=False, check=False)
    if isinstance(model, ModelFile):
        model = replace(model, is_third_party=job["third_party"])
    loaded, _ = run_checked(model, engine=job["engine"], options=EngineOptions(**job["options"]), verify=job["verify"])
    height, width = model.manifest.preprocessing.crop
    found = loaded.run(golden_images([1], height=height, width=width))
    if found.shape != (1, model.manifest.num_values):
        reason = f"the {model.manifest.output} has the shape {list(found.shape)}, not [1, {model.manifest.num_values}]"
        raise ModelRejected(WHAT, reason=reason, remedy=REMEDY)


if __name__ == "__main__":
    main(*sys.argv[1:])
