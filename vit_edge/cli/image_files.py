"""The images that a command is given, files or folders, and those among them that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vit_edge.errors import DataRejected, ImageRejected

__all__ = ["combined", "image_files"]


def image_files(images: Sequence[Path], *, verb: str) -> list[Path]:
    """Return the files, and in place of each folder the images below it; raises DataRejected for an empty folder."""
    from vit_edge.data import find_images

    found: list[Path] = []
    for path in images:
        inside = find_images(path) if path.is_dir() else (path,)
        if not inside:
            raise DataRejected(f"cannot {verb}", file=path, reason="the folder holds no image", remedy="name images")
        found += inside
    return found


def combined(rejected: list[ImageRejected], num_images: int) -> ImageRejected | None:
    """Return one error for all images that were rejected, None if there are none."""
    if len(rejected) <= 1:
        return rejected[0] if rejected else None
    reasons = "; ".join(f"{error.file}: {error.reason}" for error in rejected)
    what = f"cannot read {len(rejected)} of {num_images} images"
    return ImageRejected(what, reason=reasons, remedy="give images in JPEG, PNG, WEBP, BMP or TIFF")
