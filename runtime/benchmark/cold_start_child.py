"""Run as a process of its own: load a model file, answer once, and print how long it took and the memory it needed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

__all__ = ["main"]


def main(path: str, options: str, batch_size: str) -> None:
    """Print `load_ms` (file to first answer), `answered_at` (time.time) and `peak_rss_bytes`, as JSON.

    `options` are the arguments of `load`, as JSON.
    """
    started = time.perf_counter()
    # Imported here: what a user waits for includes them.
    from vit_edge.runtime.checks.golden import golden_images
    from vit_edge.runtime.loading import load

    with load(path, sandbox="never", **json.loads(options)) as classifier:
        height, width = classifier.manifest.preprocessing.crop
        classifier.run(golden_images(range(int(batch_size)), height=height, width=width))
    found = {"load_ms": (time.perf_counter() - started) * 1000, "answered_at": time.time()}
    print(json.dumps({**found, "peak_rss_bytes": _peak_rss_bytes()}))


def _peak_rss_bytes() -> int:
    try:
        # ru_maxrss would start at what the parent had when it forked.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
    except (OSError, StopIteration, ValueError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


if __name__ == "__main__":
    main(*sys.argv[1:])
