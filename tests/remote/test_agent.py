"""The agent of a device, in this process: what it answers, what it removes, and what it leaves alone."""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vit_edge.remote import agent

DAY_S = 24 * 3600
SAYS_ITS_PID_AND_WAITS = """
import os, time
with open("new", "w") as file:
    file.write(str(os.getpid()))
os.rename("new", "pid")
time.sleep(600)
"""


class Answers(io.StringIO):
    """A stdout whose lines can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue()

    def write(self, text: str) -> int:
        self.lines.put(text)
        return len(text)

    def next(self) -> Any:
        """Return the next answer that is more than a sign of life."""
        while True:
            line = self.lines.get(timeout=60)
            answer = json.loads(line.removeprefix(agent.MARK))
            if answer != {"alive": True}:
                return answer


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The device's folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(agent, "_BEAT_S", 0.05)
    return tmp_path


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def converse(temp: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run the agent as a device does, while a function in another thread sends requests and then hangs up."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    path, problems = list(sys.path), list[BaseException]()
    monkeypatch.setattr(agent.os, "_exit", lambda code: problems.append(SystemExit(code)))

    def run(other_side: Callable[[Callable[..., None]], None]) -> None:
        reading, writing = os.pipe()
        with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as requests:
            monkeypatch.setattr("sys.stdin", stdin)
            monkeypatch.setattr("sys.stdout", answers)

            def send(**request: Any) -> None:
                requests.write(f"{json.dumps(request)}\n")
                requests.flush()

            def talk() -> None:
                try:
                    other_side(send)
                except BaseException as error:
                    problems.append(error)
                requests.close()

            thread = threading.Thread(target=talk)
            thread.start()
            agent.main()
            thread.join()
        if problems:
            raise problems[0]

    yield run
    sys.path[:] = path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def python(code: str, *, seconds: float = 60) -> dict[str, Any]:
    return {"do": "run", "argv": [sys.executable, "-c", code], "env": {"WORD": "hello"}, "seconds": seconds}


def test_requests_are_answered_and_nothing_is_left(temp: Path, answers: Answers, converse: Callable[..., None]) -> None:
    said = []

    def other_side(send: Callable[..., None]) -> None:
        hello = answers.next()["hello"]
        said.append(hello)
        with zipfile.ZipFile(Path(hello["folder"]) / "sent.zip", "w") as archive:
            archive.writestr("inside/a.txt", "text")
        (Path(hello["folder"]) / "broken.zip").write_bytes(b"no zip")
        for request in (
            {"do": "unpack", "file": "sent.zip", "to": "."},
            {"do": "unpack", "file": "broken.zip", "to": "package"},
            python("import os; print(os.environ['WORD'], os.listdir(), open('inside/a.txt').read())"),
            python("import sys; sys.exit('a' * 30_000)"),
            python("import time; time.sleep(600)", seconds=0),
            {**python(""), "argv": ["/no/such/program"]},
        ):
            send(**request)
            said.append(answers.next())
        send(do="end")

    converse(other_side)
    hello, unpacked, broken, ran, failed, late, missing = said
    assert hello["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "numpy" in hello["packages"]
    assert not hello["emulated"]
    assert unpacked == {"done": "unpack"}
    assert broken == {"error": "File is not a zip file"}
    assert ran["returncode"] == 0
    assert ran["stdout"].startswith("hello [")
    assert "sent.zip" not in ran["stdout"]  # it was sent to be unpacked
    assert ran["stdout"].endswith("] text\n")
    assert (failed["returncode"], len(failed["stderr"])) == (1, 20_000)
    assert late == {"error": "it was not done in 0 seconds"}
    assert "No such file" in missing["error"]
    assert answers.next() == {"bye": True, "left": None}
    assert list(temp.iterdir()) == []


def test_a_connection_that_is_lost_ends_the_command_and_removes_the_folder(
    temp: Path, answers: Answers, converse: Callable[..., None]
) -> None:
    def other_side(send: Callable[..., None]) -> None:
        folder = Path(answers.next()["hello"]["folder"])
        send(**python(SAYS_ITS_PID_AND_WAITS))
        while not (folder / "pid").exists():
            time.sleep(0.01)
        pids.append(int((folder / "pid").read_text()))

    pids: list[int] = []
    with pytest.raises(SystemExit, match="0"):  # at once: nobody waits for what the interpreter does at its end
        converse(other_side)
    assert list(temp.iterdir()) == []
    # Killed, and reaped by the thread that waits for it: it says so, although nobody reads it.
    assert answers.next()["returncode"] == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_nothing_starts_once_the_agent_is_closed(temp: Path, answers: Answers) -> None:
    closed = agent.Agent()
    assert closed.close() is None
    closed._run(["touch", "a"], {}, 5)
    assert answers.lines.empty()
    assert list(temp.iterdir()) == []


def test_why_a_folder_cannot_be_removed_is_said(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    found = agent.Agent()
    monkeypatch.setattr(agent.shutil, "rmtree", refuse)
    monkeypatch.setattr(agent.time, "sleep", lambda _: None)
    assert found.close() == "[Errno 13] Permission denied"


def test_only_folders_whose_owner_is_gone_are_removed(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()

    def make(name: str, owner: object, *, age_s: float = 0) -> Path:
        folder = temp / f"{agent.PREFIX}{name}"
        folder.mkdir()
        if owner is not None:
            (folder / "owner.json").write_text(json.dumps(owner))
        os.utime(folder, (time.time() - age_s,) * 2)
        return folder

    gone = [
        make("dead", {"pid": dead.pid}), make("old", {"pid": os.getpid()}, age_s=2 * DAY_S),
        make("no_owner", None, age_s=120), make("broken", [], age_s=120), make("huge", {"pid": 2**80}),
    ]  # fmt: skip
    kept = [make("alive", {"pid": os.getpid()}), make("just_made", None)]
    (temp / f"{agent.PREFIX}file").write_text("no folder")
    others = make("others", {"pid": dead.pid})
    real = Path.lstat

    def lstat(path: Path) -> object:
        if path == others:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert sorted(agent.remove_stale()) == sorted(map(str, gone))
    assert not any(folder.exists() for folder in gone)
    assert all(folder.exists() for folder in (*kept, temp / f"{agent.PREFIX}file"))


def test_a_number_that_went_to_somebody_elses_process_is_no_owner(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_pid: int, _signal: int) -> None:
        raise PermissionError

    found = agent.Agent()
    monkeypatch.setattr(agent.os, "kill", kill)
    assert agent.remove_stale() == [str(found.folder)]


def test_a_process_of_the_emulator_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    program = ["/usr/bin/qemu-aarch64-static", "-c", "input()"]
    with subprocess.Popen(program, executable=sys.executable, stdin=subprocess.PIPE) as parent:
        monkeypatch.setattr(agent.os, "getppid", lambda: parent.pid)
        assert agent.emulated()
        parent.communicate(b"\n")


def test_a_package_inside_one_that_is_missing_is_missing() -> None:
    assert not agent._is_there("no_such_package.inside")


def test_a_signal_ends_the_agent_in_order() -> None:
    with pytest.raises(SystemExit) as caught:
        agent._stop(signal.SIGTERM, None)
    assert caught.value.code == 1
