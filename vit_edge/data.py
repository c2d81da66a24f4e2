"""Which images there are and what they show: image folders and label files, and the pixels of one after another."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from vit_edge.errors import DataRejected, ImageRejected, printable
from vit_edge.files import read_file, sha256_hex
from vit_edge.image import Pixels, Preprocessing, pixel_hash

__all__ = [
    "LabelledImages",
    "Rejections",
    "Splits",
    "find_images",
    "hold_out",
    "lies_loose",
    "pixel_hashes",
    "read_labelled",
    "read_splits",
    "read_unlabelled",
    "refuse_overlap",
    "set_hash",
    "stream",
    "stream_pixels",
]

Read = TypeVar("Read")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_VALIDATION_SPLITS = ("validation", "valid", "val")
EVALUATION_SPLITS = ("test", *_VALIDATION_SPLITS)
_SPLITS = ("train", *EVALUATION_SPLITS)
# file name -> column of the image's path; both have a column "label"
_LABEL_FILES = {"labels.csv": "file", "metadata.csv": "file_name"}

_MAX_FILES, _MAX_LABEL_BYTES = 1_000_000, 100_000_000
_MAX_REJECTED = 0.01
_NUM_NAMED = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Paths in sorted order, the class index of each, and the names of the classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Return how many images there are."""
        return len(self.paths)

    def take(self, positions: Sequence[int]) -> LabelledImages:
        """Return the images at these positions, under the same class names."""
        return LabelledImages(
            paths=tuple(self.paths[i] for i in positions),
            labels=tuple(self.labels[i] for i in positions),
            class_names=self.class_names,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Images to learn from, to choose the best epoch by, and to judge by once; the last two where there are any."""

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages | None


def find_images(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return every image below `folder` by its suffix, sorted; raises DataRejected where there is none.

    Links to files are followed (hub caches are made of them), links to folders are not, and that is logged.
    """
    root = _existing_folder(folder)
    found, num_links = [], 0
    for parent, folders, files in os.walk(root, onerror=_raise_unreadable):
        folders.sort()
        num_links += sum((Path(parent) / name).is_symlink() for name in folders)
        found += [Path(parent) / name for name in files if _is_image(name)]
        if len(found) > _MAX_FILES:
            raise _rejected(root, f"it holds more than {_MAX_FILES:,} images", "give a smaller folder")
    if num_links:
        _log.warning("%d links to folders below %s were not followed", num_links, printable(root))
    if not found:
        reason = f"it holds no image ({', '.join(SUFFIXES)})"
        raise _rejected(root, reason, "give a folder with images in it, at any depth")
    return tuple(sorted(found, key=os.fsencode))


def read_labelled(
    folder: str | os.PathLike[str],
    *,
    splits: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
) -> LabelledImages:
    """Return the labelled images of `folder`; raises DataRejected.

    The folder holds `<class>/<image>`, or `labels.csv` (file,label), or `metadata.csv` (file_name,label). Where it is
    divided into train, test, validation, valid or val, the first of `splits` that is there is taken. With `class_names`
    (a model's labels) every class must be one of them; where not one is, all must be indices.
    """
    root = _split_folder(_existing_folder(folder), splits)
    listed = _listed(root, Path(folder))
    pairs = _read_class_folders(root) if listed is None else listed
    names = tuple(class_names) if class_names is not None else tuple(sorted({label for _, label in pairs}))
    index = _indices(names, {label for _, label in pairs}, root)
    pairs.sort(key=lambda pair: os.fsencode(pair[0]))
    return LabelledImages(
        paths=tuple(path for path, _ in pairs), labels=tuple(index[label] for _, label in pairs), class_names=names
    )


def read_unlabelled(folder: str | os.PathLike[str], *, splits: Sequence[str] = ()) -> tuple[Path, ...]:
    """Return the images of `folder`, sorted, whatever their labels; raises DataRejected.

    They are those that `read_labelled` takes: of the same split, and of the label file where there is one.
    """
    root = _split_folder(_existing_folder(folder), splits, labelled=False)
    listed = _listed(root, Path(folder), labelled=False)
    if listed is None:
        return find_images(root)
    return tuple(sorted((path for path, _ in listed), key=os.fsencode))


def lies_loose(folder: str | os.PathLike[str], *, splits: Sequence[str] = ()) -> bool:
    """Return whether the images of `folder` have no labels: no label file, and no folder around any of them."""
    root = _split_folder(_existing_folder(folder), splits)
    if _listed(root, Path(folder)) is not None:
        return False
    holding = {Path(parent) for parent, _, files in os.walk(root) if any(_is_image(name) for name in files)}
    return holding == {root}


def read_splits(
    folder: str | os.PathLike[str], *, validation_fraction: float, seed: int, class_names: Sequence[str] | None = None
) -> Splits:
    """Return what `folder` gives to train on; raises DataRejected.

    Divided folders give their splits; without a validation split of its own, and in a folder that is not divided,
    `validation_fraction` of the training images is held out, the same share of every class.
    """
    root = _existing_folder(folder)
    present = _present_splits(root)
    if present and "train" not in present:
        raise _rejected(root, f"it is divided into {', '.join(present)}, without train", "put the others into train/")
    train = read_labelled(root, splits=("train",), class_names=class_names)

    def given(names: Sequence[str]) -> LabelledImages | None:
        if not set(names) & set(present):
            return None
        return read_labelled(root, splits=names, class_names=train.class_names)

    validation, test = given(_VALIDATION_SPLITS), given(("test",))
    if validation is None and validation_fraction > 0:
        train, held = hold_out(train, fraction=validation_fraction, seed=seed)
        validation = held if held.num_images else None  # one image of each class: none can be spared
    return Splits(train=train, validation=validation, test=test)


def hold_out(images: LabelledImages, *, fraction: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Return (kept, held out): `fraction` of every class, one image at least and never its last one."""
    random = np.random.default_rng(seed)
    labels = np.asarray(images.labels)
    held: set[int] = set()
    for label in sorted(set(images.labels)):
        members = random.permutation(np.flatnonzero(labels == label))
        held.update(int(i) for i in members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    kept = [i for i in range(images.num_images) if i not in held]
    return images.take(kept), images.take(sorted(held))


def stream_pixels(
    paths: Sequence[Path], preprocessing: Preprocessing, *, rejections: Rejections | None = None
) -> Iterator[tuple[int, Pixels]]:
    """Yield (position in `paths`, pixels) of one image after another.

    Images that cannot be used are skipped and named in the log; raises DataRejected when they are over 1 %.
    """
    yield from stream(paths, preprocessing.pixels, rejections=rejections)


class Rejections:
    """Images that could not be used, of `num_images` in all: raises DataRejected when they are over 1 %."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._errors: list[ImageRejected] = []

    def add(self, error: ImageRejected) -> None:
        """Count one more; some are gathered before the refusal, so that it names them."""
        self._errors.append(error)
        if len(self._errors) > max(_MAX_REJECTED * self.num_images, _NUM_NAMED):
            self.conclude()

    def conclude(self) -> None:
        """Name them in the log, once all images were read."""
        if not self._errors:
            return
        named = "; ".join(f"{error.file}: {error.reason}" for error in self._errors[:_NUM_NAMED])
        if len(self._errors) > _MAX_REJECTED * self.num_images:
            reason = f"{len(self._errors)} or more of {self.num_images} images cannot be used, over 1 %: {named}"
            raise DataRejected("cannot use the images", reason=reason, remedy="mend or remove them")
        _log.warning("%d of %d images were skipped: %s", len(self._errors), self.num_images, named)


def stream(
    paths: Sequence[Path],
    read: Callable[[Path], Read],
    *,
    threads: int = 1,
    rejections: Rejections | None = None,
) -> Iterator[tuple[int, Read]]:
    """Yield (position in `paths`, what `read` makes of the file) in order, read by `threads` at once.

    Images that `read` rejects are skipped and named in the log; raises DataRejected when they are over 1 %. With
    `rejections` these are a part of more images: they are counted there, and whoever gave it concludes.
    """
    counted = rejections or Rejections(len(paths))

    def attempt(path: Path) -> Read | ImageRejected:
        try:
            return read(path)
        except ImageRejected as error:
            return error

    for position, found in enumerate(_ahead(attempt, paths, threads)):
        if not isinstance(found, ImageRejected):
            yield position, found
            continue
        counted.add(found)
    if rejections is None:
        counted.conclude()


def _ahead(
    read: Callable[[Path], Read | ImageRejected], paths: Sequence[Path], threads: int
) -> Iterator[Read | ImageRejected]:
    """Yield `read(path)` in order, never more than a few files ahead: a million images must not pile up."""
    if threads == 1:
        yield from map(read, paths)
        return
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(paths)
        running = deque(pool.submit(read, path) for path in islice(remaining, 4 * threads))
        while running:
            done = running.popleft().result()
            running.extend(pool.submit(read, path) for path in islice(remaining, 1))
            yield done


def pixel_hashes(paths: Sequence[Path], preprocessing: Preprocessing) -> dict[str, Path]:
    """Return the hash of each image's pixels after preprocessing, and its path."""
    return {pixel_hash(pixels): paths[position] for position, pixels in stream_pixels(paths, preprocessing)}


def set_hash(hashes: Sequence[str]) -> str:
    """Return one hash for a set of images, whatever their order and names."""
    return sha256_hex("\n".join(sorted(hashes)).encode())


def refuse_overlap(
    tuning: Sequence[str] | Mapping[str, Path], judging: Mapping[str, Path], *, used_for: str = "calibration"
) -> None:
    """Raise DataRejected where an image that tuned the model would also judge it; both by pixel hash.

    Where the paths of those that tuned are known too, both names are in the message.
    """
    paths = tuning if isinstance(tuning, Mapping) else {}
    shared = sorted(
        printable(judging[h]) + (f" (as {printable(paths[h])})" if h in paths else "")
        for h in set(tuning) & judging.keys()
    )
    if shared:
        reason = f"{len(shared)} of the images that judge were used for {used_for}: {', '.join(shared[:_NUM_NAMED])}"
        remedy = "judge on other images: those that tuned a model flatter it"
        raise DataRejected("cannot verify on these images", reason=reason, remedy=remedy)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _existing_folder(folder: str | os.PathLike[str]) -> Path:
    root = Path(folder)
    if not root.is_dir():
        reason = "it is not a folder" if root.exists() else "there is no such folder"
        raise _rejected(root, reason, "check the path")
    return root


def _present_splits(root: Path, *, labelled: bool = True) -> list[str]:
    present = [name for name in _SPLITS if (root / name).is_dir()]
    for name, column in _LABEL_FILES.items():
        if (root / name).is_file():  # it may name the images of every split
            pairs = _read_label_file(root / name, column, labelled=labelled)
            tops = {path.relative_to(root).parts[0] for path, _ in pairs}
            return [split for split in present if split in tops] if tops <= set(present) else []
    return present


def _split_folder(root: Path, splits: Sequence[str], *, labelled: bool = True) -> Path:
    present = _present_splits(root, labelled=labelled)
    if not present:
        return root
    for name in splits:
        if name in present:
            return root / name
    wanted = " or ".join(splits) or "one of them"
    raise _rejected(root, f"it is divided into {', '.join(present)}", f"give the path of {wanted}")


def _listed(root: Path, folder: Path, *, labelled: bool = True) -> list[tuple[Path, str]] | None:
    """Return what a label file says of the images below `root`, which is `folder` or a split of it; None without."""
    for name, column in _LABEL_FILES.items():
        if (root / name).is_file():
            return _read_label_file(root / name, column, labelled=labelled)
        if (root.parent / name).is_file() and root != folder:  # one file for all splits
            pairs = _read_label_file(root.parent / name, column, labelled=labelled)
            return [pair for pair in pairs if root in pair[0].parents]
    return None


def _read_class_folders(root: Path) -> list[tuple[Path, str]]:
    paths = find_images(root)
    loose = [path for path in paths if path.parent == root]
    if loose:
        reason = f"{len(loose)} images lie beside the class folders, such as {printable(loose[0].name)}"
        raise _rejected(root, reason, "put each image in the folder of its class, or write a labels.csv (file,label)")
    return [(path, printable(path.relative_to(root).parts[0])) for path in paths]


def _read_label_file(file: Path, column: str, *, labelled: bool = True) -> list[tuple[Path, str]]:
    text = read_file(file, what="label file", max_bytes=_MAX_LABEL_BYTES, error=DataRejected)
    try:
        rows = list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _rejected(file, str(error), "write it as UTF-8 with commas") from error
    columns = (column, "label") if labelled else (column,)
    if not rows or not set(columns) <= rows[0].keys():
        raise _rejected(file, f"it needs the columns {','.join(columns)} and at least one row", "mend its first line")
    pairs = [(file.parent / (row[column] or ""), (row.get("label") or "").strip()) for row in rows]
    if labelled and not all(label for _, label in pairs):
        raise _rejected(file, "a row has no label", "give every image one")
    missing = [printable(path) for path, _ in pairs if not _is_file(path)]
    if missing:
        reason = f"{len(missing)} of {len(pairs)} images are not there: {', '.join(missing[:_NUM_NAMED])}"
        raise _rejected(file, reason, "paths are relative to the folder of this file")
    return pairs


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the system, or with a zero byte in it
        return False


def _indices(names: Sequence[str], used: set[str], root: Path) -> dict[str, int]:
    index = {name: position for position, name in enumerate(names)}
    if not used & index.keys():  # not one is a name: then all are indices
        index = {str(position): position for position in range(len(names))}
    unknown = sorted(label for label in used if label not in index)
    if unknown:
        shown = ", ".join(repr(label) for label in unknown[:_NUM_NAMED])
        known = ", ".join(repr(name) for name in list(names)[:_NUM_NAMED])
        reason = f"{len(unknown)} of its classes are not among the model's {len(names)} ({known} ...): {shown}"
        raise _rejected(root, reason, "name the folders or labels as the model does")
    return {label: index[label] for label in used}


def _raise_unreadable(error: OSError) -> None:
    raise _rejected(Path(error.filename or "."), (error.strerror or str(error)).lower(), "check the permissions")


def _rejected(path: Path, reason: str, remedy: str) -> DataRejected:
    return DataRejected("cannot use the images", file=path, reason=reason, remedy=remedy)
