"""`vit-edge embed`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vit_edge.cli.image_files import combined, image_files
from vit_edge.cli.options import DECODING, ENGINE, load_options, option_group
from vit_edge.cli.output import Result, command, file_argument, progress_bar, threads_option
from vit_edge.cli.ray_options import RayJob, job_result, one_model_file, ray_job, ray_options, trust
from vit_edge.errors import ImageRejected, printable

if TYPE_CHECKING:
    from vit_edge.progress import Progress
    from vit_edge.runtime.encoder import Encoder
    from vit_edge.runtime.loaded_model import Prepared
    from vit_edge.runtime.vectors_file import VectorsFile

_PATH = click.Path(path_type=Path)
_AT_ONCE = 16


@command("embed")
@file_argument("images", many=True)
@click.option("--model", type=_PATH, required=True, help="Encoder: a file of `vit-edge export --outputs embedding`.")
@click.option(
    "-o",
    "--out",
    type=_PATH,
    default=Path("vectors.npy"),
    show_default=True,
    help="File to write: .npy, with the image paths in a .txt file of the same name; or .parquet; with --ray a folder.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@option_group(
    "Engine and decoding",
    ENGINE,
    threads_option(),
    *DECODING,
)
@load_options
@ray_options(with_out=False)
def embed(
    images: tuple[Path, ...], model: Path, out: Path, force: bool, max_image_megapixels: float | None, **values: Any
) -> Result:
    """Compute the vector of each of IMAGES (files, folders or shards) with an encoder, and write them to one file.

    The memory does not grow with the number of images. Unreadable images are listed and skipped; the exit code is then
    3, and the file holds all others.

    \b
    Examples:
      vit-edge embed photos/ --model encoder.int8.onnx --out vectors.npy
      vit-edge embed photos/ --model encoder.int8.onnx --out vectors.parquet
      vit-edge embed 'shards/*.tar' --model encoder.int8.onnx --ray local \\
        --out vectors/
    """
    from vit_edge.image import Limits
    from vit_edge.runtime.loading import load_encoder
    from vit_edge.runtime.vectors_file import open_vectors

    if max_image_megapixels is not None:
        values["limits"] = Limits.of_megapixels(max_image_megapixels)
    values["out"] = out
    job = ray_job(values, verb="embed", unused=("force",))
    if job is not None:
        return _on_ray(job, model, images, values)
    with progress_bar(f"loading {printable(model)}") as progress:
        paths = image_files(images)
        with (
            load_encoder(model, **values) as encoder,
            open_vectors(out, width=encoder.width, force=force, made_from=model) as vectors,
        ):
            rejected = _embed_all(encoder, paths, vectors, progress)
            described = encoder.describe()
            count, width = vectors.finish(), encoder.width
    failed = [{"file": error.file, "reason": error.reason} for error in rejected]
    files = [printable(path) for path in vectors.files]
    data = {"model": described, "images": count, "width": width, "files": files, "rejected": failed}
    shown = [f"{count} vectors of {width} values, {described['engine']}: wrote {' and '.join(files)}"]
    return Result(data=data, shown=shown, error=combined(rejected, len(paths)))


def _on_ray(job: RayJob, model: Path, images: tuple[Path, ...], options: dict[str, Any]) -> Result:
    from vit_edge.runtime.batch.inputs import find_inputs
    from vit_edge.runtime.batch.shard_work import EmbedTask

    task = EmbedTask(model=one_model_file(model, options, encoder=True).data, options={**options, **trust()})
    return job_result(job.run(task, find_inputs(images)), verbed="Embedded")


def _embed_all(
    encoder: Encoder, paths: Sequence[Path], vectors: VectorsFile, progress: Progress
) -> list[ImageRejected]:
    """Add the vector of every image that can be read, 16 at a time; return the errors of the others."""
    import numpy as np

    rejected: list[ImageRejected] = []
    for part in _parts(encoder, paths, rejected, progress):
        vectors.add([printable(path) for path, _ in part], encoder.run(np.stack([one.pixels for _, one in part])))
    return rejected


def _parts(
    encoder: Encoder, paths: Sequence[Path], rejected: list[ImageRejected], progress: Progress
) -> Iterator[list[tuple[Path, Prepared]]]:
    part: list[tuple[Path, Prepared]] = []
    for position, path in enumerate(paths):
        progress("embedding", position, len(paths))
        try:
            part.append((path, encoder.prepare(path)))
        except ImageRejected as error:
            rejected.append(error)
        if len(part) == _AT_ONCE:
            yield part
            part = []
    if part:
        yield part
    progress("embedding", len(paths), len(paths))
