"""SIGKILL at any moment of a whole command that writes: each of its outputs stays the old or the new one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import ROOT
from tests.support.networks import PREPROCESSING, SIZE, random_network, small_config
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.errors import VitEdgeError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.deployment.record import read_record
from vit_edge.export.tracing.network import reference_logits
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import open_model
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.tensor_file import read_tensors

__all__ = ["Command", "kill_commands", "make_commands", "read_outputs", "read_vectors"]

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
        **_of_model_files(folder, sources),
    }


def _of_model_files(folder: Path, sources: list[Path]) -> dict[str, Command]:
    """Return the commands that write one kind of output each; every other run has another input."""
    models, encoder = [path.with_suffix(".onnx") for path in sources], folder / "encoder.onnx"
    for source, model in zip(sources, models, strict=True):
        export_onnx(source, out=model)
    export_onnx(sources[0], out=encoder, options=ExportOptions(outputs=("embedding",)))
    images = [folder / "calibration", folder / "data"]

    def command(name: str, file: str, words: Callable[[int], Sequence[object]]) -> Command:
        out = folder / name
        out.mkdir()

        def arguments(number: int) -> list[str]:
            return [name, *map(str, words(number % 2)), f"--out={out / file}", "--force"]

        return Command(out=out, arguments=arguments, right=(0,))

    quick = ("--effort=fast", "--no-cache", "--no-speed", f"--calibration={images[0]}")
    found = (
        command("export", "a.xml", lambda n: (sources[n], "--format=openvino")),
        command("quantize", "a.onnx", lambda n: (models[n], *quick)),
        command("bundle", "a.pyz", lambda n: (models[n],)),
        command("embed", "a.npy", lambda n: (images[n], f"--model={encoder}")),
        command("repository", "", lambda n: (models[n], "--for=triton")),
        command("report", "a.html", lambda n: (models[n],)),
    )
    return {one.out.name: one for one in found}


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


def kill_commands(folder: Path, *, kills: int, seed: int, only: Collection[str] = ()) -> tuple[Counter[str], list[str]]:
    """Return how many kills each command got, and what was lost, unreadable or left behind."""
    commands, rng = make_commands(folder), random.Random(seed)
    ran, wrong = Counter[str](), list[str]()
    for name, command in commands.items():
        if only and name not in only:
            continue
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
    found = [path for path in out.rglob("*") if path.is_file()]
    places = [path for path in found if not any(part.startswith(".") for part in path.relative_to(out).parts)]
    for path in places:
        if path.name in ("best.safetensors", "last.safetensors"):
            load_checkpoint(path)
        elif path.suffix == ".safetensors":
            read_tensors(path, key="vit_edge.state")
        elif path.suffix == ".onnx":
            open_model(path, warn=False)
        elif path.name == "record.json":
            read_record(path)
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            raise ValueError(f"{path.name} is cut short")
        elif path.suffix == ".xml":
            open_ir(path)
        elif path.suffix == ".pyz":
            _check_archive(path)
        elif path.suffix == ".npy":
            read_vectors(path)
    # Two states are there but for the moment in which the older one is replaced.
    return {path.name for path in places} - {"state.previous.safetensors"}


def read_vectors(path: Path) -> None:
    """Read vectors and the names of their images, which a killed write may have set aside."""
    count = len(np.load(path))
    names = [path.with_suffix(".txt"), *path.parent.glob(".vit-edge.previous.*")]
    if not any(name.exists() and len(name.read_text().splitlines()) == count for name in names):
        raise ValueError("the vectors are not those of the names")


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken} in {path.name} is broken")


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
