"""Energy meters that machines have: RAPL of x86 CPUs, the INA3221 of NVIDIA's Jetson boards."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["JetsonMeter", "Meter", "RaplMeter", "open_meter"]

_SYS = Path("/sys")
# The INA3221 averages over some milliseconds; asking more often costs the CPU that is measured more than it tells.
_INTERVAL_S = 0.05


class Meter(Protocol):
    """Something that counts energy; `name` says what of the machine it sees."""

    name: str

    def joules(self) -> float:
        """Return the energy used since the meter was opened."""
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


class RaplMeter:
    """The energy of the CPU packages, as the processor itself counts it (Linux powercap, intel-rapl; AMD too)."""

    def __init__(self, packages: Sequence[Path]) -> None:
        self.name = "RAPL, CPU packages"
        self._packages = list(packages)
        self._last = [_read(package / "energy_uj") for package in packages]
        # The counter begins anew at this value (powercap.rst).
        self._ranges = [_read(package / "max_energy_range_uj") for package in packages]
        self._microjoules = 0

    def joules(self) -> float:
        """Return the energy used since the meter was opened, for whichever process."""
        now = [_read(package / "energy_uj") for package in self._packages]
        for later, sooner, full in zip(now, self._last, self._ranges, strict=True):
            self._microjoules += later - sooner if later >= sooner else later + full - sooner
        self._last = now
        return self._microjoules / 1e6

    def close(self) -> None:
        """Do nothing: nothing was opened."""


class JetsonMeter:
    """The energy of the whole board: the power at its input, asked twenty times a second and added up."""

    def __init__(self, volts: Path, amperes: Path, name: str) -> None:
        self.name = f"INA3221, {name}"
        self._volts, self._amperes, self._joules = volts, amperes, 0.0
        self._last, self._lock, self._stop = time.perf_counter(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._count, name="vit-edge-energy", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Return the energy used since the meter was opened."""
        with self._lock:
            now = time.perf_counter()
            watts = _read(self._volts) * _read(self._amperes) / 1e6  # millivolts and milliamperes (hwmon sysfs)
            self._joules += watts * (now - self._last)
            self._last = now
            return self._joules

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join()

    def _count(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.joules()


def open_meter(sys: Path = _SYS) -> tuple[Meter | None, str]:
    """Return this machine's meter and its name, or None and why there is none; `sys` is where sysfs is mounted."""
    packages = sorted((sys / "class/powercap").glob("intel-rapl:[0-9]*"))
    packages = [package for package in packages if package.name.count(":") == 1]  # a package, not a part of one
    try:
        if packages:
            rapl = RaplMeter(packages)
            return rapl, rapl.name
        found = _input_of_board(sys)
        if found is not None:
            jetson = JetsonMeter(*found)
            return jetson, jetson.name
    except (OSError, ValueError) as error:
        denied = isinstance(error, PermissionError)
        why = "only root may read the energy counter" if denied else f"the energy counter cannot be read: {error}"
        return None, f"not available: {why}"
    return None, "not available: this machine has no meter that is known"


def _input_of_board(sys: Path) -> tuple[Path, Path, str] | None:
    """Return the files of the voltage and the current of the board's input, and its label."""
    for label in sorted((sys / "bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*/in[0-9]_label")):
        with contextlib.suppress(OSError):
            name = label.read_text(encoding="ascii").strip()
            if name.upper().replace("_", "").startswith(("VDDIN", "POMVDDIN", "POM5VIN")):
                number = label.name[2]
                return label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"), name
    return None


def _read(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
