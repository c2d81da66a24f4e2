"""`python -m tests.faults.fuzzing.kills --kills N --seed S`: SIGKILL at random moments over all writers.

Most kills hit a process that replaces a file, pair or folder again and again, by the function that the commands use:
half of them before a system call, which does not depend on how busy the machine is, and half at any moment. One in 100
each hits a whole command: train, deploy, export, quantize, bundle, embed, repository and report. Then each output must
be the old or the new one, whole, and the next write must remove what the killed one left.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.faults.fuzzing.command_kills import kill_commands, read_vectors
from tests.faults.hostile_models import resealed_ir
from tests.support.networks import write_checkpoint
from vit_edge import cache
from vit_edge.checkpoint import load_checkpoint, save_checkpoint
from vit_edge.cli.output import make_table
from vit_edge.errors import VitEdgeError
from vit_edge.export import ExportOptions, export_onnx
from vit_edge.export.deployment.record import write_record
from vit_edge.export.tracing import external_data
from vit_edge.files import write_atomic, write_folder
from vit_edge.model_file.artifact import ModelFile, open_model, reseal
from vit_edge.model_file.openvino_ir import open_ir
from vit_edge.model_file.weights import weights_entry
from vit_edge.model_file.writing import write_ir, write_model
from vit_edge.runtime.tuned_configuration import TunedConfiguration, save_configuration, tuned_configuration
from vit_edge.runtime.vectors_file import open_vectors
from vit_edge.tensor_file import read_tensors, write_tensors

__all__ = ["Writer", "kill_writers", "main", "make_writers"]

# A write of these takes one to twenty milliseconds on an idle machine.
_LONGEST_S = 0.04
# A write of these makes 20 to 60 system calls: two writes.
_MOST_CALLS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """Something written again and again: `write(folder, n)` for even and odd n; `read(folder)` raises if broken."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], object]


def make_writers(source: Path) -> dict[str, Writer]:
    """Return the writers; `source` is a folder with `c.safetensors`, `m.onnx` and `m.xml`."""
    checkpoint, model = load_checkpoint(source / "c.safetensors"), open_model(source / "m.onnx", warn=False)
    others = {**dict(enumerate((model, _renamed(model))))}
    xml, weights = (source / "m.xml").read_bytes(), (source / "m.bin").read_bytes()
    pairs = [(xml, weights), (resealed_ir(xml, weights + bytes(64)), weights + bytes(64))]
    large = [_with_weights_outside(model, more=bytes(64 * n)) for n in range(2)]
    states = [{"weights": torch.full((5000,), float(n))} for n in range(2)]
    files = {"model.onnx": model.data, "inside/config.json": b"{}"}
    return {
        "checkpoint": Writer(
            write=lambda folder, n: save_checkpoint(folder / "a.safetensors", checkpoint),
            read=lambda folder: load_checkpoint(folder / "a.safetensors"),
        ),
        "state of a training": Writer(
            write=lambda folder, n: write_tensors(folder / "s", key="k", header={"step": n}, tensors=states[n % 2]),
            read=lambda folder: read_tensors(folder / "s", key="k"),
        ),
        "model file (export, quantize)": Writer(
            write=lambda folder, n: write_model(folder / "a.onnx", others[n % 2]),
            read=lambda folder: open_model(folder / "a.onnx", warn=False),
        ),
        "IR pair": Writer(
            write=lambda folder, n: write_ir(folder / "a.xml", *pairs[n % 2]),
            read=lambda folder: open_ir(folder / "a.xml"),
        ),
        "network over 2 GiB": Writer(
            write=lambda folder, n: write_model(folder / "a.onnx", large[n % 2]),
            read=lambda folder: open_model(folder / "a.onnx", warn=False),
        ),
        "folder of a hub": Writer(
            write=lambda folder, n: write_folder(folder / "a", files),
            read=lambda folder: open_model(_newest(folder) / "model.onnx", warn=False),
        ),
        "seal": Writer(
            write=lambda folder, n: _seal(folder / "a.onnx", model.data),
            read=lambda folder: open_model(folder / "a.onnx", warn=False),
        ),
        "vectors of an encoder": Writer(
            write=lambda folder, n: _write_vectors(folder / "v.npy", 300 + n % 2),
            read=lambda folder: read_vectors(folder / "v.npy"),
        ),
        "record of a deployment": Writer(
            write=lambda folder, n: write_record(folder, {"schema": 1, "n": [n] * 2000}),
            read=lambda folder: (folder / "record.json").read_text().endswith("}\n") or _broken(),
        ),
        "cache": Writer(
            write=lambda folder, n: cache.remember("refused", "k", {"reason": "x" * (n % 2)}) or _broken(),
            read=lambda folder: cache.recall("refused", "k") or _broken(),
        ),
        "tuned configuration": Writer(
            write=lambda folder, n: save_configuration(
                model, TunedConfiguration(engine="onnxruntime", threads=1 + n % 2, p50_ms=1.0)
            ) or _broken(),
            read=lambda folder: tuned_configuration(model) or _broken(),
        ),
    }  # fmt: skip


def _renamed(model: ModelFile) -> ModelFile:
    return open_model(model.with_manifest(replace(model.manifest, name="another" * 40)), warn=False)


def _with_weights_outside(model: ModelFile, *, more: bytes) -> ModelFile:
    """Return the model as if it were over 2 GiB: its weights are in a second file, with `more` at the end."""
    graph = model.graph()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "_MOST_INSIDE_BYTES", 10_000)
        weights = (external_data.move_weights_out(graph.graph, file="a.onnx.data") or b"") + more
    manifest = replace(model.manifest, weights=weights_entry("a.onnx.data", weights))
    return ModelFile.from_graph(graph, manifest, weights=weights)


def _newest(folder: Path) -> Path:
    """Return the folder that was written, or the older one if the process was killed between two renames."""
    return folder / "a" if (folder / "a").exists() else folder / ".vit-edge.previous.a"


def _seal(path: Path, data: bytes) -> None:
    if not path.exists():
        write_atomic(path, data)
    write_atomic(path, reseal(path).data)


def _write_vectors(path: Path, count: int) -> None:
    with open_vectors(path, width=8, force=True) as vectors:
        vectors.add([f"{count}/{n}.png" for n in range(count)], np.full((count, 8), count, np.float32))
        vectors.finish()


def _broken() -> Any:
    raise ValueError("the entry is gone or broken")


def kill_writers(source: Path, *, kills: int, seed: int, work: Path) -> tuple[Counter[str], list[str]]:
    """Return how many kills each writer got, and what was lost, unreadable or left behind."""
    os.environ["VIT_EDGE_CACHE"] = str(work / "cache")
    writers, rng = make_writers(source), random.Random(seed)
    ran, wrong = Counter[str](), list[str]()
    for name, writer in writers.items():
        (work / name).mkdir()
        writer.write(work / name, 0)
    for number in range(kills):
        name = [*writers][number % len(writers)]
        _kill(writers[name], work / name, rng)
        ran[name] += 1
        wrong += [f"kill {number}: {name}: {problem}" for problem in _problems(writers[name], work / name)]
    return ran, wrong


def _kill(writer: Writer, folder: Path, rng: random.Random) -> None:
    call = rng.randint(1, _MOST_CALLS) if rng.random() < 0.5 else None
    with warnings.catch_warnings():  # threads of torch do not matter: the child only writes
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            number = 0
            if call is not None:
                _die_before(call)
            while True:
                number += 1
                writer.write(folder, number)
        os._exit(1)
    if call is None:
        time.sleep(rng.random() * _LONGEST_S)
        os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise AssertionError("the writer ended before it was killed")


def _die_before(call: int) -> None:
    """Kill this process before its system call of this number: rename, fsync, unlink and the like."""
    made = 0

    def count(_frame: object, event: str, function: Any) -> None:
        nonlocal made
        made += event == "c_call" and getattr(function, "__module__", None) == os.name
        if made == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def _problems(writer: Writer, folder: Path) -> list[str]:
    """Return what is wrong after a kill: unreadable, or left behind after the next write."""
    found = []
    try:
        writer.read(folder)
    except (VitEdgeError, OSError, ValueError) as error:
        found.append(f"unreadable: {error}")
    writer.write(folder, 1)
    writer.read(folder)
    places = [folder, *(cache.cache_folder().iterdir() if cache.cache_folder().exists() else ())]
    left = [path.name for place in places for path in place.iterdir() if path.name.startswith(".vit-edge.")]
    return [*found, *(f"left behind: {name}" for name in left)]


def main(arguments: Sequence[str]) -> int:
    """Kill the writers, print the table and what is wrong; return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path, help="folder with c.safetensors, m.onnx and m.xml; made if not given")
    parser.add_argument("--only", action="append", default=[], help="kill this command alone; repeatable")
    given = parser.parse_args(arguments)
    logging.getLogger("vit_edge").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="vit-edge-kills-") as folder:
        source = given.source or Path(folder)
        if given.source is None:
            write_checkpoint(source / "c.safetensors")
            export_onnx(source / "c.safetensors", out=source / "m.onnx")
            export_onnx(source / "c.safetensors", out=source / "m.xml", options=ExportOptions(format="openvino"))
        work, of_each = Path(folder) / "work", given.kills // 100
        work.mkdir()
        more, wrong_too = kill_commands(work / "commands", kills=of_each, seed=given.seed, only=given.only)
        of_writers = 0 if given.only else given.kills - sum(more.values())
        ran, wrong = kill_writers(source, kills=of_writers, seed=given.seed, work=work)
        ran, wrong = ran + more, [*wrong, *wrong_too]
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(make_table("", ("writer", "kills"), [(name, str(count)) for name, count in ran.items()]))
    for line in wrong:
        console.print(line)
    console.print(f"{sum(ran.values())} kills, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
