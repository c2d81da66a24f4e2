"""The folder of a job: what the job is, which shards are done, and a summary at the end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vit_edge.errors import UsageError
from vit_edge.files import read_file, sha256_hex, write_atomic
from vit_edge.runtime.batch.inputs import JobInput, inputs_sha256
from vit_edge.runtime.batch.shard_files import Origin, read_origin, shard_path
from vit_edge.runtime.batch.shard_work import Task

__all__ = ["JobFolder", "JobResult", "NodeWork"]

_JOB_FILE, _SUMMARY_FILE = "job.json", "summary.json"
_LONGEST = 200
# What changes no row of the results.
_FREE_OPTIONS = ("threads", "sandbox", "allow_ops")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeWork:
    """What one machine of the cluster is, and how much of the job it did."""

    node: str
    cpu: str
    instruction_set: str
    engine: str
    workers: int
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """What a job did: images, errors and nodes of all runs; seconds and images/s of this run alone."""

    out: Path
    images: int
    errors: int
    shards: int
    kept_shards: int
    seconds: float
    images_per_s: float
    nodes: tuple[NodeWork, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFolder:
    """A folder with the shards of one job."""

    path: Path
    inputs: Sequence[JobInput]
    shard_size: int

    @classmethod
    def begin(cls, path: Path, task: Task, inputs: Sequence[JobInput], *, shard_size: int, resume: bool) -> JobFolder:
        """Make the folder of a new job, or check that it belongs to this job; raises UsageError."""
        described = {
            "task": task.verb,
            "models": [sha256_hex(model) for model in task.models],
            "options": {name: _short(task.options[name]) for name in sorted(task.options) if name not in _FREE_OPTIONS},
            "inputs": inputs_sha256(inputs),
            "shard_size": shard_size,
        }
        path.mkdir(parents=True, exist_ok=True)
        file = path / _JOB_FILE
        if file.exists():
            _check_same(file, described, resume=resume)
        elif os.listdir(path):
            reason, remedy = "the folder is not empty, and no job began in it", "choose another folder"
            raise UsageError("cannot start the job", file=path, reason=reason, remedy=remedy)
        else:
            write_atomic(file, json.dumps(described, indent=2).encode())
        return cls(path=path, inputs=inputs, shard_size=shard_size)

    @property
    def num_shards(self) -> int:
        """Return how many shards the whole job has."""
        return -(-len(self.inputs) // self.shard_size)

    def inputs_of(self, shard: int) -> Sequence[JobInput]:
        """Return the inputs of a shard."""
        return self.inputs[shard * self.shard_size : (shard + 1) * self.shard_size]

    def left(self) -> list[int]:
        """Return the shards that are not finished."""
        return [shard for shard in range(self.num_shards) if not shard_path(self.path, shard).exists()]

    def finish(self, *, num_kept: int, images: int, seconds: float) -> JobResult:
        """Write the summary of all shards, and return it; `images` were done in `seconds` by this run."""
        origins = [read_origin(shard_path(self.path, shard)) for shard in range(self.num_shards)]
        result = JobResult(
            out=self.path,
            images=sum(origin.images for origin in origins),
            errors=sum(origin.errors for origin in origins),
            shards=self.num_shards,
            kept_shards=num_kept,
            seconds=seconds,
            images_per_s=images / seconds if images else 0.0,
            nodes=_nodes(origins),
        )
        found = sorted({node.instruction_set for node in result.nodes})
        if len(found) > 1:
            _log.warning("the nodes have different instruction sets (%s): INT8 results may differ", ", ".join(found))
        summary = json.dumps({**asdict(result), "out": str(self.path)}, indent=2)
        write_atomic(self.path / _SUMMARY_FILE, summary.encode("utf-8", "backslashreplace"))
        return result


def _short(value: object) -> str:
    """Return a value as the folder keeps it: the labels of a third-party model by their hash."""
    text = repr(value)
    return text if len(text) <= _LONGEST else sha256_hex(text.encode("utf-8", "backslashreplace"))


def _check_same(file: Path, described: dict[str, object], *, resume: bool) -> None:
    """Raise UsageError unless the folder has the same job, and it is to go on."""
    folder = file.parent
    if not resume:
        remedy = "add --resume to finish it, or choose another folder"
        raise UsageError("cannot start the job", file=folder, reason="a job began in the folder", remedy=remedy)
    try:
        before = json.loads(read_file(file, what="job", max_bytes=1_000_000))
    except ValueError:
        before = None
    known = before if isinstance(before, dict) else {}
    differing = [name.replace("_", " ") for name, value in described.items() if known.get(name) != value]
    if differing:
        reason = f"the job in the folder has a different value for {', '.join(differing)}"
        raise UsageError("cannot resume the job", file=folder, reason=reason, remedy="choose another folder")


def _nodes(origins: Sequence[Origin]) -> tuple[NodeWork, ...]:
    """Return what each machine did, sorted by name."""
    kinds = sorted({(one.node, one.cpu, one.instruction_set, one.engine) for one in origins})
    groups = {kind: [o for o in origins if (o.node, o.cpu, o.instruction_set, o.engine) == kind] for kind in kinds}
    return tuple(
        NodeWork(
            node=kind[0],
            cpu=kind[1],
            instruction_set=kind[2],
            engine=kind[3],
            workers=len({origin.worker for origin in group}),
            images=sum(origin.images for origin in group),
        )
        for kind, group in groups.items()
    )
