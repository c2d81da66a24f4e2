"""A job on a Ray cluster: shards of inputs, actors that load the models once, Parquet shards out.

Ray Data schedules, adds actors and computes the shards of a lost worker again. Only the process that started the job
writes. A shard's file appears whole or not at all: a stopped job goes on where it was, and each input is in one shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vit_edge.errors import ResourceExhausted, UsageError, VitEdgeError, require
from vit_edge.files import write_atomic
from vit_edge.progress import Progress, silent
from vit_edge.runtime.batch.inputs import JobInput
from vit_edge.runtime.batch.job_folder import JobFolder, JobResult
from vit_edge.runtime.batch.shard_files import shard_path
from vit_edge.runtime.batch.shard_work import ShardWorker, Task

__all__ = ["run_on_ray"]

_GPUS = ("cuda", "tensorrt")


def run_on_ray(
    task: Task,
    inputs: Sequence[JobInput],
    *,
    out: str | os.PathLike[str],
    address: str = "local",
    resume: bool = False,
    shard_size: int = 1000,
    progress: Progress = silent,
) -> JobResult:
    """Run `task` on the inputs on a Ray cluster, and write Parquet shards with a row for each input to `out`.

    A row has `path`, `sha256`, what the task computes, and `error`: an image that cannot be used is a row with its
    error. `address` is "local" for a cluster of this machine, else that of a cluster whose machines have the inputs at
    the same paths. `resume` keeps the shards that an earlier run of the same job finished. An actor has one thread
    unless the options of the task say more. Raises what `Task.open` raises, UsageError, MissingExtra, and
    ResourceExhausted if the cluster is lost.
    """
    ray = require("ray", extra="ray", what="start the job")
    require("ray.data", extra="ray", what="start the job")
    threads = task.options.get("threads") or 1
    task = replace(task, options={**task.options, "threads": threads})
    folder = JobFolder.begin(Path(out).absolute(), task, inputs, shard_size=shard_size, resume=resume)
    left, done, started = folder.left(), 0, time.perf_counter()
    total = sum(len(folder.inputs_of(shard)) for shard in left)
    if left:
        with _cluster(ray, address):
            progress(_ing(task), 0, total)
            started = time.perf_counter()
            for shard, data in _computed(ray, task, folder, left):
                write_atomic(shard_path(folder.path, shard), data)
                done += len(folder.inputs_of(shard))
                progress(_ing(task), done, total)
    return folder.finish(num_kept=folder.num_shards - len(left), images=done, seconds=time.perf_counter() - started)


def _computed(ray: Any, task: Task, folder: JobFolder, left: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Yield each shard as it is computed, in any order."""
    threads = int(task.options["threads"])
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the command has its own
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"shard": shard, "inputs": pickle.dumps(folder.inputs_of(shard))} for shard in left]
    at_first = max(1, min(len(left), int(ray.cluster_resources().get("CPU", 1)) // threads))
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,
        fn_constructor_args=(ray.put(pickle.dumps(task)),),
        # Ray adds more if the cluster grows, and goes on with fewer if a machine is lost.
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=at_first, max_size=len(left)),
        num_cpus=threads,
        num_gpus=1 if task.options.get("device") in _GPUS else None,
    )
    try:
        for row in dataset.iter_rows():
            found = pickle.loads(row["found"])
            if isinstance(found, VitEdgeError):
                raise found
            yield row["shard"], found
    except ray.exceptions.RayError as error:
        reason = " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
        remedy = "run it again with --resume: finished shards are kept"
        raise ResourceExhausted("the job stopped", reason=reason, remedy=remedy) from error


class _Actor:
    """What Ray Data runs in each of its actors; our errors are what it returns, for Ray would wrap them in its own."""

    def __init__(self, task: Any) -> None:
        import ray

        self._task: Task = pickle.loads(ray.get(task) if isinstance(task, ray.ObjectRef) else task)
        self._node = ray.get_runtime_context().get_node_id()[:8]
        self._worker: ShardWorker | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found: bytes | VitEdgeError = self._open().run(row["shard"], pickle.loads(row["inputs"]), node=self._node)
        except VitEdgeError as error:
            found = error
        return {"shard": row["shard"], "found": pickle.dumps(found)}

    def _open(self) -> ShardWorker:
        if self._worker is None:
            self._worker = self._task.open()
        return self._worker


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, and leave it."""
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    except Exception as error:  # ConnectionError; Exception itself where a node does not start in time
        reason = " ".join(str(error).split())[:300]
        remedy = "start it with `ray start --head`, or use --ray local"
        raise UsageError("cannot reach the cluster", reason=reason, remedy=remedy) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ing(task: Task) -> str:
    return {"classify": "classifying", "embed": "embedding", "compare": "verifying"}[task.verb]
