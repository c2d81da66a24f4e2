"""Where a finished model goes: one ONNX file, OpenVINO's two, or a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vit_edge.artifact import ModelFile
from vit_edge.errors import UsageError
from vit_edge.export.options import ExportOptions
from vit_edge.files import may_write, write_atomic

__all__ = ["may_write_format", "write_files", "write_folder", "write_model"]


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
        is_ours = not any(target.iterdir()) or (target / "onnx" / "model.onnx").is_file()
        if not force or not is_ours:
            remedy = "choose another name, or add --force to replace a folder that holds onnx/model.onnx"
            raise UsageError("will not overwrite", file=target, reason="the folder exists", remedy=remedy)
        return target
    if options.format == "onnx":  # a network over 2 GiB needs a second file
        may_write(target.with_name(f"{target.name}.data"), force=force, made_from=made_from)
    return may_write(target, force=force, made_from=made_from)


def write_model(path: Path, model: ModelFile) -> None:
    """Write a model file and, of a network over 2 GiB, first the weights beside it under the name that it knows."""
    entry = model.manifest.weights
    beside = {path.with_name(entry["file"]): model.weights} if entry and model.weights is not None else {}
    write_files({**beside, path: model.data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write each file atomically, in order: the last one is what makes the others count."""
    for path, data in files.items():
        write_atomic(path, data)


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files so that nothing appears under its name before it is whole; an older one is replaced."""
    parent = target.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".vit-edge.tmp.", dir=parent) as name:
        new, old = Path(name) / "new", Path(name) / "old"
        for path, data in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(new / path, data)
        if target.exists():
            shutil.move(target, old)
        new.replace(target)
