"""Bad checkpoints and interrupted runs: one row for each numbered fault, what it gives, and that nothing is lost.

The numbers are those of the project's list of faults; A is checkpoints and training. Every row runs the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from tests.training.test_train import small
from vit_edge.checkpoint import save_checkpoint
from vit_edge.cli import main

Made = tuple[list[str], int, str]


def weights(**changes: Tensor) -> dict[str, Tensor]:
    return {**small().model.state_dict(), **changes}


class _RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def converted(path: Path) -> list[str]:
    return ["convert", str(path), "--out", str(path.with_name("out.safetensors"))]


def pickle_with_code(folder: Path) -> Made:
    torch.save({"state_dict": weights(), "extra": _RunsCode()}, folder / "a.pt")
    return converted(folder / "a.pt"), 3, "system"


def pickle_with_a_namespace(folder: Path) -> Made:
    torch.save({"state_dict": weights(), "args": argparse.Namespace(lr=0.1)}, folder / "a.pth.tar")
    return converted(folder / "a.pth.tar"), 0, ""


def unsafe_switch(folder: Path) -> Made:
    return pickle_with_code(folder)  # the test sets the switch


def whole_module(folder: Path) -> Made:
    torch.save(nn.Sequential(nn.Linear(2, 2)), folder / "a.pt")
    return converted(folder / "a.pt"), 3, "Sequential"


def whole_module_in_old_pickle(folder: Path) -> Made:
    (folder / "a.bin").write_bytes(pickle.dumps({"a": Path("x")}))
    return converted(folder / "a.bin"), 3, "pathlib"


def truncated(folder: Path) -> Made:
    torch.save(weights(), folder / "whole.pt")
    data = (folder / "whole.pt").read_bytes()
    (folder / "a.pt").write_bytes(data[: len(data) // 2])
    return converted(folder / "a.pt"), 3, "damaged"


def empty(folder: Path) -> Made:
    (folder / "a.safetensors").write_bytes(b"")
    return converted(folder / "a.safetensors"), 3, "empty (0 bytes)"


def lfs_pointer(folder: Path) -> Made:
    (folder / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return converted(folder / "a.safetensors"), 3, "git lfs pull"


def html_page(folder: Path) -> Made:
    (folder / "a.pth").write_bytes(b"<!DOCTYPE html><html></html>")
    return converted(folder / "a.pth"), 3, "HTML page"


def bit_flip(folder: Path) -> Made:
    save_checkpoint(folder / "best.safetensors", small())
    data = bytearray((folder / "best.safetensors").read_bytes())
    data[-9] ^= 16
    (folder / "last.safetensors").write_bytes(data)
    return ["export", str(folder / "last.safetensors"), "--out", str(folder / "m.onnx")], 3, "best.safetensors"


def expanded_view(folder: Path) -> Made:
    torch.save(weights(pos_embed=torch.zeros(1).expand(2**40)), folder / "a.pt")
    assert (folder / "a.pt").stat().st_size < 100_000
    return converted(folder / "a.pt"), 3, "pos_embed claims"


def missing_keys(folder: Path) -> Made:
    torch.save({k: v for k, v in weights().items() if "blocks.1.mlp" not in k}, folder / "a.pt")
    return converted(folder / "a.pt"), 3, "blocks.1.mlp.fc1"


def not_a_number(folder: Path) -> Made:
    broken = weights()
    broken["head.weight"] = torch.full_like(broken["head.weight"], float("nan"))
    torch.save(broken, folder / "a.pt")
    return converted(folder / "a.pt"), 3, "head.weight"


_ROWS = [
    (1, pickle_with_code), (1, pickle_with_a_namespace), (2, unsafe_switch), (3, whole_module),
    (3, whole_module_in_old_pickle), (4, truncated), (4, empty), (4, lfs_pointer), (4, html_page), (5, bit_flip),
    (6, expanded_view), (7, missing_keys), (8, not_a_number),
]  # fmt: skip


@pytest.mark.parametrize(("number", "make"), _ROWS, ids=lambda value: getattr(value, "__name__", f"fault {value}"))
def test_a_bad_checkpoint_gets_one_clear_error_and_loses_nothing(
    number: int,
    make: Callable[[Path], Made],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if make is unsafe_switch:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    arguments, code, message = make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    if code:
        assert Path(arguments[1]).name in errors
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, f"fault {number}"


def test_fault_10_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", small())
    before = (tmp_path / "a.safetensors").read_bytes()
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nimport vit_edge.files as files\n"
        "from tests.training.test_train import small\nfrom vit_edge.checkpoint import save_checkpoint\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_checkpoint(sys.argv[1], small(classes=5))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.safetensors"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2  # the part that was written
    save_checkpoint(tmp_path / "a.safetensors", small())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_fault_11_a_limit_on_files_is_named_and_the_old_file_kept(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.pt")
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    command = [sys.executable, "-m", "vit_edge", *converted(tmp_path / "a.pt"), "--force"]

    def allow_4_kilobytes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=allow_4_kilobytes, check=False)
    assert done.returncode == 5, done.stderr
    assert "larger than this process or disk allows" in done.stderr
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "out.safetensors"]


@pytest.fixture
def stopped(digits: Path, tmp_path: Path) -> Path:
    """Return the folder of a run that was stopped; faults 9, 12 and 13 start from it."""
    save_checkpoint(tmp_path / "start.safetensors", small())
    for split in ("train", "test"):
        for number in "0123456789":
            target = tmp_path / "data" / split / number
            target.mkdir(parents=True)
            for path in sorted((digits / split / number).iterdir())[:2]:
                shutil.copy(path, target)
    script = (
        "import os, signal, sys\nfrom vit_edge.train import train, TrainOptions\n"
        "from vit_edge.training.recipe import Recipe\n"
        "train('data', out='run', recipe=Recipe(epochs=3, batch_size=5),"
        " options=TrainOptions(source='start.safetensors', device='cpu', threads=1),"
        " on_progress=lambda at: os.kill(os.getpid(), signal.SIGTERM) if at.step == 2 else None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "stopped by a signal after 2 of 6 steps" in done.stderr, done.stderr
    return tmp_path


def test_faults_9_12_and_13_a_stopped_run_is_whole_and_only_itself_goes_on(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped)
    resume = ["train", "data", "--out", "run", "--resume", "--threads", "1", "--device", "cpu"]
    before = (stopped / "run" / "state.safetensors").read_bytes()
    assert main([*resume, "--set", "epochs=9"]) == 2
    assert "recipe.epochs was 3, is 9" in capsys.readouterr().err
    with FileLock(stopped / "run" / ".lock"):
        assert main(resume) == 2
    assert "in use by" in capsys.readouterr().err
    next((stopped / "data" / "train" / "3").iterdir()).unlink()
    assert main(resume) == 2
    assert "training_images was" in capsys.readouterr().err
    assert (stopped / "run" / "state.safetensors").read_bytes() == before
    assert main([*resume, "--allow-drift"]) == 0


def test_our_own_checkpoint_holds_tensors_and_text_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", dataclasses.replace(small(), training={"note": "text"}))
    data = (tmp_path / "a").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    json.loads(header.pop("__metadata__")["vit_edge.checkpoint"])
    assert (
        sum(end - start for start, end in (entry["data_offsets"] for entry in header.values())) == len(data) - 8 - size
    )
