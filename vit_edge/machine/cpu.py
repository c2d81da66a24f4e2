"""What this process may use of the CPU: threads under the container's quota, and the instructions that matter."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "MOST_THREADS",
    "VNNI",
    "Instructions",
    "cpu_name",
    "cpu_report",
    "instruction_set",
    "instructions",
    "is_arm",
    "is_x86",
    "usable_threads",
]

# Where the system's own files begin.
_ROOT = Path("/")
# More than any edge device has; engines hang or crash when asked for 100,000.
MOST_THREADS = 256

# Any of these sums four products of 8 bits in 32 bits; x86 without them sums pairs in 16 bits and saturates.
VNNI = ("amx_int8", "avx512_vnni", "avx_vnni")
# The strongest first: which of these a CPU has decides how INT8 products are computed.
_X86 = (*VNNI, "avx512bw", "avx2", "avx", "sse4_1")
_ARM = ("i8mm", "asimddp", "asimd")
# What else a person asks for: bfloat16, float16, wider vectors, products of signed by signed.
_REPORTED = (
    *_X86,
    *_ARM,
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
    "avx_vnni_int8",
    "fma",
    "f16c",
    "bf16",
    "asimdhp",
    "sve",
)

# numpy asks the processor itself; its names for ours. It knows nothing of AMX, AVX-VNNI and I8MM.
_OF_NUMPY = {
    "AVX512VNNI": "avx512_vnni",
    "AVX512F": "avx512f",
    "AVX512BW": "avx512bw",
    "AVX512BF16": "avx512_bf16",
    "AVX2": "avx2",
    "AVX": "avx",
    "FMA3": "fma",
    "F16C": "f16c",
    "SSE41": "sse4_1",
    "ASIMD": "asimd",
    "ASIMDDP": "asimddp",
    "ASIMDHP": "asimdhp",
    "SVE": "sve",
}
# What Linux on ARM says in place of a name (util-linux, lscpu-arm.c): the cores of boards that people have.
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd4f": "Neoverse-V2",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Instructions:
    """The instructions this process was found to have; `complete` is whether others would have been found too."""

    names: frozenset[str]
    complete: bool


def usable_threads() -> int:
    """Return how many threads can run at once here: the CPUs this process may use, under the container's quota."""
    quota = _cgroup_quota()
    return max(1, min(_allowed_cpus(), int(quota))) if quota else _allowed_cpus()


def instructions() -> Instructions:
    """Return the instructions of the CPU that this process runs on, an emulated one too.

    Linux lists them all. Under an emulator the list is that of the host, so where the processor itself denies one of
    them (numpy asks it), only what it affirms counts. Elsewhere numpy's view is all there is; on x86 it lacks AVX-VNNI.
    """
    listed = frozenset(_cpuinfo("flags" if is_x86() else "Features").split())
    affirmed, denied = _asked_by_numpy()
    if not listed:
        return Instructions(names=affirmed, complete=not is_x86())
    return Instructions(names=affirmed if listed & denied else listed, complete=True)


def instruction_set() -> str:
    """Return the machine type and the strongest integer instructions of this CPU, such as "x86_64 avx512_vnni"."""
    machine, present = platform.machine(), instructions().names
    strongest = next((flag for flag in (*_X86, *_ARM) if flag in present), None)
    return f"{machine} {strongest}" if strongest else machine


def cpu_name() -> str:
    """Return the CPU's model name as the system gives it; on ARM, that of its first core."""
    core = _ARM_CORES.get(_cpuinfo("CPU part")) if is_arm() else None
    return _cpuinfo("model name") or core or platform.processor() or platform.machine()


def is_x86(machine: str | None = None) -> bool:
    """Return whether a machine type, by default this one's, is x86."""
    return (machine or platform.machine()).lower() in ("x86_64", "amd64", "i386", "i686", "x86")


def is_arm(machine: str | None = None) -> bool:
    """Return whether a machine type, by default this one's, is ARM."""
    return (machine or platform.machine()).lower().startswith(("aarch64", "arm"))


def cpu_report() -> dict[str, Any]:
    """Return the CPU as JSON-ready values: what `vit-edge doctor` prints and `--target FILE.json` reads."""
    found = instructions()
    return {
        "name": cpu_name(),
        "machine": platform.machine(),
        "board": _text(Path("/proc/device-tree/model")).rstrip("\0") or None,
        "instruction_set": instruction_set(),
        "instructions": [name for name in _REPORTED if name in found.names],
        "instructions_complete": found.complete,
        "cpus": os.cpu_count() or 1,
        "allowed_cpus": _allowed_cpus(),
        "quota_cpus": _cgroup_quota(),
        "usable_threads": usable_threads(),
        "governors": sorted({_text(path).strip() for path in _governor_files()} - {""}),
    }


def _asked_by_numpy() -> tuple[frozenset[str], frozenset[str]]:
    """Return what the processor affirms and what it denies, of what numpy asks it; nothing where that is not known."""
    if os.environ.get("NPY_DISABLE_CPU_FEATURES"):  # then its answers are no longer the processor's
        return frozenset(), frozenset()
    try:
        asked = importlib.import_module("numpy._core._multiarray_umath")
    except ModuleNotFoundError:  # numpy before 2
        asked = importlib.import_module("numpy.core._multiarray_umath")
    answers: dict[str, bool] = getattr(asked, "__cpu_features__", {})
    known = {ours: answers[theirs] for theirs, ours in _OF_NUMPY.items() if theirs in answers}
    return frozenset(n for n, has in known.items() if has), frozenset(n for n, has in known.items() if not has)


def _allowed_cpus() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


def _governor_files() -> list[Path]:
    return sorted(Path("/sys/devices/system/cpu/cpufreq").glob("policy*/scaling_governor"))


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _cpuinfo(key: str) -> str:
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _cgroup_quota() -> float | None:
    """Return the CPUs that the control groups of this process grant (version 2 and 1), or None where they grant all.

    A quota may be that of the container, which its own tree has at the top, or of a service, further down; the least of
    all above this process counts.
    """
    granted = [quota for folder in _cgroup_folders() if (quota := _quota_of(folder)) is not None]
    return min(granted, default=None)


def _cgroup_folders() -> Iterator[Path]:
    """Yield the folder of each control group that this process is in, and of those above."""
    mounts = _ROOT / "sys" / "fs" / "cgroup"
    lines = [line.split(":", 2) for line in _text(_ROOT / "proc" / "self" / "cgroup").splitlines()]
    by_controllers = {controllers: path for _, controllers, path in (line for line in lines if len(line) == 3)}
    own = {name: path for controllers, path in by_controllers.items() for name in controllers.split(",")}
    for name, tops in (("", (mounts, mounts / "unified")), ("cpu", (mounts / "cpu", mounts / "cpu,cpuacct"))):
        path = Path(own.get(name, "/"))
        inner = path.relative_to("/") if path.is_absolute() and ".." not in path.parts else Path()
        for top in tops:
            yield from (top / part for part in (inner, *inner.parents))


def _quota_of(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="ascii") for n in ("quota", "period"))
        return None if int(quota) <= 0 else int(quota) / int(period)
    return None
