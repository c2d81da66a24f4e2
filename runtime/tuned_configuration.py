"""What `vit-edge tune` found fastest, by file and machine: written by it, read by loads that leave the choice open.

A verdict counts for the same bytes, the same releases of the engines, the same CPU and as many usable threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from vit_edge.cache import recall, remember
from vit_edge.files import sha256_hex
from vit_edge.machine.cpu import MOST_THREADS, cpu_name, instruction_set, usable_threads
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.checks.golden import promised
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines, installed_version

__all__ = ["Verdict", "leave_verdict", "promised_engines", "verdict_for"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The engine and number of threads that answered one image soonest, and the median latency it had."""

    engine: str
    threads: int
    p50_ms: float

    def apply(self, options: EngineOptions) -> tuple[str, EngineOptions]:
        """Return the engine, and the options with its threads where none were asked for."""
        return self.engine, replace(options, threads=options.threads or self.threads)


def promised_engines(model: ModelFile) -> tuple[str, ...]:
    """Return the installed engines whose answers the file promises, in the order of "auto"."""
    return tuple(name for name in installed_engines() if name in promised(model.manifest))


def verdict_for(model: ModelFile) -> Verdict | None:
    """Return the verdict for this file on this machine; None where there is none, or one for an engine not promised."""
    found = recall("tuning", _key(model))
    try:
        verdict = Verdict(**found) if found else None
    except TypeError:
        return None
    if verdict is None or verdict.engine not in promised_engines(model):
        return None
    return verdict if isinstance(verdict.threads, int) and 1 <= verdict.threads <= MOST_THREADS else None


def leave_verdict(model: ModelFile, verdict: Verdict) -> bool:
    """Keep the verdict; returns whether that was possible."""
    value: dict[str, Any] = {"engine": verdict.engine, "threads": verdict.threads, "p50_ms": verdict.p50_ms}
    return remember("tuning", _key(model), value)


def _key(model: ModelFile) -> str:
    engines = {name: installed_version(name) for name in installed_engines()}
    parts = [model.sha256, engines, cpu_name(), instruction_set(), usable_threads()]
    return sha256_hex(json.dumps(parts, sort_keys=True).encode())
