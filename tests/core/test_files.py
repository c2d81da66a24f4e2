"""Writes leave the old file or the new one; reads open regular files only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from vit_edge import files
from vit_edge.errors import InputError, ResourceExhausted, UsageError
from vit_edge.files import kind_of, may_write, read_file, write_atomic
from vit_edge.model_file.paired_files import read_partner, write_together

Usage = namedtuple("Usage", "total used free")


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_atomic(target, b"old")
    write_atomic(target, iter([b"n", b"ew"]))
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_killed_write_keeps_the_old_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_atomic(target, b"old" * 1000)
    script = (
        "import itertools, sys; from vit_edge.files import write_atomic\n"
        "def chunks():\n    yield b'x' * 100\n    print('half', flush=True)\n"
        "    import time; time.sleep(60); yield b'y'\n"
        f"write_atomic({str(target)!r}, chunks())"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert target.read_bytes() == b"old" * 1000
    assert len(os.listdir(tmp_path)) == 2
    time.sleep(0.1)
    write_atomic(target, b"new")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failing_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_atomic(target, b"old")

    def chunks() -> object:
        yield b"new"
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError):
        write_atomic(target, chunks())  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours handles it."""


def write_pair(folder: Path, version: bytes) -> None:
    """Write two files of a version, the second of which names the first by its hash."""
    part = version * 1000
    write_together({folder / "a.bin": part, folder / "a.xml": files.sha256_hex(part).encode()})


def read_pair(folder: Path) -> bytes | None:
    name = (folder / "a.xml").read_bytes().decode()
    belongs = lambda data: files.sha256_hex(data) == name  # noqa: E731
    return read_partner(folder / "a.bin", what="part", max_bytes=10_000, error=InputError, belongs=belongs)


def replace_until(monkeypatch: pytest.MonkeyPatch, last: int, error: BaseException) -> None:
    """Let the rename of this number, and every later one, raise an error."""
    real, done = Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == last:
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_pair_that_is_killed_between_any_two_renames_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    write_pair(tmp_path, b"old")
    for version in (b"new", b"newer"):  # killed twice: what the first one set aside is still the right one
        with monkeypatch.context() as patch:
            replace_until(patch, last, Killed())
            with pytest.raises(Killed):
                write_pair(tmp_path, version)
        assert read_pair(tmp_path) == b"old" * 1000
    write_pair(tmp_path, b"new")
    assert read_pair(tmp_path) == b"new" * 1000
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.xml"]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_pair_that_cannot_be_replaced_stays_under_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    write_pair(tmp_path, b"old")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with monkeypatch.context() as patch:
        replace_until(patch, last, OSError(16, "in use"))
        with pytest.raises(UsageError, match="in use"):
            write_pair(tmp_path, b"new")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_partner_that_does_not_belong_or_is_missing_is_told_apart(tmp_path: Path) -> None:
    write_pair(tmp_path, b"old")
    (tmp_path / "real").write_bytes(b"other")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match="there is no such file"):
        read_pair(tmp_path)
    (tmp_path / "a.bin").symlink_to(tmp_path / "real")
    assert read_pair(tmp_path) is None
    write_pair(tmp_path, b"new")  # through the link
    assert (tmp_path / "a.bin").is_symlink()
    assert read_pair(tmp_path) == (tmp_path / "real").read_bytes() == b"new" * 1000


def test_two_processes_that_write_one_pair_leave_that_of_one(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.core.test_files import write_pair\n"
        "for _ in range(100): write_pair(Path(sys.argv[1]), sys.argv[2].encode())"
    )
    root = Path(__file__).resolve().parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path, name], cwd=root) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert read_pair(tmp_path) in (b"a" * 1000, b"b" * 1000)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.xml"]


def test_a_full_disk_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    write_atomic(target, b"old")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(100, 99, 1))
    with pytest.raises(ResourceExhausted, match=r"2,000 bytes are needed, 1 are free"):
        write_atomic(target, b"x" * 2000)
    assert target.read_bytes() == b"old"


def test_an_existing_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UsageError, match="--force"):
        may_write(tmp_path / "a", force=False)
    assert may_write(tmp_path / "a", force=True) == tmp_path / "a"
    with pytest.raises(UsageError, match="folder"):
        may_write(tmp_path, force=True)
    with pytest.raises(UsageError, match="does not exist"):
        may_write(tmp_path / "no" / "a", force=False)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "missing", Path("/dev/zero"), "nul\0byte"):
        with pytest.raises(InputError):
            read_file(path, what="thing", max_bytes=100)
    (tmp_path / "a").write_bytes(b"x" * 101)
    with pytest.raises(InputError, match="at most 100"):
        read_file(tmp_path / "a", what="thing", max_bytes=100)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_file(tmp_path / "link", what="thing", max_bytes=101) == b"x" * 101


def test_a_pickle_and_a_header_of_640_bytes_are_told_apart() -> None:
    header = b"{}".ljust(0x280)
    assert kind_of(len(header).to_bytes(8, "little") + header) is None
    assert kind_of(b"\x80\x02}q\x00.") is not None
