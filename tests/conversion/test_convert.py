"""The same weights give the same logits as in the library that they come from, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.converter_table import FAMILIES, Family, largest_difference
from vit_edge.checkpoint import load_checkpoint
from vit_edge.convert import convert

# Relative to the largest logit, float32.
TOLERANCE = 1e-5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_are_those_of_the_library(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    made = family.make(source, 4)
    report = convert(made.source, out=tmp_path / "out", **made.options)
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.model.config.image_size == made.image_size
    assert largest_difference(made, checkpoint.model) <= TOLERANCE
    assert {m.target for m in report.mapped} == set(checkpoint.model.state_dict())
    assert not report.missing
    assert not report.unexpected
