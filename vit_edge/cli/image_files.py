"""The images that a command is given, files, folders or shards, and those among them that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vit_edge.errors import ImageRejected

__all__ = ["combined", "image_files"]


def image_files(images: Sequence[Path]) -> list[Path]:
    """Return the files, and in place of folders, shards and patterns of shards the images in them."""
    from vit_edge.data import images_named

    return [image for path in images for image in images_named(path)]


def combined(rejected: list[ImageRejected], num_images: int) -> ImageRejected | None:
    """Return one error for all images that were rejected, None if there are none."""
    if len(rejected) <= 1:
        return rejected[0] if rejected else None
    reasons = "; ".join(f"{error.file}: {error.reason}" for error in rejected)
    what = f"cannot read {len(rejected)} of {num_images} images"
    return ImageRejected(what, reason=reasons, remedy="give images in JPEG, PNG, WEBP, BMP or TIFF")
