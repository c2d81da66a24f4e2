"""Was the machine quiet while something was measured? What others took of it, its frequency, what was throttled."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vit_edge.machine.cpu import usable_threads

__all__ = ["Noise", "Watch"]

_CPUS = Path("/sys/devices/system/cpu")
# The first of each pair is said, the second makes a run invalid.
_OTHERS_CORES = (0.05, 0.25)
_OWN_SHARE = (0.98, 0.90)
_STOLEN_CORES = (0.01, 0.05)
_FREQUENCY_CHANGE = (0.03, 0.10)
_THROTTLED_SHARE = (0.0, 0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """What this process got of the machine while it measured, and what others took; None where the system tells not.

    `other_cores` is what other processes took, on average, of the CPUs this one may use, beyond those it may not fill
    itself; `stolen_cores` what the host took from a virtual machine; `frequency_mhz` the lowest and the highest
    frequency that was seen; `throttled_s` how long the container's quota held this process back; `num_overheated` how
    often a core was throttled for its temperature. With `is_busy` one thread at least is never to wait.
    """

    wall_s: float
    own_cpu_s: float
    load_average: tuple[float, float] | None  # of the last minute, before and after
    other_cores: float | None
    stolen_cores: float | None = None
    frequency_mhz: tuple[float, float] | None = None
    throttled_s: float | None = None
    num_overheated: int | None = None
    is_busy: bool = True

    @property
    def is_quiet(self) -> bool:
        """Return whether one thread had a core for itself and nearly nothing else ran."""
        return not self.said

    @property
    def is_valid(self) -> bool:
        """Return whether it was quiet enough for figures to count."""
        return not self.invalid_because

    @property
    def said(self) -> tuple[str, ...]:
        """Return a sentence for everything that disturbed."""
        return tuple(self._reasons(0))

    @property
    def invalid_because(self) -> tuple[str, ...]:
        """Return a sentence for everything that disturbed so much that the figures do not count."""
        return tuple(self._reasons(1))

    def _reasons(self, level: int) -> Iterator[str]:
        if self.other_cores is not None and self.other_cores >= _OTHERS_CORES[level]:
            yield f"other processes took {self.other_cores:.2f} of a core"
        elif self.other_cores is None and self.load_average and self.load_average[1] >= 1.3 + level:
            yield f"the load average is {self.load_average[1]:.1f}"
        if self.is_busy and self.own_cpu_s < _OWN_SHARE[level] * self.wall_s:
            yield f"this process got a CPU for {100 * self.own_cpu_s / self.wall_s:.0f} % of the time"
        if self.stolen_cores is not None and self.stolen_cores >= _STOLEN_CORES[level]:
            yield f"the host took {self.stolen_cores:.2f} of a core away"
        if self.frequency_mhz is not None:
            low, high = self.frequency_mhz
            if low < (1 - _FREQUENCY_CHANGE[level]) * high:
                yield f"the CPU's frequency went from {high:.0f} down to {low:.0f} MHz"
        if self.throttled_s is not None and self.throttled_s > _THROTTLED_SHARE[level] * self.wall_s:
            yield f"the container's quota held it back for {self.throttled_s:.2f} s"
        if self.num_overheated:
            yield f"cores were throttled for their temperature {self.num_overheated} times"

    def __str__(self) -> str:
        others = "not known" if self.other_cores is None else f"{self.other_cores:.2f} of a core"
        share = f"own CPU time {100 * self.own_cpu_s / self.wall_s:.0f} % of {self.wall_s:.0f} s"
        average = "not known" if self.load_average is None else "{:.1f} to {:.1f}".format(*self.load_average)
        text = f"{share}, other processes {others}, load average {average}"
        return text if self.is_quiet else f"**the machine was not quiet, measure again: {text}**"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return {**asdict(self), "quiet": self.is_quiet, "said": str(self)}


def _own_seconds() -> float:
    """Return the CPU time of this process and of the children that it waited for: they are no others."""
    used = os.times()
    return time.process_time() + used.children_user + used.children_system


class Watch:
    """Watch the machine from now until `stop`; `look` notes the frequency in between."""

    def __init__(self, *, is_busy: bool = True) -> None:
        self._is_busy, self._frequencies = is_busy, list[float]()
        self._average, self._throttled_s, self._overheated = _load_average(), _throttled_s(), _num_overheated()
        self._machine, self._wall_s, self._own_s = _cpu_seconds(), time.perf_counter(), _own_seconds()
        self.look()

    def look(self) -> None:
        """Note the frequency that the CPUs have now, the highest of them."""
        found = _frequencies_mhz()
        if found:
            self._frequencies.append(max(found))

    def stop(self) -> Noise:
        """Return what there was."""
        wall_s, own_s = time.perf_counter() - self._wall_s, _own_seconds() - self._own_s
        self.look()
        others = stolen = None
        machine = _cpu_seconds()
        if machine is not None and self._machine is not None:
            busy_s, stolen_s = (now - before for now, before in zip(machine, self._machine, strict=True))
            others = max(0.0, (busy_s - own_s) / wall_s - _not_ours())
            stolen = stolen_s / wall_s
        averages = (self._average, _load_average())
        return Noise(
            wall_s=wall_s,
            own_cpu_s=own_s,
            load_average=None if None in averages else averages,  # type: ignore[arg-type]
            other_cores=others,
            stolen_cores=stolen,
            frequency_mhz=(min(self._frequencies), max(self._frequencies)) if self._frequencies else None,
            throttled_s=_since(_throttled_s(), self._throttled_s),
            num_overheated=_since(_num_overheated(), self._overheated),
            is_busy=self._is_busy,
        )


def _since(now: Any, before: Any) -> Any:
    return None if now is None or before is None else now - before


def _allowed() -> set[int] | None:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on Windows and macOS
        return None


def _not_ours() -> float:
    """Return the CPUs that this process may run on but not fill: what others do there does it no harm."""
    return max(0, len(_allowed() or ()) - usable_threads())


def _cpu_seconds() -> tuple[float, float] | None:
    """Return how long the CPUs that this process may use were busy, stolen time included, and stolen; or None."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ticks_per_s = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    allowed = {f"cpu{number}" for number in _allowed() or ()}
    busy = stolen = 0
    for line in lines:
        name, *fields = line.split()
        if name in allowed:
            # user nice system idle iowait irq softirq steal: in ticks, proc_stat(5)
            ticks = [int(field) for field in fields[:8]]
            busy += sum(ticks) - ticks[3] - ticks[4]
            stolen += ticks[7]
    return busy / ticks_per_s, stolen / ticks_per_s


def _load_average() -> float | None:
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
        return os.getloadavg()[0]
    return None


def _frequencies_mhz() -> list[float]:
    found = (_number(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    return [kilohertz / 1000 for kilohertz in found if kilohertz is not None]


def _num_overheated() -> int | None:
    found = [_number(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")]
    return int(sum(count for count in found if count is not None)) if found else None


def _throttled_s() -> float | None:
    """Return how long the control group's quota has held its processes back (version 2), or None."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/cpu.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("throttled_usec "):
                return int(line.split()[1]) / 1e6
    return None


def _number(path: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return float(path.read_text(encoding="ascii"))
    return None
