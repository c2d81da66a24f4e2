"""A program that stands in for `adb`, whose devices are folders of this machine: for tests where no SSH server is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

# What `adb` does for us: a shell whose stdin, stdout and stderr pass through, and copies. Of a shell it takes text.
_ADB = """#!/bin/sh
[ "$1" = -s ] || exit 64
serial="$2"; shift 2
[ -d "$DEVICES/$serial" ] || { echo "adb: device '$serial' not found" >&2; exit 1; }
case "$1" in
  shell) [ "$2" = -T ] || exit 64; shift 2; cd / && TMPDIR="$DEVICES/$serial" exec sh -c "$*" ;;
  push) cp -- "$2" "$3" ;;
  *) exit 64 ;;
esac
"""


@dataclass(frozen=True, kw_only=True)
class AdbDevices:
    """Devices by serial number, each with its temp folder."""

    folder: Path

    def left_behind(self) -> list[str]:
        """Return what lies in the devices' temp folders."""
        return sorted(str(path) for device in (self.folder / "devices").iterdir() for path in device.iterdir())

    def vit_edge(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `vit-edge` here, with the devices' Python the one of these tests."""
        command = [sys.executable, "-m", "vit_edge", *map(str, arguments), "--python", sys.executable]
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "DEVICES": str(self.folder / "devices"), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
        )


def make_devices(folder: Path, *serials: str) -> AdbDevices:
    """Return devices of these serial numbers, reached by an `adb` of their own."""
    program = folder / "bin" / "adb"
    program.parent.mkdir(parents=True)
    program.write_text(_ADB)
    program.chmod(0o755)
    for serial in serials:
        (folder / "devices" / serial).mkdir(parents=True)
    return AdbDevices(folder=folder)
