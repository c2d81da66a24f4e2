"""Compare a run of `vit-edge benchmark` with a saved one: slower, faster, or inconclusive."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_edge.errors import InputError, printable
from vit_edge.files import read_file
from vit_edge.runtime.benchmark.statistics import change

__all__ = ["Comparison", "compare", "invalid_reasons", "read_old"]

_MOST_BYTES = 100_000_000
# What makes two results the same candidate.
_SAME = ("engine", "device", "precision", "float_precision", "batch_size", "threads", "scenario", "latency_bound_ms")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The change of the time per image in per cent, with its 95 % interval; positive is slower."""

    what: str
    change_percent: float
    interval_percent: tuple[float, float]

    def is_slower_than(self, percent: float) -> bool:
        """Return whether even the lower end of the interval is above `percent`."""
        return self.interval_percent[0] > percent

    @property
    def text(self) -> str:
        """Return the change for people."""
        low, high = self.interval_percent
        return f"{self.change_percent:+.1f} % ({low:+.1f} to {high:+.1f})"


def read_old(path: Path) -> dict[str, Any]:
    """Return a saved run; raises InputError if the file holds none."""
    data = read_file(path, what="saved results", max_bytes=_MOST_BYTES)
    remedy = "give a file that `vit-edge benchmark --save` wrote"
    try:
        found = json.loads(data)
        results = found["results"]
        if found.get("command") != "benchmark" or not isinstance(results, list):
            raise ValueError("the file is not from `vit-edge benchmark`")
        for result in results:
            _key(result)
            if not all(isinstance(one, int | float) and one > 0 for one in result["by_round_ms"]):
                raise ValueError("by_round_ms holds a value that is not a positive number")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"the file holds no results ({type(error).__name__}: {error})"[:200]
        raise InputError("cannot compare", file=path, reason=reason, remedy=remedy) from error
    for reason in invalid_reasons(found):
        _log.warning("the saved run %s is INVALID: %s", path, reason)
    return dict(found)


def invalid_reasons(run: Mapping[str, Any]) -> list[str]:
    """Return why the figures of a saved run do not count; a busy machine makes the new run look fast."""
    if run.get("valid") is not False:
        return []
    return [printable(str(reason)) for reason in list(run.get("invalid_because") or ["the machine was not quiet"])]


def compare(new: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]], path: Path | None) -> list[Comparison]:
    """Return a comparison for every result that both runs have; raises InputError if there is none."""
    before = {_key(result): result for result in old}
    found = []
    for result in new:
        same = before.get(_key(result))
        if same is None or not same["by_round_ms"] or not result["by_round_ms"]:
            _log.warning("%s has no result to compare with %s", path, _named(result))
            continue
        if same.get("cpu") != result["cpu"]:
            _log.warning("the saved run %s was measured on another CPU: %s", path, same.get("cpu"))
        ratio, (low, high) = change(same["by_round_ms"], result["by_round_ms"])
        interval = (100 * (low - 1), 100 * (high - 1))
        found.append(Comparison(what=_named(result), change_percent=100 * (ratio - 1), interval_percent=interval))
    if not found:
        reason = (
            "the saved run has no result with the same file name, engine, device, precision, batch size and scenario"
        )
        raise InputError("cannot compare", file=path, reason=reason, remedy="measure with the options of the saved run")
    return found


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return (Path(result["model"]).name, result.get("device_name"), *(result[name] for name in _SAME))


def _named(result: Mapping[str, Any]) -> str:
    name, engine, batch, threads = Path(result["model"]).name, result["engine"], result["batch_size"], result["threads"]
    on = f" on {result['device_name']}" if "device_name" in result else ""
    return f"{name} in {engine}{on}, batch {batch}, {threads} {'thread' if threads == 1 else 'threads'}"
