"""What runs on the device while it is used: it owns one folder, runs commands in it, and leaves nothing behind.

Its source is sent as text to the device's Python (3.10 or newer), before anything of ours is there: it imports the
standard library alone. Requests are lines of JSON on stdin, answers are lines of JSON on stdout behind a mark, for
login shells print too. Where stdin ends, because the other side is done, was stopped or lost the connection, what
still runs is killed and the folder is removed.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

__all__ = ["MARK", "PREFIX", "Agent", "bootstrap", "main"]

MARK = "@vit-edge "
PREFIX = "vit-edge-remote-"
_MARKER = "owner.json"
_STALE_S = 24 * 3600
_BEAT_S = 2.0
_PACKAGES = ("numpy", "PIL", "google.protobuf", "click", "rich", "tomli", "onnxruntime", "openvino", "ensurepip")


class Agent:
    """The folder, and at most one command that runs in it."""

    def __init__(self) -> None:
        self._speaking, self._child_lock = threading.Lock(), threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._closed = False
        self.removed = remove_stale()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        owner = {"pid": os.getpid(), "started": time.time()}
        (self.folder / _MARKER).write_text(json.dumps(owner), encoding="utf-8")

    def say(self, **message: Any) -> None:
        """Write one answer; the reader may be gone."""
        with self._speaking, contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"{MARK}{json.dumps(message)}\n")
            sys.stdout.flush()

    def serve(self) -> bool:
        """Answer requests until the other side ends; returns whether it said so, or only went away."""
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "end":
                return True
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()
        return False

    def close(self) -> str | None:
        """Kill what runs and remove the folder; returns why it could not be removed, if so."""
        with self._child_lock:
            self._closed = True
            if self._child is not None and self._child.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(self._child.pid, signal.SIGKILL)
        reason = _removed(self.folder)
        for _ in range(10):  # something of the command may still be ending
            if reason is None:
                break
            time.sleep(0.2)
            reason = _removed(self.folder)
        return reason

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            if request["do"] == "unpack":
                self._unpack(request["file"], request["to"])
                self.say(done="unpack")
            else:
                self._run(request["argv"], request["env"], request["seconds"])
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            self.say(error=str(error))

    def _unpack(self, name: str, to: str) -> None:
        with zipfile.ZipFile(self.folder / name) as archive:
            archive.extractall(self.folder / to)
        if to == ".":  # it was sent for this alone
            (self.folder / name).unlink()

    def _run(self, argv: list[str], env: dict[str, str], seconds: float) -> None:
        """Run a command in the folder, in a process group of its own; says while it does that it is alive."""
        with self._child_lock:
            if self._closed:
                return
            self._child = subprocess.Popen(
                argv,
                cwd=self.folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        end = time.monotonic() + seconds
        while True:
            try:
                stdout, stderr = self._child.communicate(timeout=_BEAT_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() > end:
                    os.killpg(self._child.pid, signal.SIGKILL)
                    with self._child:  # ends it, and closes its pipes
                        pass
                    self.say(error=f"it was not done in {seconds:g} seconds")
                    return
                self.say(alive=True)
                continue
            self.say(returncode=self._child.returncode, stdout=stdout, stderr=stderr[-20_000:])
            return


def remove_stale() -> list[str]:
    """Remove folders of this user whose owner is gone, or that are older than a day; returns their paths."""
    folders = [folder for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if _is_stale(folder)]
    return [str(folder) for folder in folders if _removed(folder) is None]


def _is_stale(folder: Path) -> bool:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        return time.time() - status.st_mtime > _STALE_S or not _owner_lives(folder)
    except OSError:
        return False


def _removed(folder: Path) -> str | None:
    """Remove a folder; returns why it could not be, or None where it is gone."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)
    return None


def _owner_lives(folder: Path) -> bool:
    try:
        pid = int(json.loads((folder / _MARKER).read_text(encoding="utf-8"))["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        # Between making a folder and writing into it lies a moment.
        return time.time() - folder.stat().st_mtime < 60
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return False  # the number went to a process of someone else
    return True


def emulated() -> bool:
    """Return whether this process runs in QEMU's user emulation.

    QEMU shows a process its own program in /proc; of another one it shows what the kernel sees: the emulator.
    """
    for pid in (os.getppid(), 1):
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            if Path(os.fsdecode(program)).name.startswith("qemu-"):
                return True
    return False


def facts(agent: Agent) -> dict[str, Any]:
    """Return what the other side has to know of this machine."""
    return {
        "folder": str(agent.folder),
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "system": platform.platform(),
        "bits": struct.calcsize("P") * 8,
        "emulated": emulated(),
        "packages": [name for name in _PACKAGES if _is_there(name)],
        "pythonpath": os.environ.get("PYTHONPATH", ""),
        "removed": agent.removed,
    }


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _stop(_number: int, _frame: object) -> None:
    sys.exit(1)


def main() -> None:
    """Serve until stdin ends, then leave nothing behind."""
    sys.path[:] = [entry for entry in sys.path if entry]  # a file in the current folder is not the package
    for name in ("SIGHUP", "SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), _stop)
    agent, ended = Agent(), False
    try:
        agent.say(hello=facts(agent))
        ended = agent.serve()
    finally:
        left = agent.close()
        if ended:
            agent.say(bye=True, left=left)
        sys.stdout.flush() if ended else os._exit(0)


def bootstrap(source: str) -> list[str]:
    """Return the arguments for a Python that runs this source; an older one prints its version and exits with 1."""
    start = (
        "import sys,base64,zlib;"
        'sys.version_info<(3,10) and sys.exit("vit-edge: Python "+sys.version.split()[0]);'
        'exec(compile(zlib.decompress(base64.b64decode(sys.argv[1])),"agent","exec"))'
    )
    return ["-u", "-c", start, base64.b64encode(zlib.compress(source.encode(), 9)).decode("ascii")]


if __name__ == "__main__":
    main()
