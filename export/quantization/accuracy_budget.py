"""An accuracy budget: how many products can be integers before the images that judge no longer certify it.

Products are ordered by how much noise each multiplication of theirs brings into the logits, measured on the calibration
images. Then files are judged in that fixed order, from few integers to all, up to the first that does not pass. A
sequence fixed before the judging images are opened needs no correction for testing more than once: the last file that
passes keeps its 95 % (Maurer, Hothorn and Lehmacher, 1995). The judging images never choose, they only stop.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vit_edge.errors import InputError, VitEdgeError
from vit_edge.export.verification.results import Verification
from vit_edge.export.verification.verdict import SEVERITY, Verdict
from vit_edge.files import read_file, sha256_hex, write_atomic
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent

__all__ = ["Ladder", "Rung", "RungMemory", "climb", "order_of", "rung_sizes"]

_MOST_REMEMBERED_BYTES = 100_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One file that was judged: its integer products, and what came of it in the engine that decided."""

    num_integer: int
    verdict: Verdict
    drop_points: float
    drop_upper_bound_points: float
    agreement: float
    sqnr_db: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The files that were judged in order, what stopped it, and the products that stay float.

    `cut_short` is "time limit" or "interrupted" where not all that could be judged were.
    """

    rungs: tuple[Rung, ...]
    float32_ops: tuple[str, ...]
    cut_short: str | None


class RungMemory:
    """What judged files came to, kept in a folder, so that a search that was stopped goes on where it was.

    `judged_by` is a hash of all that decides besides the file: reference, images, labels, budget, engines.
    """

    def __init__(self, folder: Path, *, judged_by: str) -> None:
        self._folder, self._judged_by = folder, judged_by

    def recall(self, model: ModelFile) -> Rung | None:
        """Return what this very file came to, None where it is not known."""
        try:
            data = read_file(self._path(model), what="result", max_bytes=_MOST_REMEMBERED_BYTES, error=InputError)
            found = json.loads(data)
            return Rung(**found) if found.get("verdict") in SEVERITY else None
        except (AttributeError, InputError, TypeError, ValueError):  # none, or damaged: it is judged again
            return None

    def keep(self, model: ModelFile, rung: Rung) -> None:
        """Remember it; a folder that cannot be written costs only time later."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(model), json.dumps(asdict(rung)).encode())
        except (OSError, VitEdgeError) as error:
            _log.info("the result of a step is not kept: %s", error)

    def _path(self, model: ModelFile) -> Path:
        return self._folder / f"{sha256_hex(f'{self._judged_by} {model.sha256}'.encode())}.json"


def order_of(noise: Mapping[str, float], macs: Mapping[str, int]) -> list[str]:
    """Return the products, those first that bring least noise for each multiplication."""
    return sorted(noise, key=lambda node: (noise[node] / max(macs.get(node, 1), 1), node))


def rung_sizes(num_ops: int) -> list[int]:
    """Return how many products are integer at each rung: half of those left each time, so the last differ by one."""
    sizes: list[int] = []
    left = num_ops
    while left > 0:
        left = left // 2
        sizes.append(num_ops - left)
    return sizes


def climb(
    order: Sequence[str],
    make: Callable[[frozenset[str]], ModelFile],
    judge: Callable[[ModelFile], Verification],
    *,
    memory: RungMemory | None = None,
    deadline: float | None = None,
    progress: Progress = silent,
) -> tuple[Ladder, ModelFile, Verification]:
    """Return how far it went, and the last file that passed with its verification.

    Where the first does not pass, that of all products is made and judged, to say how far off it is. `make` takes the
    products to leave float. Past a `deadline` (of `time.monotonic`) no rung begins but the first; Ctrl-C ends with the
    best so far, if any.
    """
    rungs: list[Rung] = []
    best: tuple[ModelFile, Verification | None, frozenset[str]] | None = None
    cut_short = None
    sizes = rung_sizes(len(order))
    try:
        for number, size in enumerate(sizes):
            progress("certifying", number, len(sizes))
            if best is not None and deadline is not None and time.monotonic() > deadline:
                cut_short = "time limit"
                break
            left = frozenset(order[size:])
            model, found = make(left), None
            rung = memory.recall(model) if memory else None
            if rung is None:
                found = judge(model)
                rung = _rung(size, found)
                if memory:
                    memory.keep(model, rung)
            rungs.append(rung)
            if rung.verdict != "pass":
                break
            best = (model, found, left)
    except KeyboardInterrupt:
        if best is None:
            raise
        cut_short = "interrupted"
    progress("certifying", len(sizes), len(sizes))
    if best is None:
        best = (make(frozenset()), None, frozenset())
    model, found, left = best
    found = found or judge(model)
    if not any(rung.num_integer == len(order) - len(left) for rung in rungs):
        rungs.append(_rung(len(order) - len(left), found))
    kept = tuple(node for node in order if node in left)
    return Ladder(rungs=tuple(rungs), float32_ops=kept, cut_short=cut_short), model, found


def _rung(size: int, found: Verification) -> Rung:
    worst = found.decisive
    return Rung(
        num_integer=size,
        verdict=found.verdict,
        drop_points=worst.drop_points,
        drop_upper_bound_points=worst.drop_upper_bound_points,
        agreement=worst.agreement,
        sqnr_db=worst.sqnr_db,
    )
