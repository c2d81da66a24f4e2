"""A verification with the shards of a job decides as one that ran both models itself."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from vit_edge.errors import DataRejected
from vit_edge.export.verification.encoder_verifier import run_any_verification
from vit_edge.export.verification.gathered_run import GatheredRun, job_inputs
from vit_edge.export.verification.request import VerificationRequest, open_request
from vit_edge.runtime.batch.shard_files import shard_path
from vit_edge.runtime.batch.shard_work import CompareTask

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")


def gathered(request: VerificationRequest, folder: Path, *, shard_size: int) -> VerificationRequest:
    """Run the shards of a job here, and return the request with what they hold."""
    task = CompareTask(
        model=request.model.data,
        reference=request.reference.data,
        engines=request.engines,
        options={"threads": 1},
    )
    inputs, worker, shards = job_inputs(request.images), task.open(), []
    for number, start in enumerate(range(0, len(inputs), shard_size)):
        shards.append(shard_path(folder, number))
        shards[-1].write_bytes(worker.run(number, inputs[start : start + shard_size]))
    worker.close()
    return replace(request, reference_run=GatheredRun(request.reference, request.images, shards))


def figures(found: Any) -> dict[str, Any]:
    """Return everything that a verification holds; the last bits of a logit depend on the batch."""
    fields = asdict(found)
    for result in fields["results"]:
        for name, value in result.items():
            result[name] = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
        for name in ("changed", "moved"):  # lists of images with their margins
            result.pop(name, None)
    return fields


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_the_verdict_and_the_figures_are_those_of_one_process(
    kind: str, small_encoder: Path, deployment: Path, tmp_path: Path
) -> None:
    if kind == "encoder":
        reference, model, data = small_encoder / "e.onnx", small_encoder / "e.int8.onnx", small_encoder / "images"
    else:
        reference, model, data = (
            deployment / "out" / "model.onnx",
            deployment / "out" / "model.int8.onnx",
            deployment / "data",
        )
    copied = shutil.copytree(data, tmp_path / "data")
    first = sorted(copied.rglob("*.png"))[0]
    shutil.copy(first, first.with_name("z.png"))  # a duplicate is counted once
    request = open_request(model, reference=reference, data=copied, threads=1)
    alone = run_any_verification(request)
    there = run_any_verification(
        gathered(open_request(model, reference=reference, data=copied), tmp_path, shard_size=25)
    )
    assert figures(there) == figures(alone)


def test_too_many_images_that_cannot_be_used_are_refused(small_encoder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(small_encoder / "images", tmp_path / "data")
    for path in sorted(data.rglob("*.png"))[:7]:
        path.write_bytes(b"hello")
    request = open_request(small_encoder / "e.onnx", reference=small_encoder / "e.onnx", data=data)
    with pytest.raises(DataRejected, match="6 or more of 120 images cannot be used"):
        gathered(request, tmp_path, shard_size=60)
