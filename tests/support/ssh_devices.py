"""A real OpenSSH server on loopback, as the user who runs the tests: the device that they have."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class SshDevice:
    """A server with its keys; `config` is what a user would have in ~/.ssh/config, `temp` the device's temp folder."""

    folder: Path
    port: int
    server: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def temp(self) -> Path:
        return self.folder / "temp"

    def left_behind(self, *, seconds: float = 15) -> list[str]:
        """Return what lies in the device's temp folder once it is empty, or after so many seconds."""
        end = time.monotonic() + seconds
        while os.listdir(self.temp) and time.monotonic() < end:
            time.sleep(0.1)
        return os.listdir(self.temp)

    def cut_off(self) -> None:
        """Kill the processes of the connections, as a network that goes away would end them."""
        for pid in children(self.server.pid):
            for process in (*children(pid), pid):
                if b"sshd" in Path(f"/proc/{process}/cmdline").read_bytes():
                    os.kill(process, signal.SIGKILL)

    def vit_edge(
        self, *arguments: str | Path, python: str | Path = sys.executable, config: str = "config", on: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `vit-edge` here, with the device's Python the one of these tests."""
        process = self.start(*arguments, python=python, config=config, on=on)
        printed, told = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, printed, told)

    def start(
        self, *arguments: str | Path, python: str | Path = sys.executable, config: str = "config", on: bool = True
    ) -> subprocess.Popen[str]:
        """Start what `vit_edge` runs."""
        where = ["--on", self.address] if on else []
        command = [sys.executable, "-m", "vit_edge", *map(str, arguments), *where, "--python", str(python)]
        environment = {**os.environ, "VIT_EDGE_SSH_CONFIG": str(self.folder / config), "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def children(pid: int) -> list[int]:
    """Return the child processes of one."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def start_device(folder: Path) -> SshDevice:
    """Start a server with keys made for it; skips where OpenSSH is not installed."""
    found = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("sshd", "ssh", "scp")}
    for name, path in found.items():
        if path is None:
            pytest.skip(f"{name} is not installed (openssh-server, openssh-client)")
    (folder / "temp").mkdir(parents=True)
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nSubsystem sftp internal-sftp\nSetEnv TMPDIR={folder}/temp\nMaxStartups 100\n"
    )
    for known, key in (("known", "host"), ("known_wrong", "other")):
        public = " ".join((folder / f"{key}.pub").read_text().split()[:2])
        (folder / known).write_text(f"[127.0.0.1]:{port} {public}\n")
        (folder / known.replace("known", "config")).write_text(
            f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/{known}\n"
        )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's, which a service would have made
    command = [found["sshd"] or "", "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
    for _ in range(100):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return SshDevice(folder=folder, port=port, server=server)
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text())


def stop_device(device: SshDevice) -> None:
    """End the server and its connections."""
    device.cut_off()
    device.server.terminate()
    device.server.wait()
