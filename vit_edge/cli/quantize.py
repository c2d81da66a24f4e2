"""`vit-edge quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument, megabytes, progress_bar
from vit_edge.cli.verify import figures_data, figures_table
from vit_edge.errors import require


@command("quantize")
@file_argument("model")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of pictures like those in use; labels are not needed.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled pictures to judge the result by; none of them may calibrate.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("model.int8.onnx"),
    show_default=True,
    help="Model file to write.",
)
@click.option(
    "--target",
    type=click.Choice(["portable", "x86-vnni"]),
    default="portable",
    show_default=True,
    help="portable: 7-bit weights, the same answers on every CPU. x86-vnni: 8-bit weights, for CPUs with VNNI only.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def quantize(model: Path, calibration: Path, data: Path | None, out: Path, target: str, force: bool) -> Result:
    """Quantize the float32 file MODEL to INT8, with ranges from calibration pictures.

    Integers enter at the inputs of matrix products with constant weights, where nearly all the arithmetic is; the rest
    stays float. With --data the figures on those pictures are shown and kept in the file; `vit-edge verify` gives
    the verdict.

    \b
    Example:
      vit-edge quantize model.onnx --calibration pictures/train --data pictures/test
    """
    for module in ("onnx", "onnxruntime", "scipy"):
        require(module, extra="export,onnxruntime", what="quantize")
    from vit_edge.export import quantize as run

    with progress_bar() as progress:
        result = run(
            model,
            calibration=calibration,
            out=out,
            data=data,
            target="x86-vnni" if target == "x86-vnni" else "portable",
            force=force,
            progress=progress,
        )
    fields = {
        "model": str(result.model),
        "sha256": result.sha256,
        "size_bytes": result.size_bytes,
        "size_ratio": result.size_ratio,
        "target": target,
        "num_calibration_images": result.num_calibration_images,
        "num_products": result.num_products,
        "evaluation": figures_data(result.verification) if result.verification else None,
    }
    size = f"{megabytes(result.size_bytes)}, {result.size_ratio:.2f} of the float file"
    shown = [
        f"{result.num_products} matrix products take integers, ranges from {result.num_calibration_images} pictures",
        *([figures_table(result.verification)] if result.verification else []),
        f"model: {result.model} ({size}, sha256 {result.sha256})",
    ]
    return Result(data=fields, shown=shown)
