"""The zoo runs the whole chain on a family of each library, and writes what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.support.zoo_families import FAMILIES, Family
from benchmarks.zoo import page_of, run_family


def test_a_family_goes_through_the_whole_chain_and_into_the_page(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run_family(FAMILIES["transformers/ViTMSN"], tmp_path)
    assert found.get("refused", found.get("crashed")) is None
    assert found["parity_db"] >= 100
    assert min(found["int8_percent"].values()) >= 95
    assert min(found["sqnr_db"].values()) >= 18
    page = page_of([found, {"name": "timm/none", "refused": "export: the reason"}])
    assert "1 of 2 go through the whole chain, 1 of them with parity of 100 dB or more, and 1 with" in page
    assert "| timm/none | export: the reason |" in page
    assert "| transformers/ViTMSN | traced |" in page
    assert "cross-layer-equalization 1 of 1 attentions" in page or "cross-layer-equalization 2 of 2" in page


def test_what_refuses_a_family_is_kept_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    (tmp_path / "network").mkdir()
    found = run_family(Family(name="timm/x", library="timm", of="no_such_network"), tmp_path)
    assert "no_such_network" in found["crashed"]


def test_there_are_sixty_families_of_three_libraries() -> None:
    assert len(FAMILIES) >= 60
    assert {family.library for family in FAMILIES.values()} == {"transformers", "timm", "torchvision"}
