"""`vit-edge classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vit_edge.cli.device.remote import classified, on_devices
from vit_edge.cli.options import load_options
from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.cli.third_party_options import read_told, third_party_options
from vit_edge.errors import ImageRejected, printable


@command("classify")
@file_argument("model")
@file_argument("images", many=True)
@click.option("--engine", default="auto", show_default=True, help="auto, onnxruntime or openvino.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, tensorrt, gpu, npu ... as the engine has.")
@click.option(
    "--float-precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the float part  [default: float32 on a CPU].",
)
@click.option("--allow-fallback", is_flag=True, help="Run on the CPU what the device is not there for, and say so.")
@click.option("--batch-size", type=click.IntRange(1, 1024), help="Give the engine a static shape.")
@click.option("--decode", type=click.Choice(["full", "fast"]), default="full", show_default=True,
              help="fast: large JPEGs at the smallest scale above the network's input.")  # fmt: skip
@click.option("--verify", type=click.Choice(["full", "hash", "none"]), default="full", show_default=True,
              help="Seal, operators and golden vectors; without golden vectors; without the seal.")  # fmt: skip
@third_party_options
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Answers for each image.")
@threads_option()
@on_devices(uploads=("model", "images", "labels", "preprocessing"), shown=classified)
@load_options
def classify(model: Path, images: tuple[Path, ...], top: int, **values: Any) -> Result:
    """Name what IMAGES show, from the file MODEL alone: an `.onnx`, or OpenVINO's `.xml` beside its `.bin`.

    Images that cannot be used are named, the others answered; the exit code is then 3.

    \b
    Examples:
      vit-edge classify model.int8.onnx photo.jpg other.png
      vit-edge classify theirs.onnx photo.jpg --labels names.txt --preprocessing preprocessing.json
      vit-edge classify model.int8.onnx photo.jpg --on ssh://pi@raspberrypi
    """
    from vit_edge.runtime.engines.protocol import refuse_null
    from vit_edge.runtime.loading import load

    refuse_null(values["engine"])
    values |= read_told(values)
    rows, answered, rejected = [], [], []
    with load(model, **values) as classifier, progress_bar() as progress:
        described = classifier.describe()
        for position, path in enumerate(images):
            progress("classifying", position, len(images))
            try:
                prediction = classifier(path, top=top)
            except ImageRejected as error:
                rejected.append(error)
                continue
            answered.append({"file": printable(path), **prediction.to_dict()})
            answers = "  ".join(f"{answer.label} {answer.probability:.1%}" for answer in prediction.answers)
            rows.append((printable(path), answers, f"{prediction.timings.total_ms:.1f}"))
    failed = [{"file": error.file, "reason": error.reason} for error in rejected]
    data = {"model": described, "images": answered, "rejected": failed}
    where = f"{described['device']}, {described['threads']} threads"
    ran = f"{described['engine']} {described['engine_version']} on {where}"
    fallback = [f"warning: {described['fallback']}"] if described["fallback"] else []
    shown = [make_table("", ("image", "answers", "ms"), rows), ran, *fallback] if rows else fallback
    return Result(data=data, shown=shown, error=_combined(rejected, len(images)))


def _combined(rejected: list[ImageRejected], num_images: int) -> ImageRejected | None:
    if len(rejected) <= 1:
        return rejected[0] if rejected else None
    reasons = "; ".join(f"{error.file}: {error.reason}" for error in rejected)
    what = f"cannot use {len(rejected)} of {num_images} images"
    return ImageRejected(what, reason=reasons, remedy="give images in JPEG, PNG, WEBP, BMP or TIFF")
