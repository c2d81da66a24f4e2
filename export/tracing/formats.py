"""Where a finished model goes: one ONNX file, OpenVINO's two, or a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

from vit_edge.errors import UsageError
from vit_edge.export.tracing.options import ExportOptions
from vit_edge.files import may_write, may_write_folder

__all__ = ["may_write_format"]

# All that a Hugging Face folder of ours holds: only a folder of these files is ever replaced.
_FOLDER_FILES = {"config.json", "preprocessor_config.json", "onnx/model.onnx", "onnx/model.onnx.data"}


def may_write_format(
    out: str | os.PathLike[str], options: ExportOptions, *, force: bool, made_from: str | os.PathLike[str] | None = None
) -> Path:
    """Return `out` if this format may be written there; raises UsageError early, before any work is done."""
    target = Path(out)
    if options.format == "openvino":
        if target.suffix != ".xml":
            remedy = f"name it {target.with_suffix('.xml').name}"
            raise UsageError("cannot write", file=target, reason="OpenVINO's IR ends in .xml", remedy=remedy)
        may_write(target.with_suffix(".bin"), force=force, made_from=made_from)
    if options.format == "huggingface" and target.is_dir():
        return may_write_folder(target, holding=_FOLDER_FILES, force=force)
    if options.format == "onnx":  # a network over 2 GiB needs a second file
        may_write(target.with_name(f"{target.name}.data"), force=force, made_from=made_from)
    return may_write(target, force=force, made_from=made_from)
