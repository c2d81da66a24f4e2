"""SIGKILL at any moment of a whole `vit-edge train` or `vit-edge deploy`: each output stays the old or the new one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import ROOT
from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.errors import VitEdgeError
from vit_edge.export.deployment.record import read_record
from vit_edge.export.tracing.network import reference_logits
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import open_model
from vit_edge.tensor_file import read_tensors

__all__ = ["Command", "kill_commands", "make_commands", "read_outputs"]

# Half of the kills come when so many temporary files were seen, the others at any moment.
_MOST_FILES_SEEN = 4
_MOST_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command that replaces what is in `out`: its arguments for the next run, and the exit codes of a whole run."""

    out: Path
    arguments: Callable[[int], list[str]]
    right: tuple[int, ...]


def make_commands(folder: Path) -> dict[str, Command]:
    """Fill a folder with a checkpoint and images; return the commands that work on them."""
    sources = _make_inputs(folder)
    images = [f"--{name}={folder / name}" for name in ("calibration", "data")]
    run, out = folder / "run", folder / "out"
    small = ["--epochs=12", "--batch-size=8", "--device=cpu", "--threads=1", "--workers=0", f"--from={sources[0]}"]

    def train(number: int) -> list[str]:
        # `--force` would begin by removing the run that is there.
        return ["train", f"{folder / 'data'}", f"--out={run}", *small, *(["--resume"] if _can_resume(run) else [])]

    def deploy(number: int) -> list[str]:
        # Another source each time: no step is skipped.
        budget = ["--max-drop=40", "--effort=fast", "--no-speed"]
        return ["deploy", str(sources[number % 2]), *images, *budget, f"--out={out}"]

    return {
        "train": Command(out=run, arguments=train, right=(0,)),
        "deploy": Command(out=out, arguments=deploy, right=(0, 6)),
    }


def _can_resume(run: Path) -> bool:
    return (run / "state.safetensors").exists()


def _make_inputs(folder: Path) -> list[Path]:
    folder.mkdir()
    model, pixels = random_network(small_config()), np.random.default_rng(0)
    answers = reference_logits(model, PREPROCESSING)
    for number in range(110):
        image: Pixels = pixels.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        label = "abcdefg"[int(answers(PREPROCESSING.pixels(image)[None]).argmax())]
        path = folder / (f"calibration/{number}.png" if number < 40 else f"data/{label}/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    checkpoint = Checkpoint(name="a", model=model, preprocessing=PREPROCESSING, labels=tuple("abcdefg"))
    for name in "ab":
        save_checkpoint(folder / f"{name}.safetensors", replace(checkpoint, name=name))
    return [folder / f"{name}.safetensors" for name in "ab"]


def kill_commands(folder: Path, *, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Return how many kills each command got, and what was lost, unreadable or left behind."""
    commands, rng = make_commands(folder), random.Random(seed)
    ran, wrong = Counter[str](), list[str]()
    for name, command in commands.items():
        seconds, runs = _whole_run(command, 0), 0
        while ran[name] < kills:
            runs += 1
            before = read_outputs(command.out)
            if not _kill(command, runs, rng, seconds):
                continue  # the command ended first
            ran[name] += 1
            try:
                lost = before - read_outputs(command.out)
                wrong += [f"{name}, run {runs}: lost: {', '.join(sorted(lost))}"] if lost else []
            except (VitEdgeError, OSError, ValueError) as error:
                wrong.append(f"{name}, run {runs}: unreadable: {error}")
        _whole_run(command, runs + 1)
        left = [path.name for path in command.out.rglob(".vit-edge.*")]
        wrong += [f"{name}: left behind: {', '.join(left)}"] if left else []
    return ran, wrong


def read_outputs(out: Path) -> set[str]:
    """Return the names of the outputs of a command, each of which was read; raises what reading them raises."""
    places = [path for path in out.glob("*") if not path.name.startswith(".")]
    for path in places:
        if path.name in ("best.safetensors", "last.safetensors"):
            load_checkpoint(path)
        elif path.suffix == ".safetensors":
            read_tensors(path, key="vit_edge.state")
        elif path.suffix == ".onnx":
            open_model(path, warn=False)
        elif path.name == "record.json":
            read_record(path)
        elif path.name == "report.html" and not path.read_text().rstrip().endswith("</html>"):
            raise ValueError("report.html is cut short")
    # Two states are there but for the moment in which the older one is replaced.
    return {path.name for path in places} - {"state.previous.safetensors"}


def _start(command: Command, number: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "vit_edge", *command.arguments(number), "--quiet"]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _whole_run(command: Command, number: int) -> float:
    """Run the command to its end; return the seconds it took."""
    started = time.monotonic()
    process = _start(command, number)
    _, errors = process.communicate(timeout=_MOST_S)
    if process.returncode not in command.right:
        raise AssertionError(f"the command ended with {process.returncode}: {errors.decode(errors='replace')}")
    return time.monotonic() - started


def _kill(command: Command, number: int, rng: random.Random, seconds: float) -> bool:
    """Return whether the command was killed before it ended."""
    process = _start(command, number)
    if rng.random() < 0.5:
        _wait_for_files(process, command.out, rng.randint(1, _MOST_FILES_SEEN))
        time.sleep(rng.random() * 0.01)
    else:
        time.sleep(rng.random() * seconds)
    process.kill()
    _, errors = process.communicate()
    if process.returncode >= 0 and process.returncode not in command.right:
        raise AssertionError(f"the command ended with {process.returncode}: {errors.decode(errors='replace')}")
    return process.returncode < 0


def _wait_for_files(process: subprocess.Popen[bytes], out: Path, count: int) -> None:
    """Wait until the process has begun to write so many files, or has ended."""
    seen: set[str] = set()
    end = time.monotonic() + _MOST_S
    while len(seen) < count and process.poll() is None and time.monotonic() < end:
        if out.exists():
            seen |= {name for name in os.listdir(out) if f".{process.pid}." in name}
        time.sleep(0.0005)
