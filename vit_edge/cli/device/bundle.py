"""`vit-edge bundle`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from vit_edge.cli.options import load_options
from vit_edge.cli.output import Result, command, file_argument, make_table, megabytes, progress_bar
from vit_edge.errors import printable


@command("bundle")
@file_argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Application to write  [default: MODEL with .pyz].")
@click.option("--force", is_flag=True, help="Replace the application if it exists.")
@load_options
def bundle(model: Path, out: Path | None, force: bool) -> Result:
    """Pack MODEL and the runtime into one file that any Python with an engine can run.

    The device needs Python 3.10, numpy, Pillow and onnxruntime or openvino, but not vit-edge.

    \b
    Example:
      vit-edge bundle model.int8.onnx -o app.pyz
      python app.pyz image.jpg
    """
    from vit_edge.runtime.bundle.builder import bundle as make

    with progress_bar(f"checking {printable(model)}"):
        made = make(model, out=out, force=force)
    path = printable(made.path)
    rows = [
        ("application", path),
        ("size", megabytes(made.size_bytes)),
        ("checked in", ", ".join(made.checked_in) or "no engine: none that the file was validated in is installed"),
        ("protobuf inside", made.protobuf or "none: install protobuf on the device"),
        ("run it with", f"python {path} IMAGE..."),
    ]
    return Result(
        data={**asdict(made), "path": path},
        shown=[f"Wrote {path}; run it with: python {path} IMAGE...", make_table("", ("application", path), rows[1:-1])],
    )
