"""What people read uses one word for one thing; `python -m tests.policy.words` lists what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.policy.ranks import modules
from tests.policy.words import faults_in, faults_of_text

ROOMS = sorted({path.parent.relative_to(ROOT).as_posix() for path in modules(ROOT).values()})
MARKDOWN = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in MARKDOWN)


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    by_place: dict[str, list[str]] = {}
    for fault in faults_in():
        path = fault.path.relative_to(ROOT)
        place = path.as_posix() if path.suffix == ".md" and path.parts[0] != "vit_edge" else path.parent.as_posix()
        by_place.setdefault(place, []).append(str(fault))
    return by_place


@pytest.mark.parametrize("place", [*ROOMS, *PAGES])
def test_help_errors_logs_and_pages_use_our_words(place: str, found: dict[str, list[str]]) -> None:
    assert found.get(place, []) == []


def test_nothing_that_is_read_is_in_a_place_that_no_test_looks_at(found: dict[str, list[str]]) -> None:
    assert found.keys() <= {*ROOMS, *PAGES}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Pictures to judge the result by.", ["Pictures", "judge"]),
        ("an ONNX file made elsewhere", ["made elsewhere"]),
        ("every product stays float", ["product", "stays float"]),
        ("the matrix product of an fp16 tensor", ["fp16"]),
        ("the option `fp16` and [a picture](picture.md)", []),
        ("the evaluation images are disjoint from the calibration images", []),
    ],
)
def test_a_word_to_avoid_is_found(text: str, words: list[str]) -> None:
    assert [word for word, _ in faults_of_text(text)] == words


ERRORS = """
from vit_edge.errors import ModelRejected
def check(name, size):
    reason = f"{name} is foreign"
    _log.warning("the picture %s is skipped", name)
    if size:
        raise ModelRejected("cannot load", file=name, reason="it is empty", remedy="ask whoever made it")
    raise ModelRejected("cannot load", file=name, reason=reason, remedy="export the network again")
"""


def test_errors_and_logs_are_read_out_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.policy.words.ROOT", ROOT)
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "loading.py").write_text(ERRORS)
    (tmp_path / "README.md").write_text("A picture.\n\n    a picture in code\n\n```\nnobody\n```\n")
    here = [fault for fault in faults_in(tmp_path) if fault.path.is_relative_to(tmp_path)]
    assert [(fault.path.name, fault.line, fault.word) for fault in here] == [
        ("loading.py", 4, "foreign"),
        ("loading.py", 5, "picture"),
        ("loading.py", 7, "it"),
        ("loading.py", 7, "whoever"),
        ("README.md", 1, "picture"),
    ]
