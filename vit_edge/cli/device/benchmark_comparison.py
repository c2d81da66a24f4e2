"""A run of `vit-edge benchmark` beside one that was saved: slower, faster, or within what the rounds leave open."""

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

__all__ = ["Comparison", "compare", "read_old"]

_MOST_BYTES = 100_000_000
# What makes two results the same candidate.
_SAME = ("engine", "device", "precision", "float_precision", "batch_size", "threads", "scenario", "latency_bound_ms")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How an image's time changed since the saved run, in per cent, with its 95 % interval; positive is slower."""

    what: str
    change_percent: float
    interval_percent: tuple[float, float]

    def is_slower_than(self, percent: float) -> bool:
        """Return whether it is slower by more than `percent` even at the friendly end of the interval."""
        return self.interval_percent[0] > percent

    @property
    def said(self) -> str:
        """Return the change for people."""
        low, high = self.interval_percent
        return f"{self.change_percent:+.1f} % ({low:+.1f} to {high:+.1f})"


def read_old(path: Path) -> dict[str, Any]:
    """Return a saved run; raises InputError where it is none."""
    data = read_file(path, what="saved results", max_bytes=_MOST_BYTES)
    remedy = "give what `vit-edge benchmark --save` wrote"
    try:
        found = json.loads(data)
        results = found["results"]
        if found.get("command") != "benchmark" or not isinstance(results, list):
            raise ValueError("it is not of `vit-edge benchmark`")
        for result in results:
            _key(result)
            if not all(isinstance(one, int | float) and one > 0 for one in result["by_round_ms"]):
                raise ValueError("a time of a round is not a positive number")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"it holds no results ({type(error).__name__}: {error})"[:200]
        raise InputError("cannot compare", file=path, reason=reason, remedy=remedy) from error
    _warn_of_noise(found, path)
    return dict(found)


def _warn_of_noise(old: Mapping[str, Any], path: Path) -> None:
    """Warn where the saved run did not count: a busy machine then makes this one look fast."""
    if old.get("valid") is False:
        reasons = printable("; ".join(map(str, list(old.get("invalid_because") or []))))
        _log.warning("%s was measured on a machine that was not quiet: %s", path, reasons)


def compare(new: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]], path: Path | None) -> list[Comparison]:
    """Return a comparison for every result that both have; raises InputError where they share none."""
    before = {_key(result): result for result in old}
    found = []
    for result in new:
        same = before.get(_key(result))
        if same is None or not same["by_round_ms"] or not result["by_round_ms"]:
            _log.warning("%s has no result of %s to compare with", path, _named(result))
            continue
        if same.get("cpu") != result["cpu"]:
            _log.warning("%s was measured on another CPU: %s", path, same.get("cpu"))
        ratio, (low, high) = change(same["by_round_ms"], result["by_round_ms"])
        interval = (100 * (low - 1), 100 * (high - 1))
        found.append(Comparison(what=_named(result), change_percent=100 * (ratio - 1), interval_percent=interval))
    if not found:
        reason = "it has no result of the same file name, engine, device, precision, batch size, threads and scenario"
        raise InputError("cannot compare", file=path, reason=reason, remedy="measure with the options of that run")
    return found


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return (Path(result["model"]).name, result.get("device_name"), *(result[name] for name in _SAME))


def _named(result: Mapping[str, Any]) -> str:
    name, engine, batch, threads = Path(result["model"]).name, result["engine"], result["batch_size"], result["threads"]
    on = f" on {result['device_name']}" if "device_name" in result else ""
    return f"{name} in {engine}{on}, batch {batch}, {threads} {'thread' if threads == 1 else 'threads'}"
