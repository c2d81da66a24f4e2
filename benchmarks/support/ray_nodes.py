"""A Ray cluster of two nodes on this machine, commands that run on it, and what their processes hold of the memory."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORT = 6390
_PATIENCE_S = 600
_MB = 1e6


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of all processes of the cluster."""
    token = folder / "token"
    if not token.exists():
        token.write_text(secrets.token_hex(32))
    # A loaded machine needs longer than Ray's 30 seconds to start a node.
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_raylet_start_wait_time_s": "240"}
    return {**os.environ, **ray, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


class Node:
    """A node with one CPU: `ray start --block`, the first one with `--head`."""

    def __init__(self, folder: Path, *, head: bool = False) -> None:
        where = ["--head", f"--port={PORT}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
        where = where if head else [f"--address=127.0.0.1:{PORT}"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *where, "--num-cpus=1", "--block"]
        # A loaded machine needs longer than the 15 seconds that a raylet waits for agents to find ports of their own.
        agents = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent", "metrics-export")
        ports = enumerate(agents, start=PORT + (10 if head else 20))
        command += [f"--{name}-port={port}" for port, name in ports]
        command += ["--object-store-memory=200000000", "--disable-usage-stats"]
        self._folder, self._command = folder, command
        with (folder / f"node-{'head' if head else 'other'}.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill the raylet, as a machine that loses its power: nothing is told to the others."""
        raylet = next(pid for pid in _below(self._process.pid) if b"/raylet/raylet" in _command_line(pid))
        os.kill(raylet, signal.SIGKILL)

    def end(self) -> None:
        """End the node with all its processes."""
        started = _below(self._process.pid)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        for pid in (self._process.pid, *started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def wait_for_nodes(folder: Path, count: int) -> None:
    """Return when so many nodes are there."""
    code = f"import ray; ray.init('127.0.0.1:{PORT}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True, check=False
        )
        if done.stdout.split()[-1:] == [str(count)]:
            return
        time.sleep(2)
    raise SystemExit(f"the cluster did not get {count} nodes: {done.stderr[-500:]}")


@dataclass(kw_only=True)
class Memory:
    """The largest resident memory of the command and of any actor in MB."""

    driver: float = 0.0
    actor: float = 0.0

    def sample(self, driver: int) -> None:
        """Look at the processes now."""
        self.driver = max(self.driver, _resident_mb(driver))
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if _command_line(pid).startswith(b"ray::MapWorker(Map(_Actor"):
                self.actor = max(self.actor, _resident_mb(pid))


@dataclass(kw_only=True)
class Job:
    """A command of vit-edge that runs on the cluster."""

    folder: Path
    arguments: Sequence[object]
    memory: Memory = field(default_factory=Memory)

    def start(self) -> subprocess.Popen[str]:
        """Start the command."""
        command = [sys.executable, "-m", "vit_edge", *map(str, self.arguments), "--json", "--ray", f"127.0.0.1:{PORT}"]
        return subprocess.Popen(
            command, env=environment(self.folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self) -> dict[str, Any]:
        """Run the command to its end, and return what it printed."""
        return self.finish(self.start())

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait for the command while its memory is sampled, and return what it printed."""
        ended = threading.Event()
        sampling = threading.Thread(target=self._sample, args=(process.pid, ended))
        sampling.start()
        out, error = process.communicate()
        ended.set()
        sampling.join()
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, self.arguments))}: {error[-2000:]}")
        found: dict[str, Any] = json.loads(out)
        return found

    def _sample(self, driver: int, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            with contextlib.suppress(OSError):
                self.memory.sample(driver)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Start a cluster of two nodes; whoever kills one puts another in its place in the list."""
    nodes = [Node(folder, head=True)]
    try:
        wait_for_nodes(folder, 1)
        nodes.append(Node(folder))
        wait_for_nodes(folder, 2)
        yield nodes
    finally:
        for node in reversed(nodes):
            node.end()


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[str]) -> int:
    """Return how many shards are written, once there are so many."""
    while (found := len(list(out.glob("part-*.parquet")))) < count:
        if process.poll() is not None:
            raise SystemExit(f"the job ended before it had {count} shards: {process.communicate()[1][-1000:]}")
        time.sleep(0.05)
    return found


def _below(pid: int) -> list[int]:
    """Return the processes that this one and those below it started."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                child = int(path.parent.name)
                found += [child, *_below(child)]
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MB
