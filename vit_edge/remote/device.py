"""One device in use: what it has, our package and files in a folder of its own there, commands, and the end of it all.

The first connection runs `vit_edge.remote.agent`, which owns the folder: where that connection ends, by our will or
not, the device kills what runs and removes the folder by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import signal
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vit_edge import errors
from vit_edge.errors import EngineUnavailable, VitEdgeError, printable
from vit_edge.model_file.fields import Shape, check_fields
from vit_edge.remote import agent
from vit_edge.remote.package import ENGINES, WHEEL_NAME, build_wheel, pure_packages
from vit_edge.remote.transport import Transport, open_transport

__all__ = ["Bundle", "Device", "Finished", "Session", "Setup"]

_HELLO_S, _SILENCE_S, _BYE_S = 90, 60, 20
_OUR_PURE_PACKAGES = ["click", "rich"]
_NEEDED = {"numpy": "numpy", "PIL": "Pillow", "google.protobuf": "protobuf"}
# More than a command prints; one line of a device does not fill the memory here.
_MOST_ANSWER_BYTES = 200_000_000
_NONE = type(None)
_FACTS: Shape = {
    "folder": str,
    "python": str,
    "executable": (str, _NONE),
    "packages": [str],
    "pythonpath": str,
    "removed": [str],
}
_FINISHED: Shape = {"returncode": int, "stdout": str, "stderr": str}
_ERROR: Shape = {"type": str, "file?": (str, _NONE)}
_ANYTHING: Shape = {}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device: its address and its entry in a devices file; `python` is the interpreter that has the engine."""

    address: str
    name: str
    python: str = "python3"
    target: str | None = None
    engine: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a device is made ready: `install` puts the engine into a venv there, `wheels` without any network."""

    install: bool = False
    wheels: Path | None = None
    seconds: float = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a command on the device ended with."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(kw_only=True, slots=True)
class Bundle:
    """The one file that is copied to every device: our package, and the files that a command reads.

    Files have names of our own there, so that no name can mean anything to a shell; `there` has the path of each.
    """

    path: Path
    there: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def write(cls, folder: Path, files: Mapping[Path, Iterable[tuple[str, Path]]], setup: Setup) -> Bundle:
        """Write it into `folder`; `files` are those asked for, each with the names and files it takes."""
        bundle = cls(path=folder / "bundle.zip")
        with zipfile.ZipFile(bundle.path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(WHEEL_NAME, build_wheel())
            for name, data in pure_packages(_OUR_PURE_PACKAGES):
                archive.writestr(f"more/{name}", data, zipfile.ZIP_DEFLATED)
            for number, (asked, parts) in enumerate(files.items()):
                names = [(f"files/{number:06}/{name}", source) for name, source in parts]
                bundle.there[names[0][0]] = asked
                for name, source in names:
                    archive.write(source, name)
            for wheel in _wheels(setup):
                archive.write(wheel, f"wheels/{wheel.name}")
        return bundle

    def name_there(self, asked: Path) -> str:
        """Return the path of a file there, relative to the folder."""
        return next(name for name, path in self.there.items() if path == asked)


def _wheels(setup: Setup) -> list[Path]:
    if setup.wheels is None:
        return []
    found = sorted(setup.wheels.glob("*.whl")) if setup.wheels.is_dir() else []
    if not found:
        reason, remedy = (
            "there is no wheel in it",
            "fill it: pip download --only-binary :all: --platform ... --dest DIR",
        )
        raise errors.UsageError("cannot install from the folder", file=setup.wheels, reason=reason, remedy=remedy)
    return found


class Session:
    """A device while it is used; as a context it is cleaned up whatever happens."""

    def __init__(self, device: Device, setup: Setup) -> None:
        self.device, self._setup = device, setup
        self._transport: Transport = open_transport(device.address)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.facts: dict[str, Any] = {}
        self._python, self._path = device.python, list[str]()
        source = Path(agent.__file__).read_text(encoding="utf-8")
        self._process = self._transport.start([device.python, *agent.bootstrap(source)], stderr=self._stderr)
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Session:
        try:
            self.facts = self._answer({"hello": _FACTS}, _HELLO_S)["hello"]
        except BaseException:
            self.close()
            raise
        for path in self.facts["removed"]:
            _log.info("%s: removed %s, left by a run that was cut off", self.device.name, printable(path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def engines(self) -> list[str]:
        """Return the engines whose package is there."""
        return list(ENGINES) if self.installs else [e for e in ENGINES if e in self.facts["packages"]]

    @property
    def installs(self) -> bool:
        """Return whether the engine is put there for this run."""
        return self._setup.install or self._setup.wheels is not None

    def provide(self, bundle: Bundle, *, engine: str | None, needs_engine: bool) -> None:
        """Put our package and the files there, and the engine with `install`; raises EngineUnavailable."""
        if not self.installs:
            self._check_packages(engine, needs_engine=needs_engine)
        _log.info("%s: copying %.1f MB", self.device.name, bundle.path.stat().st_size / 1e6)
        self._transport.copy_to(bundle.path, f"{self.facts['folder']}/bundle.zip", seconds=self._setup.seconds)
        self._ask({"do": "unpack", "file": "bundle.zip", "to": "."})
        if self.installs:
            self._install(engine or "onnxruntime")
        else:
            self._ask({"do": "unpack", "file": WHEEL_NAME, "to": "package"})
            self._path = [f"{self.facts['folder']}/package"]
            if not set(_OUR_PURE_PACKAGES) <= set(self.facts["packages"]):
                self._path.append(f"{self.facts['folder']}/more")

    def run(self, argv: Sequence[str], *, python: str | None = None) -> Finished:
        """Run our Python there with these arguments, in the folder; raises EngineUnavailable where it is lost."""
        command = [python or self._python, *argv]
        request = {"do": "run", "argv": command, "env": self._environment(), "seconds": self._setup.seconds}
        found = self._ask(request, answer=_FINISHED)
        return Finished(returncode=found["returncode"], stdout=found["stdout"], stderr=found["stderr"])

    def open(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Return a process of our Python there, whose stdin and stdout are ours; it has to end where stdin does."""
        variables = [f"{name}={value}" for name, value in self._environment().items()]
        return self._transport.start(["env", *variables, self._python, *argv], stderr=self._stderr)

    def command(self, argv: Sequence[str], bundle: Bundle) -> dict[str, Any]:
        """Return what a command of ours prints there with --json, files called as they are here.

        An error of the command is in it as `error`; raises EngineUnavailable where it printed nothing of the kind.
        """
        _log.info("%s: %s", self.device.name, argv[0])
        finished = self.run(["-m", "vit_edge", *argv])
        try:
            printed = json.loads(finished.stdout)
            check_fields(printed, {"error?": _ERROR}, path="output")
        except (ValueError, RecursionError):
            raise self._crash(finished) from None
        named: dict[str, Any] = self.here(printed, bundle)
        return named

    def error_of(self, fields: Mapping[str, Any]) -> VitEdgeError:
        """Return an error that a command printed there as an error here."""
        kind: type[VitEdgeError] = getattr(errors, str(fields.get("type")), EngineUnavailable)
        what = f"{self.device.name}: {fields.get('what') or 'the command failed'}"
        reason, remedy = str(fields.get("reason") or ""), str(fields.get("remedy") or "")
        return kind(what, file=fields.get("file"), reason=reason, remedy=remedy)

    def abort(self) -> None:
        """End it from another thread: what waits for the device raises."""
        with contextlib.suppress(OSError, ValueError):
            self._end_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_BYE_S)
        self._process.kill()

    def close(self) -> None:
        """Have the device clean up, end the connection; warns where the device did not confirm it."""
        folder = self.facts.get("folder")
        if folder is not None and not self._said_bye():
            _log.warning(
                "%s did not confirm that %s is removed there; it does so once it notices, or the next run does",
                self.device.name, printable(folder),
            )  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            self._end_input()
        try:
            self._process.wait(5 if folder is not None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._transport.close()
        self._stderr.close()

    def stderr(self) -> str:
        """Return what the transport's programs printed on stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read(20_000).decode("utf-8", errors="replace")

    def lost(self, what: str) -> EngineUnavailable:
        """Return the error for a connection that ended in the middle."""
        return self._transport.failure(f"{self.device.name}: {what}", self.stderr())

    def _said_bye(self) -> bool:
        try:
            while True:
                answer = self._ask({"do": "end"}, seconds=_BYE_S)
                if "bye" in answer:
                    break
        except VitEdgeError:
            return False
        if answer.get("left"):
            _log.warning("%s could not remove %s: %s", self.device.name, self.facts["folder"], answer["left"])
        return True

    def _environment(self) -> dict[str, str]:
        # Engines leave files in the temp folder (OpenVINO's telemetry does): theirs is ours, which is removed.
        path = ":".join(entry for entry in (*self._path, self.facts["pythonpath"]) if entry)
        return {"PYTHONUTF8": "1", "PYTHONPATH": path, "TMPDIR": self.facts["folder"]}

    def _end_input(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while line := self._process.stdout.readline(_MOST_ANSWER_BYTES):
                text = line.decode("utf-8", errors="replace")
                if text.startswith(agent.MARK):
                    self._lines.put(text[len(agent.MARK) :])
        self._lines.put(None)

    def _ask(
        self, request: Mapping[str, Any], *, answer: Shape = _ANYTHING, seconds: float = _SILENCE_S
    ) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise self.lost("the connection was lost") from None
        return self._answer(answer, seconds)

    def _answer(self, shape: Shape, seconds: float) -> dict[str, Any]:
        """Return the next answer that says more than that the device is alive, if it has the shape."""
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                reason = f"{self.device.address} has not responded for {seconds:g} seconds"
                remedy = "look after it, and run it again"
                raise EngineUnavailable(f"{self.device.name}: the device hangs", reason=reason, remedy=remedy) from None
            if line is None:
                self._lines.put(None)
                raise self._ended()
            answer = self._parsed(line, {"error?": (str,)})
            if "error" in answer:
                remedy = "free what is short there, or give --device-timeout more seconds"
                reason = str(answer["error"])
                raise EngineUnavailable(f"{self.device.name}: the device failed", reason=reason, remedy=remedy)
            if "alive" not in answer:
                return self._parsed(line, shape)

    def _parsed(self, line: str, shape: Shape) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(line)
            check_fields(answer, shape, path="message")
        except (ValueError, RecursionError) as error:
            raise self.lost(f"the device sent an invalid message ({error})") from error
        return answer

    def _ended(self) -> EngineUnavailable:
        """Return why the connection ended, from its stderr and exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        stderr, code = self.stderr(), self._process.returncode
        if self.facts:
            return self.lost("the connection was lost")
        name, python = self.device.name, self.device.python
        if "vit-edge: Python " in stderr:
            version = stderr.split("vit-edge: Python ")[1].split()[0]
            remedy = "install a newer one there, or name one with --python"
            reason = f"{python} there is Python {version}; 3.10 or newer is needed"
            return EngineUnavailable(f"cannot use {name}", reason=reason, remedy=remedy)
        if code in (126, 127):
            remedy = "install Python 3.10 or newer there, or name the interpreter with --python"
            return EngineUnavailable(f"cannot use {name}", reason=f"there is no {python} there", remedy=remedy)
        return self._transport.failure(f"cannot reach {name}", stderr)

    def _check_packages(self, engine: str | None, *, needs_engine: bool) -> None:
        have = set(self.facts["packages"])
        missing = [package for module, package in _NEEDED.items() if module not in have]
        if re.match(r"3\.(\d|10)\b", self.facts["python"]) and "tomli" not in have:
            missing.append("tomli")
        if engine is not None and engine in ENGINES and engine not in have:
            missing.append(engine)
        elif needs_engine and not self.engines:
            missing.append("onnxruntime or openvino")
        if missing:
            reason = f"{self.facts['executable']} there has no {', '.join(missing)}"
            remedy = "add --install, install them there, or name another interpreter with --python"
            raise EngineUnavailable(f"cannot use {self.device.name}", reason=reason, remedy=remedy)

    def _install(self, engine: str) -> None:
        """Make a virtual environment in the folder, with our package and the engine."""
        folder = self.facts["folder"]
        _log.info("%s: installing %s", self.device.name, engine)
        source = [] if self._setup.wheels is None else ["--no-index", "--find-links", f"{folder}/wheels"]
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *source]
        self._expect(["-m", "venv", f"{folder}/venv"], python=self.device.python, what="cannot make a venv")
        self._python = f"{folder}/venv/bin/python"
        wanted = f"{folder}/{WHEEL_NAME}[{engine}]"
        self._expect([*pip, wanted], python=self._python, what=f"cannot install {engine}")

    def _expect(self, argv: list[str], *, python: str, what: str) -> None:
        finished = self.run(argv, python=python)
        if finished.returncode:
            lines = [line for line in (finished.stderr + finished.stdout).splitlines() if line.strip()]
            errors_ = [line for line in lines if line.startswith("ERROR")] or lines
            reason = printable(errors_[-1])[:300] if errors_ else f"exit code {finished.returncode}"
            remedy = "on a device without network give the wheels with --wheels DIR"
            raise EngineUnavailable(f"{self.device.name}: {what} there", reason=reason, remedy=remedy)

    def _crash(self, finished: Finished) -> EngineUnavailable:
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else "it printed nothing"
        if finished.returncode < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-finished.returncode).name
                built = ": the engine was built for other CPUs" if name == "SIGILL" else ""
                reason = f"the process was ended by {name}{built}"
        what = f"{self.device.name}: the command crashed there"
        return EngineUnavailable(what, reason=printable(reason), remedy="run `vit-edge doctor` on it")

    def here(self, value: Any, bundle: Bundle) -> Any:
        """Return JSON values in which files are called as they are here."""
        if isinstance(value, dict):
            return {key: self.here(entry, bundle) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.here(entry, bundle) for entry in value]
        if isinstance(value, str):
            for there, asked in bundle.there.items():
                value = value.replace(f"{self.facts['folder']}/{there}", printable(asked))
                value = value.replace(there, printable(asked))
        return value
