"""Where a finished model goes: one ONNX file, OpenVINO's two, or a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from vit_edge.errors import UsageError, printable
from vit_edge.export.tracing.options import ExportOptions
from vit_edge.files import may_write, temporary_folder, write_atomic

__all__ = ["may_write_format", "write_folder"]

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
        held = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        others = sorted(held - _FOLDER_FILES)
        if others or not force:
            reason = f"the folder exists{f', with {printable(others[0])} in it' if others else ''}"
            remedy = "choose another name" + ("" if others else ", or add --force")
            raise UsageError("will not overwrite", file=target, reason=reason, remedy=remedy)
        return target
    if options.format == "onnx":  # a network over 2 GiB needs a second file
        may_write(target.with_name(f"{target.name}.data"), force=force, made_from=made_from)
    return may_write(target, force=force, made_from=made_from)


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files so that nothing appears under its name before it is whole; an older one is replaced.

    Two renames replace a folder: a process that is killed between them leaves the older one, `.vit-edge.previous.NAME`.
    """
    old = target.absolute().with_name(f".vit-edge.previous.{target.name}")
    with temporary_folder(next_to=target) as name:
        new = Path(name) / "new"
        for path, data in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(new / path, data)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.replace(old)
        try:
            new.replace(target)
        except BaseException:
            if old.exists():
                old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
