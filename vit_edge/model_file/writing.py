"""Write a model file, and the second file that a large one needs."""

from __future__ import annotations

from pathlib import Path

from vit_edge.files import remove_set_aside, write_together
from vit_edge.model_file.artifact import ModelFile

__all__ = ["write_model"]


def write_model(path: Path, model: ModelFile) -> None:
    """Write a model file and, of a network over 2 GiB, first the file of weights that the manifest names."""
    entry = model.manifest.weights
    others = {path.with_name(entry["file"]): model.weights} if entry and model.weights is not None else {}
    write_together({**others, path: model.data})
    if not others:  # what an older and larger model left there
        older = path.with_name(f"{path.name}.data")
        remove_set_aside(older)
        older.unlink(missing_ok=True)
