"""The options for many images on a Ray cluster, and what commands share that have them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vit_edge.cli.options import option_group
from vit_edge.cli.output import Result, make_table, progress_bar
from vit_edge.cli.progress_display import show_detail
from vit_edge.errors import UsageError, printable
from vit_edge.progress import Progress, duration

if TYPE_CHECKING:
    from vit_edge.model_file.artifact import ModelFile
    from vit_edge.runtime.batch.inputs import JobInput
    from vit_edge.runtime.batch.job_folder import JobResult
    from vit_edge.runtime.batch.shard_work import Task

__all__ = ["RayJob", "job_result", "one_model_file", "ray_job", "ray_options", "trust", "with_rate"]

_NAMES = ("ray", "out", "resume", "shard_size")
_OPTIONS = (
    click.option("--ray", metavar="local|ADDRESS", help="Run on a Ray cluster; needs --out."),
    click.option("--resume", is_flag=True, help="Keep the shards that an earlier run of the same job finished."),
    click.option("--shard-size", type=click.IntRange(1), default=1000, show_default=True, help="Images in each shard."),
)
_OUT = click.option("--out", type=click.Path(path_type=Path), help="Folder for the Parquet shards of the results.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayJob:
    """Where a command runs, and where its shards go."""

    address: str
    out: Path
    resume: bool
    shard_size: int

    def run(self, task: Task, inputs: Sequence[JobInput]) -> JobResult:
        """Run a task on the cluster, and show images/s and the time left."""
        from vit_edge.runtime.batch.ray_job import run_on_ray

        with progress_bar("starting the job on Ray") as progress:
            return run_on_ray(
                task,
                inputs,
                out=self.out,
                address=self.address,
                resume=self.resume,
                shard_size=self.shard_size,
                progress=with_rate(progress),
            )


def ray_options(*, with_out: bool = True) -> Callable[[Any], Any]:
    """Return a decorator that adds the options; without `with_out` the command has its own `--out`."""
    first, *others = _OPTIONS
    return option_group("Many images with Ray", first, *([_OUT] if with_out else []), *others)


def ray_job(values: dict[str, Any], *, verb: str, unused: Sequence[str] = ()) -> RayJob | None:
    """Take the options out of `values`, and return the job, None without --ray; raises UsageError.

    `unused` are parameters that a job has no use for.
    """
    job = {name: values.pop(name) for name in _NAMES}
    context, what = click.get_current_context(), f"cannot {verb}"
    names = (*_NAMES, *unused)
    given = {name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if job["ray"] is None:
        if alone := [f"--{name.replace('_', '-')}" for name in ("resume", "shard_size") if name in given]:
            raise UsageError(what, reason=f"{alone[0]} is for --ray", remedy="add --ray local")
        return None
    if "out" not in given:
        raise UsageError(what, reason="--ray needs a folder for the results", remedy="add --out DIR")
    if clashing := [f"--{name.replace('_', '-')}" for name in unused if name in given]:
        raise UsageError(what, reason=f"{clashing[0]} has no use with --ray", remedy=f"leave {clashing[0]} out")
    return RayJob(address=job["ray"], out=job["out"], resume=job["resume"], shard_size=job["shard_size"])


def one_model_file(model: Path, options: Mapping[str, Any], *, encoder: bool) -> ModelFile:
    """Return the model file that the actors get; raises ModelRejected if it is in two files, or of the other kind."""
    from vit_edge.errors import ModelRejected
    from vit_edge.model_file.artifact import ModelFile
    from vit_edge.runtime.loading import open_any

    known = {name: options[name] for name in ("preprocessing", "labels", "verify") if name in options}
    opened = open_any(model, **known)
    if not isinstance(opened, ModelFile) or opened.weights is not None:
        reason, remedy = "the model is in two files; actors get one", "give an .onnx file below 2 GiB"
    elif opened.manifest.is_encoder is not encoder:
        reason = f"the file is {'an encoder' if opened.manifest.is_encoder else 'a classifier'}"
        remedy = "use `vit-edge classify` for classifiers and `vit-edge embed` for encoders"
    else:
        return opened
    raise ModelRejected("cannot start the job", file=model, reason=reason, remedy=remedy)


def trust() -> dict[str, Any]:
    """Return the options of `load` that --sandbox and --allow-op gave."""
    from vit_edge.runtime.checks.load_policy import current_policy

    policy = current_policy()
    return {"sandbox": policy.sandbox, "allow_ops": policy.allow_ops or None}


def job_result(done: JobResult, *, verbed: str) -> Result:
    """Return the summary of a job for people and as JSON."""
    nodes = [(one.node, one.instruction_set, one.engine, one.workers, f"{one.images:,}") for one in done.nodes]
    path = printable(done.out)
    kept = f", {done.kept_shards} of them kept" if done.kept_shards else ""
    done_images = f"{verbed} {done.images:,} images into {done.shards} shards{kept} in {path}"
    rate = f"{duration(done.seconds)}, {done.images_per_s:.1f} images/s"
    table = make_table("", ("node", "instruction set", "engine", "workers", "images"), nodes)
    shown = [f"{done_images}: {done.errors:,} errors, {rate}.", table]
    return Result(data={**asdict(done), "out": path}, shown=shown)


def with_rate(progress: Progress) -> Progress:
    """Return a Progress that shows images/s and the time left as well."""
    started = time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal started
        progress(stage, done, total)
        if not done:
            started = time.monotonic()
        elif done < total:
            rate = done / max(time.monotonic() - started, 1e-9)
            left = duration((total - done) / rate)
            show_detail(f"{done:,} of {total:,}, {rate:.1f} images/s, about {left} left")

    return show
