"""`vit-edge classify`."""

from __future__ import annotations

from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument, make_table, progress_bar, threads_option
from vit_edge.errors import ImageRejected, printable


@command("classify")
@file_argument("model")
@file_argument("images", many=True)
@click.option("--engine", default="auto", show_default=True, help="auto, onnxruntime or openvino.")
@click.option("--device", default="cpu", show_default=True, help="Where to run.")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Answers for each picture.")
@threads_option()
def classify(model: Path, images: tuple[Path, ...], engine: str, device: str, top: int, threads: int | None) -> Result:
    """Name what IMAGES show, from the file MODEL alone.

    Pictures that cannot be used are named, the others answered; the exit code is then 3.

    \b
    Example:
      vit-edge classify model.int8.onnx photo.jpg other.png
    """
    from vit_edge.runtime.engine import refuse_null
    from vit_edge.runtime.loading import load

    refuse_null(engine)
    rows, answered, rejected = [], [], []
    with load(model, engine=engine, device=device, threads=threads) as classifier, progress_bar() as progress:  # type: ignore[arg-type]
        for position, path in enumerate(images):
            progress("classifying", position, len(images))
            try:
                prediction = classifier(path, top=top)
            except ImageRejected as error:
                rejected.append(error)
                continue
            answered.append({"file": printable(path), "label": prediction.label, **prediction.to_dict()})
            answers = "  ".join(f"{answer.label} {answer.probability:.1%}" for answer in prediction.answers)
            rows.append((printable(path), answers, f"{prediction.timings.total_ms:.1f}"))
        described = classifier.describe()
    failed = [{"file": error.file, "reason": error.reason} for error in rejected]
    data = {"model": described, "images": answered, "rejected": failed}
    shown = [make_table("", ("picture", "answers", "ms"), rows)] if rows else []
    return Result(data=data, shown=shown, error=_combined(rejected, len(images)))


def _combined(rejected: list[ImageRejected], num_images: int) -> ImageRejected | None:
    if len(rejected) <= 1:
        return rejected[0] if rejected else None
    reasons = "; ".join(f"{error.file}: {error.reason}" for error in rejected)
    what = f"cannot use {len(rejected)} of {num_images} pictures"
    return ImageRejected(what, reason=reasons, remedy="give pictures in JPEG, PNG, WEBP, BMP or TIFF")
