"""Labelled images: class folders or label files, divided into splits or not."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_edge.data.folders import existing_folder, images_below, rejected, subfolders, walk
from vit_edge.data.label_files import find_label_file, read_label_file
from vit_edge.data.shards import find_shards, read_shards, shards_by_split
from vit_edge.errors import printable

__all__ = [
    "EVALUATION_SPLITS",
    "LabelledImages",
    "Splits",
    "hold_out",
    "is_below",
    "label_file_of",
    "lies_loose",
    "read_class_names",
    "read_labelled",
    "read_splits",
    "read_unlabelled",
    "refuse_one_class",
    "training_folder",
]

# The folder names of each split, in any capitals.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
EVALUATION_SPLITS = ("test", "validation")
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}
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
    """Images to learn from, to choose the best epoch by, and to evaluate once; the last two may be missing."""

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages | None


def read_labelled(
    folder: str | os.PathLike[str],
    *,
    splits: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
) -> LabelledImages:
    """Return the labelled images of `folder`; raises DataRejected.

    The folder holds `<class>/<image>` or a label file. If it is divided into "train", "validation" or "test", the first
    of `splits` that is there is taken. With `class_names` (a model's labels) every class must be one of them; if no
    class is, all must be indices. Names are compared in Unicode's composed form (NFC). `folder` may be shards, too: a
    file or a pattern, or a folder that holds them, with the split in front of their names.
    """
    if shards := find_shards(folder):
        return _labelled_shards(_of_split(shards, splits), class_names)
    root = _split_folder(existing_folder(folder), splits)
    listed = _listed(root, Path(folder))
    pairs = _read_class_folders(root) if listed is None else listed
    names = tuple(class_names) if class_names is not None else tuple(sorted({label for _, label in pairs}))
    index = _indices(names, {label for _, label in pairs}, root)
    pairs.sort(key=lambda pair: os.fsencode(pair[0]))
    return LabelledImages(
        paths=tuple(path for path, _ in pairs), labels=tuple(index[label] for _, label in pairs), class_names=names
    )


def read_unlabelled(folder: str | os.PathLike[str], *, splits: Sequence[str] = ()) -> tuple[Path, ...]:
    """Return the images of `folder`, sorted, with or without labels; raises DataRejected.

    These are the images that `read_labelled` takes: of the same split, and of the label file if there is one.
    """
    if shards := find_shards(folder):
        return tuple(path for path, _ in read_shards(_of_split(shards, splits)))
    root = _split_folder(existing_folder(folder), splits, labelled=False)
    listed = _listed(root, Path(folder), labelled=False)
    if listed is None:
        return images_below(root)
    return tuple(sorted((path for path, _ in listed), key=os.fsencode))


def lies_loose(folder: str | os.PathLike[str], *, splits: Sequence[str] = ()) -> bool:
    """Return whether the images of `folder` have no labels: no label file, and no folder around any of them."""
    if shards := find_shards(folder):
        return all(label is None for _, label in read_shards(_of_split(shards, splits)))
    root = _split_folder(existing_folder(folder), splits, labelled=False)
    if _listed(root, Path(folder), labelled=False) is not None:
        return False
    return {path.parent for path in walk(root).paths} == {root}


def read_class_names(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of the class folders, sorted, as training takes them: of the first split if there are splits."""
    root = existing_folder(folder)
    present = _present_splits(root)
    root = next((present[split] for split in _SPLITS if split in present), root)
    holding = [path for path in subfolders(root) if walk(path).paths]
    names = sorted({_name(path.name) for path in holding or subfolders(root)})
    refuse_one_class(names, root)
    return tuple(names)


def training_folder(folder: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the training images if `folder` is divided into splits, of which that is one of several."""
    present = _present_splits(Path(folder), labelled=False) if Path(folder).is_dir() else {}
    return present.get("train") if len(present) > 1 else None


def refuse_one_class(class_names: Sequence[str], root: str | os.PathLike[str]) -> None:
    """Raise DataRejected unless there are two classes at least: a classifier has to choose."""
    if len(class_names) > 1:
        return
    reason, remedy = "the folder holds no class folder", "give a folder with one folder for each class"
    for name in class_names:
        reason = f"there is one class only, {name!r}; a classifier needs two or more"
        if (Path(root) / name).is_dir() and subfolders(Path(root) / name):
            remedy = f"give the path of the folder that holds the classes, perhaps {printable(Path(root) / name)}"
    raise rejected(Path(root), reason, remedy)


def read_splits(
    folder: str | os.PathLike[str], *, validation_fraction: float, seed: int, class_names: Sequence[str] | None = None
) -> Splits:
    """Return what `folder` gives to train on; raises DataRejected.

    Divided folders give their splits; without a validation split, and in a folder that is not divided,
    `validation_fraction` of the training images is held out, the same share of every class.
    """
    root, shards = Path(folder), find_shards(folder)
    present: Mapping[str, object] = (
        shards_by_split(shards, _SPLIT_OF) if shards else _present_splits(existing_folder(root))
    )
    if present and "train" not in present:
        found = ", ".join(present)
        raise rejected(root, f"the folder is divided into {found}, without train", "put the other images into train/")
    train = read_labelled(root, splits=("train",), class_names=class_names)
    refuse_one_class(train.class_names, root)

    def given(split: str) -> LabelledImages | None:
        if split not in present:
            return None
        return read_labelled(root, splits=(split,), class_names=train.class_names)

    validation, test = given("validation"), given("test")
    if validation is None and validation_fraction > 0:
        train, held = hold_out(train, fraction=validation_fraction, seed=seed)
        validation = held if held.num_images else None  # one image of each class: none can be spared
    return Splits(train=train, validation=validation, test=test)


def _of_split(shards: Sequence[Path], splits: Sequence[str]) -> Sequence[Path]:
    """Return the shards of the first of `splits` that is there; all if their names do not begin with splits."""
    present = shards_by_split(shards, _SPLIT_OF)
    if not present:
        return shards
    for split in (_SPLIT_OF.get(name, name) for name in splits):
        if split in present:
            return present[split]
    wanted = " or ".join(splits) or "one of them"
    raise rejected(
        shards[0].parent, f"the shards are divided into {', '.join(present)}", f"give a pattern for {wanted}"
    )


def _labelled_shards(shards: Sequence[Path], class_names: Sequence[str] | None) -> LabelledImages:
    pairs = read_shards(shards)
    missing = [path for path, label in pairs if label is None]
    if missing:
        reason = f"{len(missing)} of {len(pairs)} images have no label, such as {printable(missing[0].name)}"
        raise rejected(shards[0], reason, "add key.cls or key.json to each key.jpg, or a column label")
    texts = [unicodedata.normalize("NFC", str(label)) for _, label in pairs]
    names = tuple(class_names) if class_names is not None else tuple(sorted(set(texts), key=_in_order))
    index = _indices(names, set(texts), shards[0].parent)
    paths = tuple(path for path, _ in pairs)
    return LabelledImages(paths=paths, labels=tuple(index[text] for text in texts), class_names=names)


def _in_order(name: str) -> tuple[int, str]:
    """Return what sorts class names: indices by their value, in front of texts."""
    return (int(name), "") if name.isascii() and name.isdigit() else (2**63, name)


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


def _present_splits(root: Path, *, labelled: bool = True) -> dict[str, Path]:
    """Return the folder of each split that `root` is divided into; nothing if it is not divided.

    A folder with such a name is a split if it holds folders or a label file: a class may be called "train". If every
    folder has such a name, all are splits: no data set has the classes "train" and "test" only.
    """
    folders = subfolders(root)
    named = {path: _SPLIT_OF[path.name.lower()] for path in folders if path.name.lower() in _SPLIT_OF}
    listed = find_label_file(root)
    if listed is not None:  # one file may name the images of every split
        tops = {_below(path, root).parts[0] for path, _ in read_label_file(listed, labelled=labelled)}
        if not tops <= {path.name for path in named}:
            return {}
        return _by_split({path: split for path, split in named.items() if path.name in tops}, root)
    whole = {path: split for path, split in named.items() if subfolders(path) or find_label_file(path)}
    if whole and labelled:
        return _by_split(whole, root)
    return _by_split(named, root) if whole or len(named) == len(folders) else {}


def _by_split(folders: Mapping[Path, str], root: Path) -> dict[str, Path]:
    """Return split -> folder; raises DataRejected if two folders are the same split, such as val and valid."""
    twice = [path for path, split in folders.items() if list(folders.values()).count(split) > 1]
    if twice:
        names = " and ".join(printable(path.name) for path in twice)
        raise rejected(root, f"{names} are the same split", "keep one of these folders, or merge them")
    return {split: path for path, split in folders.items()}


def _split_folder(root: Path, splits: Sequence[str], *, labelled: bool = True) -> Path:
    present = _present_splits(root, labelled=labelled)
    if not present:
        return root
    for split in (_SPLIT_OF.get(name, name) for name in splits):
        if split in present:
            return present[split]
    found = ", ".join(printable(path.name) for path in present.values())
    wanted = " or ".join(splits) or "one of them"
    raise rejected(root, f"the folder is divided into {found}", f"give the path of {wanted}")


def label_file_of(folder: str | os.PathLike[str], *, splits: Sequence[str] = ()) -> tuple[Path, Path | None]:
    """Return the folder of the images, that of the first of `splits` if there are any, and its label file or None.

    The label file may be one for all splits. Raises DataRejected.
    """
    root = _split_folder(existing_folder(folder), splits, labelled=False)
    return root, _label_file(root, Path(folder))


def _label_file(root: Path, folder: Path) -> Path | None:
    file = find_label_file(root)
    return find_label_file(root.parent) if file is None and root != folder else file  # one file for all splits


def _listed(root: Path, folder: Path, *, labelled: bool = True) -> list[tuple[Path, str]] | None:
    """Return what a label file says of the images below `root`, which is `folder` or a split of it; None without."""
    file = _label_file(root, folder)
    if file is None:
        return None
    pairs = read_label_file(file, labelled=labelled)
    return pairs if file.parent == root else [pair for pair in pairs if is_below(pair[0], root)]


def is_below(path: Path, folder: Path) -> bool:
    """Return whether the path is in the folder or further below, however the two are spelled."""
    return _below(path, folder) != path


def _below(path: Path, folder: Path) -> Path:
    """Return the path relative to a folder around it, however the two are spelled; `path` itself if it is elsewhere."""
    for spelling in (os.path.abspath, os.path.realpath):
        with suppress(ValueError):
            return Path(spelling(path)).relative_to(spelling(folder))
    return path


def _read_class_folders(root: Path) -> list[tuple[Path, str]]:
    paths = images_below(root)
    loose = [path for path in paths if path.parent == root]
    if loose:
        reason = f"{len(loose)} images are next to the class folders, such as {printable(loose[0].name)}"
        raise rejected(root, reason, "put each image in the folder of its class, or write a labels.csv (file,label)")
    pairs = [(path, _name(path.relative_to(root).parts[0])) for path in paths]
    _refuse_same_folder(root)
    empty = sorted({_name(path.name) for path in subfolders(root)} - {label for _, label in pairs})
    if empty:
        _log.warning("%s: no image that can be read in %s; no classes", printable(root), ", ".join(empty[:_NUM_NAMED]))
    return pairs


def _refuse_same_folder(root: Path) -> None:
    """Raise DataRejected if two class folders are links to one: its images would have two labels."""
    real: dict[str, Path] = {}
    for path in subfolders(root):
        other = real.setdefault(os.path.realpath(path), path)
        if other != path:
            names = f"{printable(other.name)} and {printable(path.name)}"
            raise rejected(root, f"the class folders {names} are the same folder", "remove one of the links")


def _indices(names: Sequence[str], used: set[str], root: Path) -> dict[str, int]:
    """Return the index of each class in use; raises DataRejected if a name is unknown, or stands for two classes."""
    composed = [unicodedata.normalize("NFC", name) for name in names]
    index = {name: position for position, name in enumerate(composed)}
    if not used & index.keys():  # no label is a name: then all are indices
        index = {str(position): position for position in range(len(names))}
    elif twice := sorted(name for name in used if composed.count(name) > 1):
        positions = " and ".join(str(i) for i, name in enumerate(composed) if name == twice[0])
        reason = f"{twice[0]!r} is the name of the classes {positions} of the model"
        raise rejected(root, reason, "name the folders or labels by the index of the class, from 0")
    unknown = sorted(label for label in used if label not in index)
    if unknown:
        shown = ", ".join(repr(label) for label in unknown[:_NUM_NAMED])
        known = ", ".join(repr(name) for name in list(names)[:_NUM_NAMED])
        reason = f"{len(unknown)} of its classes are not among the model's {len(names)} ({known} ...): {shown}"
        raise rejected(root, reason, "name the folders or labels as the model does")
    return {label: index[label] for label in used}


def _name(folder: str) -> str:
    """Return the class that a folder's name stands for, in Unicode's composed form: file systems differ in it."""
    return unicodedata.normalize("NFC", printable(folder))
