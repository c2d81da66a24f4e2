"""What this process may use of the CPU: threads under the container's quota, and the instructions that matter."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["MOST_THREADS", "cpu_name", "instruction_set", "usable_threads"]

# More than any edge device has; engines hang or crash when asked for 100,000.
MOST_THREADS = 256

# The strongest first: which of these a CPU has decides how INT8 products are computed.
_X86 = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "avx", "sse4_1")
_ARM = ("i8mm", "asimddp", "asimd")


def usable_threads() -> int:
    """Return how many threads can run at once here: the CPUs this process may use, under the container's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        allowed = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(allowed, int(quota))) if quota else max(1, allowed)


def instruction_set() -> str:
    """Return the machine type and the strongest integer instructions of this CPU, such as "x86_64 avx512_vnni"."""
    machine = platform.machine()
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    present = set(flags.split())
    strongest = next((flag for flag in (*_X86, *_ARM) if flag in present), None)
    return f"{machine} {strongest}" if strongest else machine


def cpu_name() -> str:
    """Return the CPU's model name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _cgroup_quota() -> float | None:
    """Return the CPUs that the control group grants (version 2, then 1), or None where it grants all."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="ascii") for n in ("quota", "period"))
        return None if int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None
