"""Label files: a CSV with a row for each image, in the dialects that people and spreadsheets write, or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vit_edge.data.folders import rejected
from vit_edge.errors import DataRejected, printable
from vit_edge.files import read_file

__all__ = ["DELIMITERS", "column_name", "find_label_file", "read_label_file", "read_rows"]

_NAMES = ("labels.csv", "labels.tsv", "metadata.csv", "metadata.tsv", "metadata.jsonl")
# The first of these columns that is there counts; headers are compared in lower case, spaces as underscores.
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "filepath", "file_path", "image", "image_path", "image_name")
_LABEL_COLUMNS = ("label", "class", "class_name", "category")
DELIMITERS = ",;\t|"
_MAX_BYTES = 100_000_000
_NUM_NAMED = 5


def find_label_file(folder: Path) -> Path | None:
    """Return the label file of a folder, its name in any capitals, or None."""
    present = {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}
    found = (folder / present[name] for name in _NAMES if name in present)
    return next((path for path in found if path.is_file()), None)


def read_label_file(file: Path, *, labelled: bool = True) -> list[tuple[Path, str]]:
    """Return the images that a label file names, and the label of each; raises DataRejected.

    A repeated row counts once; one file with several labels is refused. Without `labelled` no label is needed.
    """
    columns, rows = _table(file)
    file_column = _column(file, columns, _FILE_COLUMNS, "the image")
    label_column = _column(file, columns, _LABEL_COLUMNS, "the label") if labelled else None
    pairs: dict[str, tuple[Path, str]] = {}
    several: dict[Path, tuple[str, str]] = {}
    missing: list[str] = []
    for row in rows:
        path = _existing(file.parent, row[file_column])
        if path is None:
            missing.append(row[file_column])
            continue
        label = row[label_column] if label_column is not None else ""
        if labelled and not label:
            raise rejected(file, f"the row of {row[file_column]!r} has no label", "give every image a label")
        _, before = pairs.setdefault(os.path.normpath(path), (path, label))
        if before != label:
            several[path] = (before, label)
    _refuse(file, missing, several, num_rows=len(rows))
    return list(pairs.values())


def read_rows(file: Path) -> list[tuple[Path, dict[str, str]]]:
    """Return the images that a label file names, and each row by its columns; raises DataRejected.

    Columns are named as `column_name` does. Cells beyond the header belong to the last column, separated by `|`.
    """
    columns, rows = _table(file)
    file_column = _column(file, columns, _FILE_COLUMNS, "the image")
    last = len(columns) - 1
    whole = [[*row[:last], "|".join(filter(None, row[last:]))] for row in rows]
    found = [(_existing(file.parent, row[file_column]), dict(zip(columns, row, strict=True))) for row in whole]
    missing = [row[file_column] for row, (path, _) in zip(rows, found, strict=True) if path is None]
    _refuse(file, missing, {}, num_rows=len(rows))
    return [(path, row) for path, row in found if path is not None]


def column_name(text: str) -> str:
    """Return the name of a column as the columns of label files are compared."""
    return unicodedata.normalize("NFC", text.strip()).lower().replace(" ", "_")


def _refuse(file: Path, missing: Sequence[str], several: Mapping[Path, tuple[str, str]], *, num_rows: int) -> None:
    if missing:
        named = ", ".join(printable(name) for name in missing[:_NUM_NAMED])
        reason = f"{len(missing)} of {num_rows} images are not there: {named}"
        raise rejected(file, reason, "write paths that are absolute, or relative to the folder of the label file")
    if several:
        shown = [f"{printable(path.name)} ({' and '.join(both)})" for path, both in several.items()]
        reason = f"{len(several)} images have several labels: {', '.join(shown[:_NUM_NAMED])}"
        raise rejected(file, reason, "give each image one label")


def _table(file: Path) -> tuple[list[str], list[list[str]]]:
    """Return the columns, in lower case, and the rows, every field stripped and in Unicode's composed form."""
    data = read_file(file, what="label file", max_bytes=_MAX_BYTES, error=DataRejected)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines = list(_json_rows(text) if file.suffix.lower() == ".jsonl" else _rows(text))
    except (RecursionError, ValueError, csv.Error) as error:
        kind = "JSON lines" if file.suffix.lower() == ".jsonl" else "CSV"
        raise rejected(file, f"the file is not {kind} in UTF-8 ({error})", f"save it as {kind} in UTF-8") from error
    if len(lines) < 2:
        raise rejected(file, f"the file has {len(lines)} rows", "write a header and one row for each image")
    columns = [column_name(field) for field in lines[0]]
    return columns, [row + [""] * (len(columns) - len(row)) for row in lines[1:]]


def _rows(text: str) -> Iterator[list[str]]:
    """Yield the rows that are not empty; the delimiter is the one that the header holds most of."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(DELIMITERS, key=header.count)
    for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True):
        if any(field.strip() for field in row):
            yield [unicodedata.normalize("NFC", field.strip()) for field in row]


def _json_rows(text: str) -> Iterator[list[str]]:
    """Yield the names of all fields, then their values in each line; lists are joined, other fields are empty."""
    objects = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(fields, dict) for fields in objects):
        raise ValueError("a line is no object")
    names = list(dict.fromkeys(name for fields in objects for name in fields))
    yield names
    for fields in objects:
        values = [fields.get(name, "") for name in names]
        known = [_text_of(value) for value in values]
        yield [unicodedata.normalize("NFC", value.strip()) for value in known]


def _text_of(value: object) -> str:
    if isinstance(value, list):
        return "|".join(map(_text_of, value))
    return str(value) if isinstance(value, str | int | float) else ""


def _column(file: Path, columns: Sequence[str], known: Sequence[str], what: str) -> int:
    name = next((name for name in known if name in columns), None)
    if name is None:
        found = ", ".join(map(repr, columns))
        reason = f"the header has no column for {what}; the columns are {found}"
        raise rejected(file, reason, f"name the column {known[0]} (or {', '.join(known[1:])})")
    return columns.index(name)


def _existing(folder: Path, name: str) -> Path | None:
    """Return the file that a row names, relative to `folder` or absolute; None if there is no such file.

    Tried as written, then with Windows' backslashes, in composed and decomposed Unicode.
    """
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        for form in ("NFC", "NFD"):
            path = folder / unicodedata.normalize(form, spelling)
            if name and _is_file(path):
                return path
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the system, or with a zero byte in it
        return False
