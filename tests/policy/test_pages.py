"""Pages are short where they must be, link to what exists, and name every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.policy.ranks import PLACES

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
_PATH = re.compile(r"`((?:vit_edge|export|runtime|tests|benchmarks|examples|docs|calibration_data)/[\w./-]*)`")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", text)).strip().lower().replace(" ", "-") for text in headings}


def test_the_readme_takes_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target, anchor in _LINK.findall(text):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor[1:] not in _anchors(file)):
            broken.append(f"{target}{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=_name)
def test_paths_of_the_repository_that_are_named_exist(page: Path) -> None:
    named = {path.rstrip("/") for path in _PATH.findall(page.read_text(encoding="utf-8"))}
    keys = {"vit_edge/manifest", "vit_edge/seal"}  # of OpenVINO's rt_info
    examples = {"export/quantization/x.py"}  # in CONTRIBUTING.md
    assert {path for path in named - keys - examples if not (ROOT / path).exists()} == set()


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target, _ in _LINK.findall(index.read_text(encoding="utf-8"))}
    assert {_name(page) for page in (ROOT / "docs").rglob("*.md") if page not in {*linked, index}} == set()


@pytest.mark.parametrize("package", [name for name in PLACES if name != "vit_edge"])
def test_the_api_page_names_every_public_name(package: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.split(f"## `{package}`")[1].split("\n## ")[0]
    assert [name for name in importlib.import_module(package).__all__ if f"`{name}" not in section] == []
