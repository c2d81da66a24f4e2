"""`vit-edge export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument, make_table, megabytes, progress_bar
from vit_edge.errors import require


@command("export")
@file_argument("source")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("model.onnx"),
    show_default=True,
    help="Model file to write.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def export(source: Path, out: Path, force: bool) -> Result:
    """Export the checkpoint SOURCE to one ONNX file that needs nothing beside it.

    The file takes uint8 RGB pixels of any batch size and holds its preprocessing, labels and golden vectors. It appears
    under its name only after ONNX Runtime and OpenVINO gave PyTorch's answers at batches 1, 2, 3, 7 and 16.

    \b
    Example:
      vit-edge export run/best.safetensors -o model.onnx
    """
    for module in ("torch", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export,onnxruntime", what="export")
    from vit_edge.export import export_onnx

    with progress_bar() as progress:
        result = export_onnx(source, out=out, force=force, progress=progress)
    columns = ("engine", "batch", "max difference", "SQNR dB", "same answer")
    rows = [
        (p.engine, p.batch_size, f"{p.max_difference:.1e}", f"{p.sqnr_db:.0f}", f"{p.top1_equal} of {p.batch_size}")
        for p in result.parity
    ]
    shown = [
        make_table("Against PyTorch, float32, on golden inputs", columns, rows),
        f"model: {result.model} ({megabytes(result.size_bytes)}, sha256 {result.sha256})",
    ]
    return Result(data=asdict(result), shown=shown)
