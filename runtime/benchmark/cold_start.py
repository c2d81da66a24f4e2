"""What a fresh process needs that loads one model file and answers once: cold start, load time, peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vit_edge.errors import ResourceExhausted, VitEdgeError
from vit_edge.runtime.checks.sandbox import start_of
from vit_edge.runtime.engines.protocol import EngineOptions

__all__ = ["ColdStart", "cold_start"]

_CHILD_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """`cold_start_ms` from the start of the process to its first answer, `load_ms` of that from the file on."""

    cold_start_ms: float
    load_ms: float
    peak_rss_bytes: int


def cold_start(
    path: str, engine: str, options: EngineOptions, batch_size: int, *, third_party: Mapping[str, Any]
) -> ColdStart:
    """Return what a fresh process needed; raises VitEdgeError where it failed, ResourceExhausted where it hung.

    `third_party` has the arguments of `load` for a third-party ONNX model.
    """
    arguments = {
        **third_party,
        "engine": engine,
        "threads": options.num_threads,
        "device": options.device,
        "float_precision": options.float_precision,
    }
    command = [
        sys.executable,
        "-c",
        start_of("vit_edge.runtime.benchmark.cold_start_child"),
        path,
        json.dumps(arguments),
        str(batch_size),
    ]
    started = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        reason = f"a fresh process took over {_CHILD_TIMEOUT_S} s"
        raise ResourceExhausted(
            "cannot measure the cold start", file=path, reason=reason, remedy="try again"
        ) from error
    if done.returncode != 0:
        reason = f"a fresh process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        raise VitEdgeError("cannot measure the cold start", file=path, reason=reason, remedy="run it again")
    found = json.loads(done.stdout)
    return ColdStart(
        cold_start_ms=(found["answered_at"] - started) * 1000,
        load_ms=found["load_ms"],
        peak_rss_bytes=found["peak_rss_bytes"],
    )
