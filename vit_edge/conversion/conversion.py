"""What came of a conversion: the report of every tensor and what was specified, assumed or inferred."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vit_edge.checkpoint import Checkpoint
from vit_edge.conversion.preprocessing.search import Finding

__all__ = ["Conversion", "ConversionReport", "TensorMapping"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMapping:
    """One tensor of the checkpoint: what it is made from (nothing where it is new), its shape, and what was changed."""

    target: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    change: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ConversionReport:
    """Every tensor from where to where, what was left out and why, and which source specified what.

    `known` has a field's value and its source; `assumed` are the fields that are not specified; `found` those that the
    images settled. `new` are tensors that the file does not have, such as a head that was asked for.
    """

    source: str
    library: str
    name: str
    source_sha256: str
    mapped: tuple[TensorMapping, ...]
    unused: Mapping[str, str]
    prefix: str
    notes: tuple[str, ...]
    known: Mapping[str, str]
    assumed: tuple[str, ...]
    found: tuple[str, ...] = ()
    finding: Finding | None = None
    missing: tuple[str, ...] = ()  # nothing is loaded partially: in a report these two are always empty
    unexpected: tuple[str, ...] = ()
    checkpoint: Path | None = None
    size_bytes: int | None = None
    num_parameters: int = field(default=0)

    def __repr__(self) -> str:
        assumed = f", assumed: {', '.join(self.assumed)}" if self.assumed else ""
        return f"<ConversionReport {self.name!r} from {self.library}: {self.num_parameters:,} parameters{assumed}>"

    @property
    def new(self) -> tuple[str, ...]:
        """Return the tensors that were not in the file."""
        return tuple(mapping.target for mapping in self.mapped if not mapping.sources)

    @property
    def reshaped(self) -> tuple[TensorMapping, ...]:
        """Return the tensors that are not, value for value, what the file has."""
        return tuple(mapping for mapping in self.mapped if mapping.change)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A checkpoint in memory, and the report of how it came about."""

    checkpoint: Checkpoint
    report: ConversionReport
