"""The images below a folder, by one walk for every command, and what that walk passed over."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vit_edge.errors import DataRejected, printable

__all__ = [
    "SUFFIXES",
    "Found",
    "existing_folder",
    "images_below",
    "is_passed_over",
    "rejected",
    "report",
    "subfolders",
    "walk",
]

# What the decoders of vit_edge.image read; JPEG has several.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Images that no decoder here reads: counted, because they explain a class that is smaller than its folder.
OTHER_SUFFIXES = (
    ".gif", ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".apng", ".dib", ".ico",
    ".svg", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".psd", ".eps", ".exr", ".hdr", ".dng", ".raw", ".cr2",
    ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
)  # fmt: skip
# Folders that file managers, network drives and archives add.
_SYSTEM = ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
_MOST = 1_000_000
_NUM_NAMED = 5
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Found:
    """What a walk found: images that can be read, other images by suffix, and what was passed over."""

    paths: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    passed_over: list[Path] = field(default_factory=list)
    num_loops: int = 0


def images_below(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return every image below `folder` by its suffix, sorted; raises DataRejected if there is none.

    Links are followed, except back to a folder that holds them. Hidden and system names are passed over and counted.
    """
    root = existing_folder(folder)
    found = walk(root)
    report(found, root)
    if not found.paths:
        others = f", only {_counts(found.others)}" if found.others else ""
        reason = f"the folder holds no image that can be read ({', '.join(SUFFIXES)}){others}"
        raise rejected(root, reason, "give a folder with images in it, at any depth")
    return tuple(found.paths)


def walk(root: Path) -> Found:
    """Return what is below `root`, sorted by path; raises DataRejected if a folder cannot be read or it is too much."""
    found = Found()
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    num_folders = 0
    while waiting:
        folder, around = waiting.pop()
        num_folders += 1
        identity = _identity(folder)
        if identity in around:  # a link back to a folder around it
            found.num_loops += 1
            continue
        for path, is_folder in _entries(folder):
            if is_passed_over(path.name):
                found.passed_over += [path] if is_folder or _suffix(path) in SUFFIXES + OTHER_SUFFIXES else []
            elif is_folder:
                waiting.append((path, around | {identity}))
            elif _suffix(path) in SUFFIXES:
                found.paths.append(path)
            elif _suffix(path) in OTHER_SUFFIXES:
                found.others[_suffix(path)] += 1
        if max(len(found.paths), num_folders) > _MOST:
            raise rejected(root, f"the folder holds more than {_MOST:,} images or folders", "give a smaller folder")
    found.paths.sort(key=os.fsencode)
    return found


def report(found: Found, root: Path) -> None:
    """Log a warning for each kind of thing that a walk passed over."""
    if found.passed_over:
        names = ", ".join(printable(path.relative_to(root)) for path in sorted(found.passed_over)[:_NUM_NAMED])
        count = len(found.passed_over)
        _log.warning("%s: %d hidden or system names are skipped: %s", printable(root), count, names)
    if found.others:
        count = found.others.total()
        _log.warning(
            "%s: %d images are skipped (%s); only %s are read",
            printable(root), count, _counts(found.others), ", ".join(SUFFIXES),
        )  # fmt: skip
    if found.num_loops:
        _log.warning("%s: %d links lead back to a folder around them; skipped", printable(root), found.num_loops)


def subfolders(root: Path) -> list[Path]:
    """Return the folders in `root`, links to folders too, sorted; without those that are passed over."""
    return [path for path, is_folder in _entries(root) if is_folder and not is_passed_over(path.name)]


def is_passed_over(name: str) -> bool:
    """Return whether this is a hidden or system name, never a class or an image: `.Trash-1000`, `@eaDir`, `._a.jpg`."""
    return name.startswith(".") or name.lower() in _SYSTEM


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder as a path; raises DataRejected if it is none."""
    root = Path(folder)
    if not root.is_dir():
        raise rejected(root, "this is not a folder" if root.exists() else "there is no such folder", "check the path")
    return root


def rejected(path: Path, reason: str, remedy: str) -> DataRejected:
    """Return the error for images that cannot be used."""
    return DataRejected("cannot use the images", file=path, reason=reason, remedy=remedy)


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """Return the paths in a folder, sorted, and whether each is a folder or a link to one."""
    try:
        with os.scandir(folder) as entries:
            found = [(Path(entry.path), entry.is_dir()) for entry in entries]
    except OSError as error:
        raise rejected(folder, (error.strerror or str(error)).lower(), "check the permissions") from error
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _counts(others: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
