"""Kills, full and read-only disks, limits and two processes at once: outputs stay whole, and nothing is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fuzzing.kills import Writer, kill_writers, make_writers
from vit_edge.errors import ResourceExhausted, UsageError
from vit_edge.files import temporary_folder, write_atomic

WRITERS = (
    "checkpoint", "state of a training", "model file (export, quantize)", "IR pair", "network over 2 GiB",
    "folder of a hub", "seal", "vectors of an encoder",
    "record of a deployment", "cache", "tuned configuration",
)  # fmt: skip
# A full disk is no reason to fail for what is only remembered: the writer says that nothing was kept.
REMEMBERED = ("cache", "tuned configuration")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kills_at_random_moments_leave_every_output_whole(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(tmp_path / "cache"))
    ran, wrong = kill_writers(small_model, kills=40, seed=0, work=tmp_path)
    assert wrong == []
    assert set(ran) == set(WRITERS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on a disk of 20 MB; skips unless this process may mount one."""
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path / "disk"], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small tmpfs cannot be mounted here: it needs root")
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def fill(disk: Path, *, leave_bytes: int) -> None:
    status = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(status.f_bavail * status.f_frsize - leave_bytes))


def refused(writer: Writer, folder: Path, name: str, kind: type[Exception]) -> str:
    with pytest.raises(ValueError if name in REMEMBERED else kind) as caught:
        writer.write(folder, 1)
    writer.read(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_and_a_read_only_disk_keep_the_old_output(
    small_model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("VIT_EDGE_CACHE", str(small_disk / "cache"))
    writer, folder = make_writers(small_model)[name], small_disk / "out"
    folder.mkdir()
    writer.write(folder, 0)
    fill(small_disk, leave_bytes=0)
    text = refused(writer, folder, name, ResourceExhausted)
    assert name in REMEMBERED or "the disk is full" in text
    assert not list(small_disk.rglob(".vit-edge.tmp.*"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(writer, folder, name, (UsageError, OSError))  # type: ignore[arg-type]


def test_a_limit_of_the_process_is_told_apart_from_a_full_disk(tmp_path: Path) -> None:
    script = "import sys; from vit_edge.files import write_atomic; write_atomic(sys.argv[1], bytes(100_000))"

    def allow_4_kilobytes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    write_atomic(tmp_path / "a", b"precious")
    command = [sys.executable, "-c", script, tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=allow_4_kilobytes, check=False)
    assert "the file is larger than this process or disk allows" in done.stderr
    assert "ulimit -f" in done.stderr
    assert (tmp_path / "a").read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _write_for(path: Path, data: bytes, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        write_atomic(path, data)


def test_two_processes_that_write_one_output_leave_that_of_one(tmp_path: Path) -> None:
    contents = [bytes([value]) * 300_000 for value in (1, 2)]
    start = multiprocessing.get_context("spawn")
    writers = [start.Process(target=_write_for, args=(tmp_path / "a", data, 1.0)) for data in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            assert (tmp_path / "a").read_bytes() in contents
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_temporary_folders_of_killed_processes_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = (
        "import os, signal; from pathlib import Path; from vit_edge.files import temporary_folder\n"
        "with temporary_folder() as name:\n"
        "    (Path(name) / 'inside').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    alive = left.with_name(left.name.replace(left.name.split(".")[2], str(os.getppid()), 1))
    others = left.with_name(left.name.replace(left.name.split(".")[1], "00000000", 1))
    for folder in (alive, others):
        folder.mkdir()
    with temporary_folder() as name:
        assert {path.name for path in tmp_path.iterdir()} == {alive.name, others.name, Path(name).name}
    assert not Path(name).exists()
