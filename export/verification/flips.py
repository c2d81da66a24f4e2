"""Label only the flips: the few images whose prediction changed, written out to be labelled, and read back.

If both models predict the same class, both are right or both are wrong, and the image cancels in the drop. So the
labels of the flips give the drop, its bound and McNemar's counts exactly as labels of all images would. The hash of
the pixels identifies a row; its other cells help the person who fills in the labels.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from vit_edge.data.label_files import DELIMITERS
from vit_edge.errors import DataRejected, UsageError, printable
from vit_edge.export.verification.paired_run import PairedRun
from vit_edge.files import may_write, read_file
from vit_edge.metrics import NO_CLASS, UNKNOWN

__all__ = [
    "COLUMNS",
    "Change",
    "FlipLabels",
    "changes",
    "class_titles",
    "flips_csv",
    "may_write_flips",
    "path_below",
    "read_flips",
]

COLUMNS = (
    "file",
    "reference",
    "candidate",
    "label",
    "reference_margin",
    "candidate_margin",
    "engines",
    "pixels_sha256",
    "models_sha256",
)
_BETWEEN_ENGINES = " | "
_NEITHER = "none"
_MAX_BYTES = 100_000_000
_NUM_NAMED = 5
# Spreadsheets read a cell that begins with one of these as a formula.
_FORMULA = ("=", "+", "-", "@")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """An image whose prediction changed: both predictions, their margins over the next class, and the label.

    `effect` is "worse" if the reference is right, "better" if the candidate is, None if there is no label.
    """

    path: str
    pixels_sha256: str
    reference: str
    candidate: str
    reference_margin: float
    candidate_margin: float
    label: str | None
    effect: Literal["worse", "better", "neither"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipLabels:
    """The rows of a flips file, by pixel hash."""

    file: str
    labels: Mapping[str, int]
    rows: Mapping[str, Mapping[str, str]]

    def of(self, run: PairedRun) -> npt.NDArray[np.int64]:
        """Return the label of each image, UNKNOWN if the file has none."""
        return np.array([self.labels.get(digest, UNKNOWN) for digest in run.hashes], dtype=np.int64)

    def check(self, run: PairedRun, found: Sequence[Change]) -> None:
        """Raise DataRejected if the file belongs to other images or other predictions."""
        strange = [self.rows[digest]["file"] for digest in self.rows.keys() - set(run.hashes)]
        if strange:
            reason = f"{len(strange)} images in the file are not among the evaluation images: {_named(strange)}"
            raise _rejected(self.file, reason, "give the --data that the file was made from, images unchanged")
        missing = [change.path for change in found if change.pixels_sha256 not in self.rows]
        if missing:
            reason = f"{len(missing)} predictions that change in {run.engine} are missing: {_named(missing)}"
            raise _rejected(
                self.file, reason, "write a new file with --flips-out, which keeps the labels, and fill in the rest"
            )
        for change in found:
            self._check_answers(self.rows[change.pixels_sha256], change, run.engine)

    def _check_answers(self, row: Mapping[str, str], change: Change, engine: str) -> None:
        engines = row["engines"].split(_BETWEEN_ENGINES)
        for column, answer in (("reference", change.reference), ("candidate", change.candidate)):
            written = row[column].split(_BETWEEN_ENGINES)
            wanted = (
                written[engines.index(engine)] if len(written) == len(engines) and engine in engines else row[column]
            )
            if engine in engines and not _same(wanted, answer) and not _same(row[column], answer):
                reason = (
                    f"for {row['file']} the file says the {column} predicts {wanted!r}; here {engine} gives {answer!r}"
                )
                raise _rejected(self.file, reason, "fill in labels only, or write a new file on this machine")


def class_titles(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as people read them: unprintable characters escaped, an index added if two share a name."""
    plain = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names]
    counts = Counter(plain)
    return tuple(name if counts[name] == 1 else f"{name} [{index}]" for index, name in enumerate(plain))


def changes(run: PairedRun, labels_B: npt.NDArray[np.int64], titles: Sequence[str]) -> tuple[Change, ...]:
    """Return every image whose prediction changed, in the order of the paths."""
    answers = run.answers
    return tuple(
        Change(
            path=printable(run.paths[i]),
            pixels_sha256=run.hashes[i],
            reference=titles[answers.reference_BT[i, 0]],
            candidate=titles[answers.candidate_BT[i, 0]],
            reference_margin=float(answers.reference_margin_B[i]),
            candidate_margin=float(answers.candidate_margin_B[i]),
            label=_label_title(int(labels_B[i]), titles),
            effect=_effect(int(labels_B[i]), int(answers.reference_BT[i, 0]), int(answers.candidate_BT[i, 0])),
        )
        for i in np.flatnonzero(answers.changed)
    )


def flips_csv(found: Mapping[str, Sequence[Change]], *, folder: str | os.PathLike[str], models_sha256: str) -> bytes:
    """Return the flips file of the changes in each engine: one row per image, its label empty unless known."""
    by_image: dict[str, dict[str, Change]] = {}
    for engine, entries in found.items():
        for change in entries:
            by_image.setdefault(change.pixels_sha256, {})[engine] = change
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for digest, entries_ in sorted(by_image.items(), key=lambda item: next(iter(item[1].values())).path):
        each = list(entries_.values())
        cells = (
            path_below(each[0].path, folder),
            _joined(change.reference for change in each),
            _joined(change.candidate for change in each),
            each[0].label or "",
            _joined(f"{change.reference_margin:.4f}" for change in each),
            _joined(f"{change.candidate_margin:.4f}" for change in each),
            _BETWEEN_ENGINES.join(entries_),
            digest,
            models_sha256,
        )
        writer.writerow(f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells)
    return text.getvalue().encode("utf-8")


def may_write_flips(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Return `path` if flips may be written there; raises UsageError. Filled-in labels are kept, even with `force`."""
    if os.path.lexists(path) and not force:
        remedy = "fill in the labels and add --flips, or choose another name with --flips-out"
        raise UsageError("cannot write", file=path, reason="the file exists", remedy=remedy)
    target = may_write(path, force=force)
    if not target.exists():
        return target
    try:
        filled = sum(bool(row["label"]) for row in _rows(target))
    except DataRejected as error:
        remedy = "choose another name with --flips-out"
        raise UsageError("cannot overwrite", file=path, reason="the file is not a flips file", remedy=remedy) from error
    if filled:
        remedy = "use the labels with --flips, or choose another name with --flips-out"
        raise UsageError("cannot overwrite", file=path, reason=f"{filled} labels are filled in", remedy=remedy)
    return target


def read_flips(
    file: str | os.PathLike[str], class_names: Sequence[str], *, models_sha256: str | None = None
) -> FlipLabels:
    """Return the labels of a flips file, as spreadsheet programs leave it too; raises DataRejected.

    A label is the name or index of a class, "none" for an image of no class, or empty. With `models_sha256` the file
    must have been made with these models.
    """
    rows = _rows(Path(file))
    others = sum(row["models_sha256"] != models_sha256 for row in rows)
    if models_sha256 is not None and others:
        reason = f"{others} of {len(rows)} rows were made with other models"
        remedy = "give those models, or write a new file with --flips-out, which keeps the labels"
        raise _rejected(file, reason, remedy)
    labels, unknown, parse = dict[str, int](), list[str](), _Labels(class_names)
    for row in rows:
        label = parse(row["label"])
        if label is None or labels.setdefault(row["pixels_sha256"], label) != label:
            unknown.append(f"{row['label']!r} for {row['file']}")
    if unknown:
        reason = f"{len(unknown)} labels match no class of the model, or two: {_named(unknown)}"
        raise _rejected(file, reason, f'write the name or the index of a class, or "{_NEITHER}"')
    return FlipLabels(file=printable(file), labels=labels, rows={row["pixels_sha256"]: row for row in rows})


class _Labels:
    """Turn what a person wrote into a class index; None if it matches no class, or two."""

    def __init__(self, names: Sequence[str]) -> None:
        titles = class_titles(names)
        # If a class name is a number, numbers are names: index 3 must not be read as class "3", or the other way round.
        self.num_indices = 0 if any(re.fullmatch(r"\d+", name.strip()) for name in names) else len(names)
        self.exact = {title: index for index, title in enumerate(titles)}
        folded = Counter(title.strip().casefold() for title in titles)
        self.folded = {
            title.strip().casefold(): index
            for index, title in enumerate(titles)
            if folded[title.strip().casefold()] == 1
        }

    def __call__(self, text: str) -> int | None:
        if not text:
            return UNKNOWN
        for spelling in (text, text.removeprefix("'")):
            if spelling in self.exact:
                return self.exact[spelling]
            if spelling.casefold() in self.folded:
                return self.folded[spelling.casefold()]
        if text.casefold() == _NEITHER:
            return NO_CLASS
        number = re.fullmatch(r"(\d{1,9})([.,]0+)?", text)
        return int(number[1]) if number and int(number[1]) < self.num_indices else None


def _rows(file: Path) -> list[dict[str, str]]:
    """Return the rows that are not empty, with our columns; any of DELIMITERS between, UTF-8, UTF-16 or Windows."""
    text = _decoded(read_file(file, what="flips file", max_bytes=_MAX_BYTES, error=DataRejected), file)
    first = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first.count)
    try:
        lines = [
            [cell.strip() for cell in line] for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        ]
    except csv.Error as error:
        raise _rejected(file, str(error), "save the file as CSV") from error
    header = lines[0] if lines else []
    lacking = [column for column in COLUMNS if header.count(column) != 1]
    if lacking:
        raise _rejected(
            file, f"the columns {', '.join(lacking)} are missing", "keep the columns that `vit-edge verify` wrote"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not any(line):
            continue
        row = dict(zip(header, line, strict=False))
        if (
            len(line) < len(header)
            or any(line[len(header) :])
            or not re.fullmatch("[0-9a-f]{64}", row["pixels_sha256"])
        ):
            raise _rejected(file, f"row {number} is damaged", "fill in only the column label")
        rows.append(row)
    return rows


def _decoded(data: bytes, file: Path) -> str:
    for encoding in ("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise _rejected(file, "the file is not text", "save the file as CSV in UTF-8")


def path_below(path: str, folder: str | os.PathLike[str]) -> str:
    """Return a printable path relative to the folder that it is in; any other path stays as it is."""
    root = Path(printable(folder))
    return str(Path(path).relative_to(root)) if root in Path(path).parents else path


def _joined(values: Iterable[str]) -> str:
    """Return the value that all engines share, or one value per engine in their order."""
    each = list(values)
    return each[0] if len(set(each)) == 1 else _BETWEEN_ENGINES.join(each)


def _same(written: str, answer: str) -> bool:
    """Return whether a cell still says `answer`; spreadsheets make 7 of 007."""
    plain = written.removeprefix("'").strip()
    return plain == answer.strip() or (plain.isdecimal() and answer.strip().isdecimal() and int(plain) == int(answer))


def _label_title(label: int, titles: Sequence[str]) -> str | None:
    if label == UNKNOWN:
        return None
    return _NEITHER if label == NO_CLASS else titles[label]


def _effect(label: int, reference: int, candidate: int) -> Literal["worse", "better", "neither"] | None:
    if label == UNKNOWN:
        return None
    if label == reference:
        return "worse"
    return "better" if label == candidate else "neither"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (" ..." if len(names) > _NUM_NAMED else "")


def _rejected(file: str | os.PathLike[str], reason: str, remedy: str) -> DataRejected:
    return DataRejected("cannot use the flips file", file=file, reason=reason, remedy=remedy)
