"""How bytes reach a device: one small class for each way, over the system's own programs.

`ssh` and `scp` are those of the system, so keys, agents, `~/.ssh/config` and jump hosts work as they do for a person.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import SplitResult, urlsplit

from vit_edge.errors import EngineUnavailable, MissingExtra, UsageError, printable
from vit_edge.files import temporary_folder

__all__ = ["Adb", "Ssh", "Transport", "open_transport"]

# A person who wants another file than ~/.ssh/config gives it here.
CONFIG_VARIABLE = "VIT_EDGE_SSH_CONFIG"
_CONNECT_S, _ALIVE_S, _ALIVE_COUNT = 15, 5, 3
_LONGEST_SOCKET = 90
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\+-]*")
_SERIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
# What ssh says -> what to do about it; the first that fits.
_REMEDIES = (
    ("Host key verification failed", "connect once by `ssh` and compare the key, or remove an old one: ssh-keygen -R"),
    ("Permission denied", "let your key in: ssh-copy-id"),
    ("Connection refused", "start the SSH server there, or give its port: ssh://user@host:port"),
    ("Could not resolve", "check the name of the host"),
    ("Connection closed", "check that the device is on, and run it again"),
)


class Transport(Protocol):
    """A way to a device: start a command there, copy a file there, end."""

    address: str

    def start(self, command: Sequence[str], *, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Return a process whose stdin and stdout are those of the command there; every argument arrives as it is."""

    def copy_to(self, source: Path, target: str, *, seconds: float) -> None:
        """Copy a file to a path there; raises EngineUnavailable."""

    def failure(self, what: str, stderr: str) -> EngineUnavailable:
        """Return the error for what the transport's program printed on stderr."""

    def close(self) -> None:
        """End the connection, and remove what it needed here."""


def open_transport(address: str) -> Transport:
    """Return the transport for `ssh://[user@]host[:port]` or `adb://SERIAL`; raises UsageError, MissingExtra."""
    parts = urlsplit(address)
    if parts.path or parts.query or parts.fragment or parts.password or parts.scheme not in ("ssh", "adb"):
        raise _bad_address(address)
    if parts.scheme == "adb":
        if not _SERIAL.fullmatch(parts.netloc):
            raise _bad_address(address)
        return Adb(address, parts.netloc)
    return Ssh(address, *_checked(address, parts))


class Ssh:
    """A device over SSH: one connection, which all commands and copies share where the system's ssh can."""

    def __init__(self, address: str, host: str, user: str | None, port: int | None) -> None:
        self.address, self._host, self._user, self._port = address, host, user, port
        self._ssh, self._scp = _program("ssh", address), _program("scp", address)
        self._closing = contextlib.ExitStack()
        self._folder = Path(self._closing.enter_context(temporary_folder()))
        self._master = True

    def start(self, command: Sequence[str], *, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Return the command's process; the first one is the connection that later ones share."""
        port = ["-p", str(self._port)] if self._port else []
        # Not `exec`: some login shells have none.
        line = [self._ssh, "-T", *self._options(), *port, "--", self._host, shlex.join(command)]
        self._master = False
        return _start(line, stderr)

    def copy_to(self, source: Path, target: str, *, seconds: float) -> None:
        """Copy by scp; where the server has no SFTP, by the old protocol."""
        port = ["-P", str(self._port)] if self._port else []
        host = f"[{self._host}]" if ":" in self._host else self._host
        line = [*self._options(), *port, "--", str(source.absolute()), f"{host}:{target}"]
        stderr = _copied([self._scp, "-q", *line], seconds)
        if stderr and re.search("sftp|subsystem|Connection closed", stderr, flags=re.IGNORECASE):
            stderr = _copied([self._scp, "-q", "-O", *line], seconds)
        if stderr is not None:
            raise self.failure("cannot copy to the device", stderr)

    def failure(self, what: str, stderr: str) -> EngineUnavailable:
        """Return the error for what ssh printed on stderr."""
        lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("Warning:")]
        known = [(text, line, remedy) for text, remedy in _REMEDIES for line in lines if text in line]
        if known:
            _, reason, remedy = known[0]
        else:
            reason, remedy = (lines[-1] if lines else "the connection ended"), "check that the device is on"
        remedy = f"{remedy} {self._host}" if remedy.endswith(("-R", "copy-id")) else remedy
        named = "" if self.address in what else f"{self.address}: "
        return EngineUnavailable(what, reason=f"{named}{printable(reason)}", remedy=remedy)

    def close(self) -> None:
        """Remove the folder of the shared connection; it ended with its first command."""
        self._closing.close()

    def _options(self) -> list[str]:
        config = os.environ.get(CONFIG_VARIABLE)
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(_CONNECT_S),
            "ServerAliveInterval": str(_ALIVE_S),
            "ServerAliveCountMax": str(_ALIVE_COUNT),
            "LogLevel": "ERROR",
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
        }
        if self._user:
            options["User"] = self._user
        socket = self._folder / "%C"
        if len(str(self._folder)) + 42 < _LONGEST_SOCKET:
            options |= {"ControlMaster": "yes" if self._master else "no", "ControlPath": str(socket)}
            options["ControlPersist"] = "no"
        named = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["-F", config, *named] if config else named


class Adb:
    """An Android device over adb, with a Python in its shell's PATH; unverified: never run on one."""

    def __init__(self, address: str, serial: str) -> None:
        self.address, self._serial, self._adb = address, serial, _program("adb", address)

    def start(self, command: Sequence[str], *, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Return the command's process, without a terminal in between, which would change bytes."""
        return _start([self._adb, "-s", self._serial, "shell", "-T", shlex.join(command)], stderr)

    def copy_to(self, source: Path, target: str, *, seconds: float) -> None:
        """Copy by `adb push`."""
        stderr = _copied([self._adb, "-s", self._serial, "push", str(source.absolute()), target], seconds)
        if stderr is not None:
            raise self.failure("cannot copy to the device", stderr)

    def failure(self, what: str, stderr: str) -> EngineUnavailable:
        """Return the error for what adb printed on stderr."""
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        reason = f"{self.address}: {printable(lines[-1]) if lines else 'the connection ended'}"
        return EngineUnavailable(what, reason=reason, remedy="see `adb devices`")

    def close(self) -> None:
        """Do nothing: adb keeps its own connection."""


def _start(line: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for us, who then end the other side in order.
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True)


def _copied(line: Sequence[str], seconds: float) -> str | None:
    """Return None if the copy succeeded, else what the program printed on stderr."""
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"the copy was not done in {seconds:g} seconds"
    finally:
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
    return None if process.returncode == 0 else stderr.decode("utf-8", errors="replace") or "the copy failed"


def _checked(address: str, parts: SplitResult) -> tuple[str, str | None, int | None]:
    """Return host, user and port; nothing that ssh could take for an option or a shell for more than a name."""
    try:
        host, user, port = parts.netloc.rpartition("@")[2], parts.username, parts.port
    except ValueError as error:
        raise _bad_address(address) from error
    host = host.rpartition(":")[0] if port is not None else host  # as written: hostname would lower its case
    host = host.removeprefix("[").removesuffix("]").removesuffix(":")
    if not _HOST.fullmatch(host) or (user is not None and not _USER.fullmatch(user)):
        raise _bad_address(address)
    return host, user, port


def _bad_address(address: str) -> UsageError:
    remedy = "write ssh://user@host, ssh://user@host:port or adb://SERIAL"
    return UsageError("cannot use the device", reason=f"its address is {address!r}"[:200], remedy=remedy)


def _program(name: str, address: str) -> str:
    found = shutil.which(name)
    if found is None:
        package = "openssh-client" if name != "adb" else "adb"
        reason = f"{address} needs the program {name}, which is not installed here"
        raise MissingExtra("cannot reach the device", reason=reason, remedy=f"install {package}")
    return found
