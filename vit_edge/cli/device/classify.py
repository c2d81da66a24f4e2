"""`vit-edge classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vit_edge.cli.device.remote import classified, on_devices
from vit_edge.cli.image_files import combined, image_files
from vit_edge.cli.options import DECODING, ENGINE, load_options, option_group
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.cli.ray_options import RayJob, job_result, one_model_file, ray_job, ray_options, trust
from vit_edge.cli.third_party_options import read_third_party_options, third_party_options
from vit_edge.errors import ImageRejected, printable


@command("classify")
@file_argument("model")
@file_argument("images", many=True)
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Labels for each image.")
@option_group(
    "Engine and device",
    ENGINE,
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, tensorrt, gpu, npu, ..."),
    threads_option(),
    click.option(
        "--float-precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Precision of the float part  [default: float32 on a CPU].",
    ),
    click.option("--batch-size", type=click.IntRange(1, 1024), help="Fix the batch size in the engine."),
    click.option(
        "--allow-fallback", is_flag=True, help="Fall back to the CPU, with a warning, if the device is unavailable."
    ),
)
@option_group(
    "Checks and decoding",
    click.option(
        "--verify",
        type=click.Choice(["full", "hash", "none"]),
        default="full",
        show_default=True,
        help="full: seal, operators and golden vectors; hash: no golden vectors; none: no seal either.",
    ),
    *DECODING,
)
@third_party_options
@on_devices(uploads=("model", "images", "labels", "preprocessing"), shown=classified)
@load_options
@ray_options()
def classify(
    model: Path, images: tuple[Path, ...], top: int, max_image_megapixels: float | None, **values: Any
) -> Result:
    """Classify IMAGES (files, folders or shards) with MODEL, an .onnx file or OpenVINO's .xml with its .bin.

    Unreadable images are listed and skipped; the exit code is then 3.

    \b
    Examples:
      vit-edge classify model.int8.onnx photo.jpg folder/
      vit-edge classify third_party.onnx photo.jpg --labels names.txt \\
        --preprocessing preprocessing.json
      vit-edge classify model.int8.onnx photo.jpg --on ssh://pi@raspberrypi
      vit-edge classify model.int8.onnx 'shards/*.tar' --ray local --out labels/
    """
    from vit_edge.image import Limits
    from vit_edge.runtime.classifier import as_classifier
    from vit_edge.runtime.loading import load

    if max_image_megapixels is not None:
        values["limits"] = Limits.of_megapixels(max_image_megapixels)
    values |= read_third_party_options(values)
    job = ray_job(values, verb="classify", unused=("top",))
    if job is not None:
        return _on_ray(job, model, images, values)
    rows, classified_images, rejected = [], [], []
    with (
        progress_bar(f"loading {printable(model)}") as progress,
        as_classifier(load(model, **values), printable(model)) as classifier,
    ):
        described = classifier.describe()
        paths = image_files(images)
        for position, path in enumerate(paths):
            progress("classifying", position, len(paths))
            try:
                prediction = classifier(path, top=top)
            except ImageRejected as error:
                rejected.append(error)
                continue
            classified_images.append({"file": printable(path), **prediction.to_dict()})
            rows.append((printable(path), prediction.text, f"{prediction.timings.total_ms:.1f}"))
    failed = [{"file": error.file, "reason": error.reason} for error in rejected]
    data = {"model": described, "images": classified_images, "rejected": failed}
    shown = [_headline(described, len(rows)), make_table("", ("image", "labels", "ms"), rows)] if rows else []
    return Result(data=data, shown=shown, error=combined(rejected, len(paths)))


def _on_ray(job: RayJob, model: Path, images: tuple[Path, ...], options: dict[str, Any]) -> Result:
    from vit_edge.runtime.batch.inputs import find_inputs
    from vit_edge.runtime.batch.shard_work import ClassifyTask

    task = ClassifyTask(model=one_model_file(model, options, encoder=False).data, options={**options, **trust()})
    return job_result(job.run(task, find_inputs(images)), verbed="Classified")


def _headline(described: dict[str, Any], num_images: int) -> str:
    images = "1 image" if num_images == 1 else f"{num_images} images"
    threads = "1 thread" if described["threads"] == 1 else f"{described['threads']} threads"
    where = f"{described['engine']} {described['engine_version']} on {described['device']}, {threads}"
    return f"Classified {images} with {described['name']} in {where}." + (
        f" Warning: {described['fallback']}." if described["fallback"] else ""
    )
