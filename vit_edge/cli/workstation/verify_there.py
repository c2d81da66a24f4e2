"""`vit-edge verify` with models that run elsewhere: the candidate on devices, or both on a cluster of Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vit_edge.cli.device.remote import Remote, parts
from vit_edge.cli.output import Result, progress_bar
from vit_edge.cli.ray_options import RayJob, job_result, trust
from vit_edge.errors import UsageError
from vit_edge.files import temporary_folder
from vit_edge.remote.answers import RemoteModel
from vit_edge.remote.device import Bundle, Session
from vit_edge.remote.fleet import Outcome, run_on
from vit_edge.runtime.engines.protocol import installed_engines

if TYPE_CHECKING:
    from vit_edge.export.verification.encoder_results import AnyVerification
    from vit_edge.export.verification.request import VerificationRequest

__all__ = ["verify_on_ray", "verify_there"]


def verify_there(
    remote: Remote, model: Path, request: VerificationRequest, *, engines: tuple[str, ...]
) -> list[tuple[Outcome, AnyVerification | None]]:
    """Return the verification of each device, or None if its outcome is an error; the reference runs here."""
    from vit_edge.export.verification.encoder_verifier import run_any_verification

    with temporary_folder() as folder:
        bundle = Bundle.write(Path(folder), {model: parts(model)}, remote.setup)

        def work(session: Session, _outcome: Outcome) -> AnyVerification:
            chosen = _engines(session, engines)
            session.provide(bundle, engine=chosen[0], needs_engine=True)

            def there(engine: str) -> AbstractContextManager[RemoteModel]:
                seconds, threads = remote.setup.seconds, request.reference_run.threads
                return RemoteModel(session, bundle, model=model, engine=engine, threads=threads, seconds=seconds)

            return run_any_verification(replace(request, engines=chosen, open_candidate=there))

        with progress_bar() as progress:
            outcomes = run_on(remote.devices, work, remote.setup, progress=progress)
    return [(outcome, outcome.value) for outcome in outcomes]


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


def _engines(session: Session, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Return the engines to verify in: the requested ones, the device's own, or all that both machines have."""
    if asked:
        return asked
    own = session.device.engine
    there = (own,) if own else ("onnxruntime",) if session.installs else tuple(session.engines)
    both = tuple(engine for engine in there if engine in installed_engines())
    if there and not both:
        reason = f"{session.device.name} has {', '.join(there)}; the reference needs the same engine here"
        raise UsageError("cannot verify", reason=reason, remedy=f"install {there[0]} on this machine")
    return both or ("onnxruntime",)
