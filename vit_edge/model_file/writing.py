"""Write a model file of either format, and the second file that it needs: the one that names the other is the last."""

from __future__ import annotations

from pathlib import Path

from vit_edge.model_file.artifact import ModelFile
from vit_edge.model_file.paired_files import remove_set_aside, write_together

__all__ = ["write_ir", "write_model"]


def write_ir(path: Path, xml: bytes, weights: bytes) -> None:
    """Write OpenVINO's IR: the `.bin`, then the `.xml` whose seal covers both."""
    write_together({path.with_suffix(".bin"): weights, path: xml})


def write_model(path: Path, model: ModelFile) -> None:
    """Write a model file and, of a network over 2 GiB, first the file of weights that the manifest names."""
    entry = model.manifest.weights
    others = {path.with_name(entry["file"]): model.weights} if entry and model.weights is not None else {}
    write_together({**others, path: model.data})
    if not others:  # what an older and larger model left there
        older = path.with_name(f"{path.name}.data")
        remove_set_aside(older)
        older.unlink(missing_ok=True)
