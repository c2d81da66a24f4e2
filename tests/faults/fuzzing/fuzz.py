"""`python -m tests.faults.fuzzing.fuzz --mutants N --seed S`: hand seeded mutants to vit-edge, and class each result.

Right: the mutant was loaded and gives what the original does, or was refused by one error with an exit code. Wrong: the
process died, took over 20 s of CPU or 1.5 GB, showed a traceback, or gave other logits in silence. The same numbers
give the same mutants: `--only NUMBER` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tests.conftest import ROOT
from vit_edge.cli.output import make_table

__all__ = ["Found", "fuzz", "main"]

MOST_S, MOST_BYTES = 20.0, 1_500_000_000
# A subprocess that says nothing for so long is killed: its mutant hangs.
_PATIENCE_S = 600.0
# Mutants of one subprocess: engines leave a little behind at each start.
_BATCH = 500


@dataclass(kw_only=True, slots=True)
class Found:
    """How many mutants of each kind were run, and the wrong ones: number, kind, what happened."""

    ran: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_bytes: int = 0

    def add(self, line: bytes) -> int:
        """Add what a subprocess printed about one mutant; return its number."""
        number, kind, wrong, seconds, peak = json.loads(line)
        self.ran[kind] += 1
        self.slowest_s, self.largest_bytes = max(self.slowest_s, seconds), max(self.largest_bytes, peak)
        for is_wrong, text in (
            (wrong, wrong),
            (seconds > MOST_S, f"slow: {seconds:.1f} s"),
            (peak > MOST_BYTES, f"memory: {peak / 1e9:.2f} GB"),
        ):
            if is_wrong:
                self.wrong.append((number, kind, text))
        return int(number)


def fuzz(seeds: Path, *, first: int, mutants: int, seed: int, workers: int = 2) -> Found:
    """Return what mutants `first` to `first + mutants` do; `seeds` is the folder of the valid files."""
    found = Found()
    parts = [(start, min(start + _BATCH, first + mutants)) for start in range(first, first + mutants, _BATCH)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda part: _run(found, seeds, seed, *part), parts))
    found.wrong.sort()
    return found


def _run(found: Found, seeds: Path, seed: int, start: int, end: int) -> None:
    """Run mutants in a subprocess; if it dies or hangs, go on in another with the next mutant."""
    while start < end:
        with tempfile.TemporaryDirectory(prefix="vit-edge-fuzz-") as work:
            how, last = _one_process(found, seeds, seed, start, end, Path(work))
        if last >= end - 1 and how == 0:
            return
        at = last + 1
        if at < end:
            found.ran["(none: the process ended)"] += 1
            found.wrong.append((at, "(unknown)", f"the process {how}"))
        start = at + 1


def _one_process(found: Found, seeds: Path, seed: int, start: int, end: int, work: Path) -> tuple[str | int, int]:
    """Return how the subprocess ended, and the number of the last mutant that it finished."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.faults.fuzzing.fuzz",
        "--child",
        seeds,
        work,
        start,
        end,
        "--seed",
        seed,
    ]
    environment = {**os.environ, "VIT_EDGE_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1", "TMPDIR": str(work)}
    with (work / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        )
    last = start - 1
    try:
        for line in _lines(process):
            if line.startswith(b"["):
                last = found.add(line)
        code = process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"said nothing for {_PATIENCE_S:g} s", last
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return (0 if code == 0 else f"ended with {code}: {(work / 'stderr').read_text(errors='replace')[-300:]}"), last


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield lines as they come, none of them buffered; raises TimeoutExpired if none comes for long."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    while True:
        if not selector.select(_PATIENCE_S):
            raise subprocess.TimeoutExpired(process.args, _PATIENCE_S)
        line = process.stdout.readline()
        if not line:
            return
        yield line


def _child(seeds: Path, work: Path, start: int, end: int, seed: int) -> None:
    """Run mutants in this process; print one line for each."""
    from tests.faults.fuzzing.fuzz_targets import run_one
    from tests.faults.fuzzing.sandbox_server import SandboxServer
    from vit_edge.runtime.checks import sandbox

    server = SandboxServer(work)
    sandbox.subprocess = server  # type: ignore[assignment]
    logging.getLogger("vit_edge").addHandler(logging.NullHandler())
    stdout = sys.stdout
    for number in range(start, end):
        _reset_peak()
        started = _cpu_s() + server.cpu_s
        kind, wrong = run_one(number, seed, seeds, work)
        line = json.dumps([number, kind, wrong, _cpu_s() + server.cpu_s - started, _peak_bytes()])
        stdout.write(f"{line}\n")
        stdout.flush()
    os._exit(0)  # what an engine does at its end is another matter


def _cpu_s() -> float:
    """Return the CPU time of this process and of its children: on a busy machine the clock says nothing."""
    return sum(os.times()[:4])


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the mutants, print the table and what is wrong; return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=Path, help="folder of valid files; made if it is not there")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        seeds, work, start, end = given.child
        _child(Path(seeds), Path(work), int(start), int(end), given.seed)
    with tempfile.TemporaryDirectory(prefix="vit-edge-seeds-") as temporary:
        seeds = given.seeds or Path(temporary) / "seeds"
        if not seeds.exists():
            _make_seeds(seeds, Path(temporary))
        first, count = (given.first, given.mutants) if given.only is None else (given.only, 1)
        started = time.monotonic()
        found = fuzz(seeds, first=first, mutants=count, seed=given.seed, workers=given.workers)
    _show(found, time.monotonic() - started)
    return 1 if found.wrong else 0


def _make_seeds(seeds: Path, temporary: Path) -> None:
    from tests.faults.fuzzing.fuzz_targets import make_seeds
    from tests.support.deployments import make_deployment

    for folder in (seeds, temporary / "deployment"):
        folder.mkdir()
    make_seeds(seeds, make_deployment(temporary / "deployment"))


def _show(found: Found, seconds: float) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    wrong = Counter(kind for _, kind, _ in found.wrong)
    rows = [(kind, str(count), str(wrong[kind])) for kind, count in sorted(found.ran.items())]
    console.print(make_table("", ("mutants of", "run", "wrong"), rows))
    for number, kind, text in found.wrong:
        console.print(f"{number} {kind}: {text}")
    largest = f"at most {found.slowest_s:.1f} s of CPU and {found.largest_bytes / 1e9:.2f} GB each"
    console.print(f"{sum(found.ran.values())} mutants in {seconds:.0f} s, {len(found.wrong)} wrong; {largest}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
