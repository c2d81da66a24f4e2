"""`vit-edge seal`."""

from __future__ import annotations

from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument


@command("seal")
@file_argument("file")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write  [default: FILE itself].")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def seal(file: Path, out: Path | None, force: bool) -> Result:
    """Seal FILE again after a deliberate edit.

    A seal shows that the bytes are unchanged since sealing. It does not show who sealed them or that predictions are
    right: the golden vectors in the file still have to agree.

    \b
    Example:
      vit-edge seal model.onnx
    """
    from vit_edge.files import may_write, write_atomic
    from vit_edge.model_file.artifact import reseal

    target = may_write(out or file, force=force or out is None)
    data = reseal(file)
    write_atomic(target, data.data)
    return Result(
        data={"model": str(target), "sha256": data.sha256}, shown=[f"Sealed {target} (SHA-256 {data.sha256})."]
    )
