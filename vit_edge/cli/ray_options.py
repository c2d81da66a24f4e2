"""The options of `vit-edge classify` for many images on a Ray cluster, and what runs with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vit_edge.cli.options import option_group
from vit_edge.cli.output import Result, make_table, progress_bar
from vit_edge.errors import UsageError, printable

__all__ = ["classify_many", "ray_options"]

ray_options: Callable[[Any], Any] = option_group(
    "Many images with Ray",
    click.option("--ray", metavar="local|ADDRESS", help="Classify on a Ray cluster; needs --out."),
    click.option("--out", type=click.Path(path_type=Path), help="Folder for the Parquet shards of the results."),
    click.option("--resume", is_flag=True, help="Keep the shards that an earlier run of the same job finished."),
    click.option("--shard-size", type=click.IntRange(1), default=1000, show_default=True, help="Images in each shard."),
)


def classify_many(model: Path, images: tuple[Path, ...], job: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """Run a job on the cluster that `job` names, and return its summary."""
    from vit_edge.runtime.batch.ray_job import classify_on_ray
    from vit_edge.runtime.checks.load_policy import current_policy

    policy = current_policy()
    trust = {"sandbox": policy.sandbox, "allow_ops": policy.allow_ops or None}
    if job["out"] is None:
        raise UsageError("cannot classify", reason="--ray needs a folder for the results", remedy="add --out DIR")
    with progress_bar(f"starting {printable(model)} on Ray") as progress:
        done = classify_on_ray(
            model,
            images,
            out=job["out"],
            address=job["ray"],
            resume=job["resume"],
            shard_size=job["shard_size"],
            options={**options, **trust},
            progress=progress,
        )
    workers = ", ".join(f"{count} with {name}" for name, count in done.workers.items()) or "none: nothing was left"
    rows = [
        ("shards", f"{done.shards}, {done.kept_shards} of them from an earlier run"),
        ("images that cannot be read", f"{done.errors:,}"),
        ("workers by instruction set", workers),
        ("time", f"{done.seconds:.1f} s, {done.images_per_s:.1f} images/s"),
    ]
    path = printable(done.out)
    shown = [f"Classified {done.images:,} images into {path}.", make_table("", ("", ""), rows)]
    return Result(data={**asdict(done), "out": path}, shown=shown)
