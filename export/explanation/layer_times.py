"""The time of each layer in the float32 file and in the quantized one, engine by engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vit_edge.errors import EngineUnavailable
from vit_edge.export.explanation.engine_profiles import PROFILERS, one_batch
from vit_edge.export.quantization.coverage import coverage
from vit_edge.files import temporary_folder
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engines.protocol import EngineOptions, make_engine

__all__ = ["BETWEEN", "EngineTimes", "LayerTime", "OperatorTime", "layer_times"]

# Both files by turns, so that drift hits both alike; 24 runs of each count.
_ROUNDS, _RUNS_A_TURN, _WARM_UP = 6, 4, 3
_NUM_RUNS = _ROUNDS * _RUNS_A_TURN
# Other programs interrupt a node in few runs, so that its median is free of them, but a whole network in most: on two
# busy cores the median run of 13.8 ms took 19.9. Its fastest runs are as they are alone.
_UNDISTURBED_PERCENT = 10
# The time of a run outside of its nodes, so that the sum is the whole.
BETWEEN = "between the nodes"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """Median milliseconds of one op in the float32 file and in the candidate; None if the op has no node by itself.

    `precision` is the one in which the engine computes the op of the candidate.
    """

    node: str
    precision: Literal["int8", "float32"]
    reference_ms: float | None
    candidate_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorTime:
    """Median milliseconds of all other nodes of one operator; None if there are none."""

    operator: str
    reference_ms: float | None
    candidate_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTimes:
    """The times in one engine, one thread: `layers` and `rest` add up to `reference_ms` and `candidate_ms`."""

    engine: str
    version: str
    batch_size: int
    num_runs: int
    reference_ms: float
    candidate_ms: float
    layers: tuple[LayerTime, ...]
    rest: tuple[OperatorTime, ...]


def layer_times(
    model: ModelFile, reference: ModelFile, engine: str, *, nodes: Sequence[str], progress: Progress = silent
) -> EngineTimes:
    """Return the time of each op in `nodes`, and of everything else, in both files.

    Operators that the engine fuses into an op (its bias, a GELU) count as that op. Raises ModelRejected, MissingExtra,
    EngineUnavailable for an engine without a profile.
    """
    if engine not in PROFILERS:
        reason = f"{engine!r} has no profiler"
        raise EngineUnavailable("cannot time layers", reason=reason, remedy=f"choose {' or '.join(PROFILERS)}")
    in_float32 = set(nodes)
    if model.manifest.precision.startswith("int8"):
        in_float32 = {op.node for op in coverage(model, engine).float32_ops}
    with temporary_folder() as folder:
        timed = [_Timed(file, engine, Path(folder) / str(number)) for number, file in enumerate((reference, model))]
        _run(timed, f"timing layers in {engine}", progress)
        before, after = (entry.summary() for entry in timed)
    layers = [
        LayerTime(
            node=node,
            precision="float32" if node in in_float32 else "int8",
            reference_ms=before.ops.get(node),
            candidate_ms=after.ops.get(node),
        )
        for node in nodes
    ]
    return EngineTimes(
        engine=engine,
        version=timed[0].version,
        batch_size=model.manifest.batch or 1,
        num_runs=_NUM_RUNS,
        reference_ms=before.whole_ms,
        candidate_ms=after.whole_ms,
        layers=tuple(layers),
        rest=_rest(before, after, set(nodes)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Summary:
    """Median milliseconds by op, and of everything else by operator; they add up to the whole."""

    ops: dict[str, float]
    rest: dict[str, float]

    @property
    def whole_ms(self) -> float:
        return sum(self.ops.values()) + sum(self.rest.values())


class _Timed:
    """One file in one engine twice: with a profile, and without one for the time of the whole."""

    def __init__(self, model: ModelFile, engine: str, folder: Path) -> None:
        self._profiler = PROFILERS[engine](model, folder)
        self._engine = make_engine(engine, model, EngineOptions(threads=1))
        self.version = self._engine.version
        self._images_NHWC = one_batch(model)
        self._wholes_ms: list[float] = []

    def run(self) -> None:
        self._profiler.run()
        started = time.perf_counter_ns()
        self._engine.run(self._images_NHWC)
        self._wholes_ms.append((time.perf_counter_ns() - started) / 1e6)

    def summary(self) -> _Summary:
        """Return the medians over the runs that count, and free the file."""
        self._engine.close()
        profile = self._profiler.profile()
        medians_K = np.maximum(np.median(profile.ms_KR[:, -_NUM_RUNS:], axis=1), 0)
        found = _Summary(ops={}, rest={})
        for median_ms, kind, op in zip(medians_K.tolist(), profile.kinds, profile.ops, strict=True):
            into, name = (found.rest, kind) if op is None else (found.ops, op)
            into[name] = into.get(name, 0.0) + median_ms
        whole_ms = float(np.percentile(self._wholes_ms[-_NUM_RUNS:], _UNDISTURBED_PERCENT))
        found.rest[BETWEEN] = max(0.0, whole_ms - found.whole_ms)
        return found


def _run(timed: Sequence[_Timed], stage: str, progress: Progress) -> None:
    progress(stage, 0, _ROUNDS)
    for entry in timed:
        for _ in range(_WARM_UP):
            entry.run()
    for number in range(_ROUNDS):
        progress(stage, number, _ROUNDS)
        for entry in timed:
            for _ in range(_RUNS_A_TURN):
                entry.run()
    progress(stage, _ROUNDS, _ROUNDS)


def _rest(before: _Summary, after: _Summary, nodes: set[str]) -> tuple[OperatorTime, ...]:
    """Return everything that is no op of `nodes`, the slowest first; operators that take no time are left out."""
    sides = []
    for side in (before, after):
        others = sum(ms for node, ms in side.ops.items() if node not in nodes)
        sides.append({**side.rest, **({"other ops": others} if others else {})})
    slowest = {name: max(side.get(name, 0.0) for side in sides) for name in {**sides[0], **sides[1]}}
    return tuple(
        OperatorTime(operator=name, reference_ms=sides[0].get(name), candidate_ms=sides[1].get(name))
        for name, ms in sorted(slowest.items(), key=lambda item: -item[1])
        if ms > 0
    )
