"""An accuracy search: how many ops can be quantized before the evaluation images no longer certify the budget.

Ops are ordered by the noise that each of their multiplications adds to the logits, measured on the calibration images.
Then one file after another is verified in that fixed order, from few quantized ops to all, up to the first that does
not pass. A sequence fixed before the evaluation images are opened needs no correction for multiple tests: the last file
that passes keeps its 95 % (Maurer, Hothorn and Lehmacher, 1995). The evaluation images never choose, they only stop.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vit_edge.errors import InputError, VitEdgeError
from vit_edge.export.verification.encoder_results import AnyVerification, EncoderVerification
from vit_edge.export.verification.verdict import SEVERITY, Verdict
from vit_edge.files import read_file, sha256_hex, write_atomic
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent

__all__ = ["SearchStep", "SearchTrace", "StepCache", "ordered_by_noise", "search_budget", "step_sizes"]

_MOST_STEP_BYTES = 100_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchStep:
    """One verified file: how many ops are quantized, and its figures in the engine that decided.

    A classifier has a drop and agreement, an encoder the percentage of neighbours kept; the other figures are None.
    """

    num_integer: int
    verdict: Verdict
    sqnr_db: float
    drop_points: float | None = None
    drop_upper_bound_points: float | None = None
    agreement: float | None = None
    neighbours: float | None = None
    neighbours_lower_bound: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchTrace:
    """The steps of an accuracy search in order, and the ops that stay float32.

    `cut_short` is "time limit" or "interrupted" if the search ended before its last step.
    """

    steps: tuple[SearchStep, ...]
    float32_ops: tuple[str, ...]
    cut_short: str | None


class StepCache:
    """The verdicts of earlier steps, kept in a folder, so that an interrupted search continues where it stopped.

    `judged_by` is a hash of everything else that decides: reference, images, labels, budget, engines.
    """

    def __init__(self, folder: Path, *, judged_by: str) -> None:
        self._folder, self._judged_by = folder, judged_by

    def read(self, model: ModelFile) -> SearchStep | None:
        """Return the step of this very file, None if it is unknown or damaged."""
        try:
            data = read_file(self._path(model), what="result", max_bytes=_MOST_STEP_BYTES, error=InputError)
            found = json.loads(data)
            return SearchStep(**found) if found.get("verdict") in SEVERITY else None
        except (AttributeError, InputError, TypeError, ValueError):
            return None

    def keep(self, model: ModelFile, step: SearchStep) -> None:
        """Keep a step; a folder that cannot be written only costs time later."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(model), json.dumps(asdict(step)).encode())
        except (OSError, VitEdgeError) as error:
            _log.info("a step of the accuracy search is not kept: %s", error)

    def _path(self, model: ModelFile) -> Path:
        return self._folder / f"{sha256_hex(f'{self._judged_by} {model.sha256}'.encode())}.json"


def ordered_by_noise(noise: Mapping[str, float], macs: Mapping[str, int]) -> list[str]:
    """Return the ops, those first that add the least noise for each multiplication."""
    return sorted(noise, key=lambda node: (noise[node] / max(macs.get(node, 1), 1), node))


def step_sizes(num_ops: int) -> list[int]:
    """Return how many ops are quantized at each step: half of those left each time, so the last steps differ by one."""
    sizes: list[int] = []
    left = num_ops
    while left > 0:
        left = left // 2
        sizes.append(num_ops - left)
    return sizes


def search_budget(
    order: Sequence[str],
    make: Callable[[frozenset[str]], ModelFile],
    verify: Callable[[ModelFile], AnyVerification],
    *,
    cache: StepCache | None = None,
    deadline: float | None = None,
    progress: Progress = silent,
) -> tuple[SearchTrace, ModelFile, AnyVerification]:
    """Return the trace of the search, and the last file that passed with its verification.

    If the first step does not pass, the file with all ops quantized is verified too, to show how far off it is. `make`
    gets the ops to keep in float32. Past a `deadline` (of `time.monotonic`) no step begins but the first; Ctrl-C ends
    the search with the best file so far, if there is one.
    """
    search = _Search(make, verify, cache)
    cut_short = None
    sizes = step_sizes(len(order))
    try:
        for number, size in enumerate(sizes):
            progress("certifying", number, len(sizes))
            if search.best is not None and deadline is not None and time.monotonic() > deadline:
                cut_short = "time limit"
                break
            if not search.passes(frozenset(order[size:]), size):
                break
    except KeyboardInterrupt:
        if search.best is None:
            raise
        cut_short = "interrupted"
    progress("certifying", len(sizes), len(sizes))
    model, found, left = search.conclude(len(order))
    kept = tuple(node for node in order if node in left)
    return SearchTrace(steps=tuple(search.steps), float32_ops=kept, cut_short=cut_short), model, found


class _Search:
    """The steps so far, and the last file that passed: with its verification, unless that came from the cache."""

    def __init__(
        self,
        make: Callable[[frozenset[str]], ModelFile],
        verify: Callable[[ModelFile], AnyVerification],
        cache: StepCache | None,
    ) -> None:
        self.steps: list[SearchStep] = []
        self.best: tuple[ModelFile, AnyVerification | None, frozenset[str]] | None = None
        self._make, self._verify, self._cache = make, verify, cache

    def passes(self, left: frozenset[str], size: int) -> bool:
        """Return whether the file with the ops `left` in float32 passes."""
        model, found = self._make(left), None
        step = self._cache.read(model) if self._cache else None
        if step is None:
            found = self._verify(model)
            step = _step(size, found)
        self.steps.append(step)
        if step.verdict == "pass":
            self.best = (model, found, left)
        if self._cache and found:  # last: Ctrl-C while it is written finds the best file known
            self._cache.keep(model, step)
        return step.verdict == "pass"

    def conclude(self, num_ops: int) -> tuple[ModelFile, AnyVerification, frozenset[str]]:
        """Return the best file, or if none passed the one with all ops quantized, with its verification."""
        model, found, left = self.best or (self._make(frozenset()), None, frozenset())
        found = found or self._verify(model)
        size = num_ops - len(left)
        if not any(step.num_integer == size for step in self.steps):
            self.steps.append(_step(size, found))
        return model, found, left


def _step(size: int, found: AnyVerification) -> SearchStep:
    if isinstance(found, EncoderVerification):
        decisive, knn = found.decisive, found.decisive.knn
        return SearchStep(
            num_integer=size,
            verdict=found.verdict,
            sqnr_db=decisive.sqnr_db,
            drop_points=None if knn is None else knn.drop_points,
            drop_upper_bound_points=None if knn is None else knn.drop_upper_bound_points,
            neighbours=decisive.kept.percent,
            neighbours_lower_bound=decisive.kept.lower_bound,
        )
    worst = found.decisive
    return SearchStep(
        num_integer=size,
        verdict=found.verdict,
        drop_points=worst.drop_points,
        drop_upper_bound_points=worst.drop_upper_bound_points,
        agreement=worst.agreement,
        sqnr_db=worst.sqnr_db,
    )
