"""A job that classifies images on a Ray cluster: shards of inputs, actors that load the model once, Parquet shards out.

Ray Data schedules, autoscales the actors and computes the shards of a lost worker again. A shard's file appears whole
or not at all, so that a stopped job goes on where it was and every input is in one shard.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vit_edge.errors import MissingExtra, ModelRejected, ResourceExhausted, UsageError, VitEdgeError
from vit_edge.files import read_file, sha256_hex, write_atomic
from vit_edge.model_file.artifact import MODEL_BYTES, ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.runtime.batch.inputs import JobInput, find_inputs, inputs_sha256
from vit_edge.runtime.batch.shard_classifier import ShardClassifier, ShardSummary, shard_path
from vit_edge.runtime.loading import open_any

__all__ = ["JobResult", "classify_on_ray"]

_JOB_FILE = "job.json"
_DEFAULT_SHARD_SIZE = 1000
_GPUS = ("cuda", "tensorrt")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """What a job did: all images and errors, the shards that were computed now or kept, and the rate of this run.

    `workers` is the number of processes by the instruction set of their CPU.
    """

    out: Path
    images: int
    errors: int
    shards: int
    kept_shards: int
    seconds: float
    images_per_s: float
    workers: Mapping[str, int]


def classify_on_ray(
    model: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    address: str = "local",
    resume: bool = False,
    shard_size: int = _DEFAULT_SHARD_SIZE,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> JobResult:
    """Classify the images of folders, shards and lists of URIs on a Ray cluster, and write Parquet shards to `out`.

    Each row has `path`, `sha256`, `label`, `probability` and `error`: an image that cannot be read is a row with its
    error. `address` is "local" for a cluster of this machine, else that of a cluster whose machines share the folders
    and `out`. `resume` keeps the shards that an earlier run of the same job finished. `options` are those of `load`; an
    actor has one thread unless they say more. Raises as `load` does, DataRejected, UsageError, MissingExtra.
    """
    ray = _ray()
    data = _model_bytes(model)
    inputs = find_inputs(sources)
    folder = Path(out).absolute()
    shards = [inputs[start : start + shard_size] for start in range(0, len(inputs), shard_size)]
    described = {"model": sha256_hex(data), "inputs": inputs_sha256(inputs), "shard_size": shard_size}
    _begin(folder, described, resume=resume)
    left = [number for number in range(len(shards)) if not shard_path(folder, number).exists()]
    done: list[ShardSummary] = []
    with _cluster(ray, address):
        started = time.perf_counter()
        for summary in _summaries(ray, data, shards, left, folder, options or {}):
            done.append(summary)
            progress("classifying", sum(one.images for one in done), sum(len(shards[number]) for number in left))
        seconds = time.perf_counter() - started
    num_done = sum(one.images for one in done)
    result = JobResult(
        out=folder,
        images=len(inputs),
        errors=_num_errors(folder, len(shards)),
        shards=len(shards),
        kept_shards=len(shards) - len(left),
        seconds=seconds,
        images_per_s=num_done / seconds,
        workers=_by_instruction_set(done),
    )
    summary_text = json.dumps(
        {**asdict(result), "out": str(folder), "finished": [asdict(one) for one in done]}, indent=2
    )
    write_atomic(folder / "summary.json", summary_text.encode())
    return result


def _summaries(
    ray: Any,
    model: bytes,
    shards: Sequence[Sequence[JobInput]],
    left: Sequence[int],
    folder: Path,
    options: Mapping[str, Any],
) -> Iterator[ShardSummary]:
    """Yield the summary of each shard as it is finished."""
    if not left:
        return
    threads = options.get("threads") or 1
    most = max(1, min(len(left), int(ray.cluster_resources().get("CPU", 1)) // threads))
    rows = [{"shard": number, "inputs": pickle.dumps(list(shards[number]))} for number in left]
    ray.data.DataContext.get_current().enable_progress_bars = False  # the command has its own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,
        fn_constructor_args=(ray.put(model), str(folder), {**options, "threads": threads}),
        concurrency=(1, most),
        num_cpus=threads,
        num_gpus=1 if options.get("device") in _GPUS else None,
    )
    try:
        for row in dataset.iter_rows():
            yield ShardSummary(**row)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
        remedy = "run it again with --resume: finished shards are kept"
        raise ResourceExhausted("the job stopped", reason=reason, remedy=remedy) from error


class _Actor:
    """What Ray Data runs in each of its actors."""

    def __init__(self, model: Any, folder: str, options: Mapping[str, Any]) -> None:
        import ray

        data = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        with _plain_errors():
            self._classifier = ShardClassifier(data, out=Path(folder), options=options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with _plain_errors():
            return asdict(self._classifier.run(row["shard"], pickle.loads(row["inputs"])))


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise our errors as RuntimeError: they do not pickle, and Ray would hide what they say."""
    try:
        yield
    except VitEdgeError as error:
        raise RuntimeError(str(error)) from None


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        remedy = 'pip install "vit-edge[ray]"'
        raise MissingExtra("cannot start the job", reason="Ray Data is not installed", remedy=remedy) from error
    return ray


def _model_bytes(model: str | os.PathLike[str]) -> bytes:
    """Return the bytes of the model file, which every actor gets; raises ModelRejected if it is more than one file."""
    opened = open_any(model)
    if not isinstance(opened, ModelFile) or opened.weights is not None:
        reason, remedy = "the model is in two files; actors get one", "give an .onnx file below 2 GiB"
        raise ModelRejected("cannot start the job", file=model, reason=reason, remedy=remedy)
    return read_file(model, what="model file", max_bytes=MODEL_BYTES, error=ModelRejected)


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, and leave it."""
    try:
        dashboard = False if address == "local" else None
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)
    except Exception as error:  # ConnectionError; Exception itself where a node does not start in time
        remedy = "start it with `ray start --head`, or give local"
        raise UsageError("cannot reach the cluster", reason=str(error)[:300], remedy=remedy) from error
    try:
        yield
    finally:
        ray.shutdown()


def _begin(folder: Path, described: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of a new job, or check that it belongs to this job; raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _JOB_FILE
    if not file.exists():
        if os.listdir(folder):
            reason, remedy = "the folder is not empty, and no job began in it", "choose another folder"
            raise UsageError("cannot start the job", file=folder, reason=reason, remedy=remedy)
        write_atomic(file, json.dumps(described).encode())
        return
    if not resume:
        remedy = "add --resume to finish it, or choose another folder"
        raise UsageError("cannot start the job", file=folder, reason="a job began in the folder", remedy=remedy)
    try:
        before = json.loads(read_file(file, what="job", max_bytes=10_000))
    except ValueError:
        before = None
    if before != described:
        reason = "the job in the folder has another model, other images or another shard size"
        raise UsageError("cannot resume the job", file=folder, reason=reason, remedy="choose another folder")


def _num_errors(folder: Path, num_shards: int) -> int:
    """Return how many rows of all shards have an error, whichever run wrote them."""
    from pyarrow import parquet

    columns = (parquet.read_table(shard_path(folder, n), columns=["error"])["error"] for n in range(num_shards))
    return sum(len(column) - column.null_count for column in columns)


def _by_instruction_set(done: Sequence[ShardSummary]) -> dict[str, int]:
    pairs = {(one.instruction_set, one.worker) for one in done}
    names = [name for name, _ in pairs]
    return {name: names.count(name) for name in sorted(set(names))}
