"""`vit-edge verify --ray`: both models run on a cluster; the statistics run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vit_edge.cli.output import Result, progress_bar
from vit_edge.cli.ray_options import RayJob, job_result, trust

if TYPE_CHECKING:
    from vit_edge.export.verification.encoder_results import AnyVerification
    from vit_edge.export.verification.request import VerificationRequest

__all__ = ["verify_on_ray"]


def verify_on_ray(
    job: RayJob,
    request: VerificationRequest,
    *,
    threads: int | None,
    result_of: Callable[[AnyVerification], Result],
) -> Result:
    """Run both models of the request on the cluster, decide here, and add the summary of the job to the result."""
    from vit_edge.export.verification.encoder_verifier import run_any_verification
    from vit_edge.export.verification.gathered_run import GatheredRun, job_inputs
    from vit_edge.runtime.batch.shard_files import shard_path
    from vit_edge.runtime.batch.shard_work import CompareTask

    task = CompareTask(
        model=request.model.data,
        reference=request.reference.data,
        engines=request.engines,
        options={"threads": threads, **trust()},
    )
    done = job.run(task, job_inputs(request.images))
    shards = [shard_path(done.out, shard) for shard in range(done.shards)]
    run = GatheredRun(request.reference, request.images, shards)
    with progress_bar() as progress:
        found = result_of(run_any_verification(replace(request, reference_run=run), progress=progress))
    summary = job_result(done, verbed="Ran both models on")
    return replace(found, data=found.data | {"job": summary.data}, shown=[*found.shown, *summary.shown])
