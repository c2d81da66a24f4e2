"""The fastest engine and number of threads for a file on this machine: `vit-edge tune` writes it, `load` reads it.

A tuned configuration applies to the same bytes, the same engine releases, the same CPU and as many usable threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from vit_edge.cache import recall, remember
from vit_edge.files import sha256_hex
from vit_edge.machine.cpu import MOST_THREADS, cpu_name, instruction_set, usable_threads
from vit_edge.machine.targets import TARGETS, target_name
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.checks.golden import promised
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines, installed_version

__all__ = ["TunedConfiguration", "promised_engines", "save_configuration", "tuned_configuration"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedConfiguration:
    """The engine and the number of threads with the lowest latency for one image, and that median latency."""

    engine: str
    threads: int
    p50_ms: float

    def apply(self, options: EngineOptions) -> tuple[str, EngineOptions]:
        """Return the engine, and the options with its threads unless the options name some."""
        return self.engine, replace(options, threads=options.threads or self.threads)


def promised_engines(model: ModelFile) -> tuple[str, ...]:
    """Return the installed engines that the file was validated in, in the order of "auto": its target's first."""
    found = [name for name in installed_engines() if name in promised(model.manifest)]
    wanted = TARGETS.get(target_name(model.manifest.quantization) or "")
    return tuple(sorted(found, key=lambda name: wanted is not None and name not in wanted.engines))


def tuned_configuration(model: ModelFile) -> TunedConfiguration | None:
    """Return the saved configuration for this file here; None if there is none for an engine it was validated in."""
    found = recall("tuning", _key(model))
    try:
        configuration = TunedConfiguration(**found) if found else None
    except TypeError:
        return None
    if configuration is None or configuration.engine not in promised_engines(model):
        return None
    return (
        configuration if isinstance(configuration.threads, int) and 1 <= configuration.threads <= MOST_THREADS else None
    )


def save_configuration(model: ModelFile, configuration: TunedConfiguration) -> bool:
    """Save the configuration; returns whether that was possible."""
    value: dict[str, Any] = {
        "engine": configuration.engine,
        "threads": configuration.threads,
        "p50_ms": configuration.p50_ms,
    }
    return remember("tuning", _key(model), value)


def _key(model: ModelFile) -> str:
    engines = {name: installed_version(name) for name in installed_engines()}
    parts = [model.sha256, engines, cpu_name(), instruction_set(), usable_threads()]
    return sha256_hex(json.dumps(parts, sort_keys=True).encode())
