"""Images in shards, tar or Parquet files with many images each: in a folder, or by a pattern such as `shards/*.tar`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_edge.data.folders import images_below, is_passed_over, rejected, walk
from vit_edge.data.parquet_shards import MOST_IMAGES, read_parquet
from vit_edge.data.tar_shards import LabelledPath, read_tar
from vit_edge.errors import printable

__all__ = ["draw_images", "find_images", "find_shards", "images_named", "is_shard", "read_shards", "shards_by_split"]

_READERS = {".tar": read_tar, ".parquet": read_parquet}


def find_images(source: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return every image below a folder, sorted, or in shards, in their order; raises DataRejected if there is none."""
    shards = find_shards(source)
    return tuple(path for path, _ in read_shards(shards)) if shards else images_below(source)


def images_named(path: Path) -> tuple[Path, ...]:
    """Return the images that a path names: those of a folder, a shard or a pattern of shards, else the path itself."""
    if path.is_dir() or (path.is_file() and is_shard(path)) or (glob.has_magic(os.fspath(path)) and not path.exists()):
        return find_images(path)
    return (path,)


def draw_images(paths: Sequence[Path], count: int | None, *, seed: int = 0) -> tuple[Path, ...]:
    """Return `count` of the images in their order, the same ones for the same seed; all if `count` is None."""
    if count is None or count >= len(paths):
        return tuple(paths)
    chosen = np.random.default_rng(seed).choice(len(paths), size=count, replace=False)
    return tuple(paths[position] for position in sorted(chosen))


def is_shard(path: Path) -> bool:
    """Return whether this is an archive of images by its name."""
    return path.suffix.lower() in _READERS and not is_passed_over(path.name)


def find_shards(source: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the shards that `source` names, sorted: a file, a pattern, or those in a folder; none if there are none.

    Hugging Face keeps the Parquet files of a data set in its folder `data`. Raises DataRejected if a folder has both
    shards and images, or if a pattern matches nothing.
    """
    path = Path(source)
    if path.is_file() and is_shard(path):
        return (path,)
    if path.is_dir():
        return _in_folder(path)
    if not path.exists() and glob.has_magic(os.fspath(source)):
        names = glob.glob(os.fspath(source), recursive=True)  # noqa: PTH207 - the pattern may be absolute
        found = [Path(name) for name in names]
        shards = sorted((name for name in found if name.is_file() and is_shard(name)), key=os.fsencode)
        if not shards:
            reason = f"the pattern matches {len(found)} files, none of them .tar or .parquet"
            raise rejected(path, reason, "give a pattern of shards in quotes, such as 'shards/*.tar', or a folder")
        return tuple(shards)
    return ()


def shards_by_split(shards: Sequence[Path], splits: Mapping[str, str]) -> dict[str, tuple[Path, ...]]:
    """Return the shards of each split by their names, as `train-00000-of-00004.parquet`; nothing if one has none.

    `splits` maps the words that may begin a name to the split.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for shard in shards:
        word = re.split(r"[^a-z]", shard.name.lower(), maxsplit=1)[0]
        if word not in splits:
            return {}
        found[splits[word]] = (*found.get(splits[word], ()), shard)
    return found


def read_shards(shards: Sequence[Path]) -> list[LabelledPath]:
    """Return every image of the shards, in their order, with its label or None; raises DataRejected."""
    found: list[LabelledPath] = []
    for shard in shards:
        found += _READERS[shard.suffix.lower()](shard)
        if len(found) > MOST_IMAGES:
            raise rejected(shard, f"the shards hold more than {MOST_IMAGES:,} images", "give fewer shards")
    if not found:
        raise rejected(shards[0], "the shards hold no image that can be read", "name the images as in key.jpg")
    return found


def _in_folder(folder: Path) -> tuple[Path, ...]:
    for place in (folder, folder / "data"):
        try:
            names = sorted(os.listdir(place), key=os.fsencode) if place.is_dir() else []
        except OSError:
            return ()
        shards = tuple(place / name for name in names if is_shard(place / name) and (place / name).is_file())
        if shards and walk(folder).paths:
            reason = f"the folder holds shards, such as {printable(shards[0].name)}, and images"
            raise rejected(folder, reason, "give a folder with one of the two, or a pattern such as 'folder/*.tar'")
        if shards:
            return shards
    return ()
