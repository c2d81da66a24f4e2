"""Files of ours and of others in the runtime's own engines, with its settings; OpenVINO with a fixed batch too."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import numpy as np

from support.quantizing import ORT_DYNAMIC, ORT_STATIC, Made, make, why_not
from support.results import RESULTS, find_section, new_file, write_section
from support.timing import Load, Samples, Watch, count, take_turns
from vit_edge.errors import UsageError, VitEdgeError
from vit_edge.files import sha256_hex
from vit_edge.image import Pixels
from vit_edge.metrics import Logits, sqnr_db
from vit_edge.model_file.artifact import Manifest, ModelFile, open_model
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines import ov, ov_graph
from vit_edge.runtime.engines.protocol import Array, Engine, EngineOptions, make_engine

# OpenVINO takes other kernels where the batch is fixed; the runtime leaves it free.
Setting: TypeAlias = Literal["ONNX Runtime", "OpenVINO, batch fixed", "OpenVINO, batch free"]
ORT: Setting = "ONNX Runtime"
OV_FIXED: Setting = "OpenVINO, batch fixed"
OV_FREE: Setting = "OpenVINO, batch free"
OPENVINO: tuple[Setting, ...] = (OV_FIXED, OV_FREE)
SETTINGS: tuple[Setting, ...] = (ORT, *OPENVINO)
FLOAT, PLAIN = "float32", ", plain graph"
# Of two float graphs of one network; DeiT-tiny's are 108 dB apart.
_SAME_SQNR_DB = 80.0
# Milliseconds [rounds, queries] by file and setting.
TimedSamples: TypeAlias = "dict[tuple[str, Setting], Samples]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A file under the name it has in the tables; `made` is how, where it was made in this run."""

    name: str
    path: Path
    model: ModelFile
    settings: tuple[Setting, ...]
    made: Made | None = None

    @property
    def parts(self) -> tuple[Path, ...]:
        """Return its files: OpenVINO's format has two."""
        return (self.path, self.path.with_suffix(".bin")) if self.path.suffix == ".xml" else (self.path,)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all its files."""
        return sum(part.stat().st_size for part in self.parts)

    @property
    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of each of its files."""
        return {part.name: sha256_hex(part.read_bytes()) for part in self.parts}


def measure_and_write(
    parser: argparse.ArgumentParser,
    section: str,
    run: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Take the options of every comparison, `run` it, and write its figures as JSON and as a section of results."""
    parser.add_argument("--rounds", type=count, default=30)
    parser.add_argument("--queries", type=count, default=20, help="of each candidate in each round")
    parser.add_argument("--json", type=new_file, help="write every figure here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file with the section to write")
    arguments = parser.parse_args()
    find_section(section, arguments.results)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = run(arguments, Path(folder))
    except VitEdgeError as error:
        sys.exit(f"error: {error}")
    written = table(result)
    print(written)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, default=asdict) + "\n", encoding="utf-8")
    write_section(section, written, arguments.results)


def float_file(path: Path) -> Contestant:
    """Return our float32 file, from which all others are made; raises UsageError where it is another."""
    return Contestant(name=FLOAT, path=path, model=_opened_float(path), settings=SETTINGS)


def plain_file(path: Path, reference: Contestant) -> Contestant:
    """Return the same network, exported without the fused inference graph: what other tools usually get."""
    plain = Contestant(name=f"{FLOAT}{PLAIN}", path=path, model=_opened_float(path), settings=SETTINGS)
    preprocessing = reference.model.manifest.preprocessing
    if plain.model.manifest.preprocessing == preprocessing:
        images_NHWC = golden_images(range(4), height=preprocessing.crop[0], width=preprocessing.crop[1])
        logits = [answers(contestant, ORT, images_NHWC) for contestant in (reference, plain)]
        if logits[0].shape == logits[1].shape and sqnr_db(*logits) > _SAME_SQNR_DB:
            return plain
    reason = f"it does not answer as {reference.path.name} does"
    remedy = "give what `vit-edge export --no-fuse` makes of the same checkpoint"
    raise UsageError("cannot compare with", file=path, reason=reason, remedy=remedy)


def our_file(path: Path, reference: Contestant, *, made: Made | None = None, options: str = "") -> Contestant:
    """Return an INT8 file of ours; raises UsageError where it was not made from `reference`."""
    model = _opened(path)
    origin = model.manifest.provenance.get("float_model_sha256")
    if not model.manifest.precision.startswith("int8") or origin != reference.model.sha256:
        reason = f"it is {model.manifest.precision} and made from {str(origin)[:12]}, not from {reference.path.name}"
        remedy = f"make it from {reference.path.name} with `vit-edge quantize`"
        raise UsageError("cannot compare", file=path, reason=reason, remedy=remedy)
    what = options or f"{path.name}: {_recipe(model.manifest)}"
    return Contestant(name=f"ours, {what}", path=path, model=model, settings=SETTINGS, made=made)


def our_files(paths: Sequence[Path], reference: Contestant) -> list[Contestant]:
    """Return INT8 files of ours; raises UsageError where two would have one name in the tables."""
    found = [our_file(path, reference) for path in paths]
    if len({contestant.name for contestant in found}) < len(found):
        reason = f"two of these have one name: {', '.join(path.name for path in paths)}"
        raise UsageError("cannot compare", reason=reason, remedy="rename one of them")
    return found


def peer(method: str, source: Contestant, made: Made) -> Contestant:
    """Return what another tool made of `source`: in its own engine, with our manifest, which says how to feed it."""
    in_onnx = method in (ORT_STATIC, ORT_DYNAMIC)
    data = made.path.read_bytes() if in_onnx else b""
    model = ModelFile(data=data, proto=None, manifest=source.model.manifest, source=str(made.path))
    name = method + source.name.removeprefix(FLOAT)
    return Contestant(name=name, path=made.path, model=model, settings=(ORT,) if in_onnx else OPENVINO, made=made)


def make_peers(
    methods: Sequence[str], sources: Sequence[Contestant], *, calibration: Path, folder: Path
) -> tuple[list[Contestant], list[str]]:
    """Return what other tools make of the float files, and a sentence for each that makes nothing."""
    peers, notes = [], []
    for source in sources:
        for method in methods:
            reason = why_not(method)
            if reason is None:
                try:
                    made = make(method, source.path, calibration=calibration, folder=folder)
                    peers.append(peer(method, source, made))
                    continue
                except VitEdgeError as error:  # the others are still to be measured
                    reason = str(error)
            print(f"warning: {method}: {reason}", file=sys.stderr, flush=True)
            notes.append(f"Not measured: {method} of {source.path.name}: {reason}.")
    return peers, notes


class Runner:
    """A contestant loaded in one setting, one thread, that answers one image at a time."""

    def __init__(self, contestant: Contestant, setting: Setting) -> None:
        self.contestant, self.setting = contestant, setting
        self.engine = _engine(contestant, setting)

    def answer(self, prepared: Array) -> Logits:
        """Return logits float32 [1, classes] for what the graph takes itself."""
        return self.engine.tensors(prepared, ["logits"])[0]

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


def prepare(contestant: Contestant, images_NHWC: Sequence[Pixels] | Pixels) -> Iterator[Array]:
    """Yield what the graph takes for each image by itself."""
    for image in images_NHWC:
        yield np.ascontiguousarray(contestant.model.manifest.network_input(image[None]))


def answers(contestant: Contestant, setting: Setting, images_NHWC: Sequence[Pixels] | Pixels) -> Logits:
    """Return logits float32 [images, classes], image by image: what was made may look at a whole batch."""
    runner = Runner(contestant, setting)
    logits_BK = np.concatenate([runner.answer(prepared) for prepared in prepare(contestant, images_NHWC)])
    runner.close()
    return logits_BK


def time_all(contestants: Sequence[Contestant], *, rounds: int, queries: int) -> tuple[TimedSamples, Load]:
    """Return the samples of every contestant in each of its settings, and what else went on meanwhile."""
    runners = [Runner(contestant, setting) for contestant in contestants for setting in contestant.settings]
    height, width = contestants[0].model.manifest.preprocessing.crop
    images_NHWC = golden_images(range(4), height=height, width=width)
    asked = [partial(_ask, runner, list(prepare(runner.contestant, images_NHWC))) for runner in runners]
    print(f"timing: {len(asked)} candidates, {rounds} rounds", file=sys.stderr, flush=True)
    watch = Watch()
    samples_CRQ = take_turns(asked, rounds=rounds, queries=queries)
    load = watch.stop()
    for runner in runners:
        runner.close()
    keys = [(runner.contestant.name, runner.setting) for runner in runners]
    return dict(zip(keys, samples_CRQ, strict=True)), load


def latency(samples_RQ: Samples) -> dict[str, float]:
    """Return median and minimum in milliseconds."""
    return {"median_ms": float(np.median(samples_RQ)), "min_ms": float(samples_RQ.min())}


def _ask(runner: Runner, prepared: Sequence[Array], number: int) -> None:
    runner.answer(prepared[number % len(prepared)])


def _opened_float(path: Path) -> ModelFile:
    model = _opened(path)
    if model.manifest.precision != "float32" or model.weights is not None:
        reason = f"its precision is {model.manifest.precision}{', its weights lie beside it' if model.weights else ''}"
        remedy = "give the float32 file that `vit-edge export` wrote, in one file"
        raise UsageError("cannot compare with", file=path, reason=reason, remedy=remedy)
    return model


def _opened(path: Path) -> ModelFile:
    model = open_model(path)
    if model.manifest.batch not in (None, 1):
        reason = f"its batch is fixed at {model.manifest.batch}; batch 1 is what is measured"
        raise UsageError("cannot compare", file=path, reason=reason, remedy="give a file with a free batch")
    return model


def _recipe(manifest: Manifest) -> str:
    recorded = manifest.quantization or {}
    return " ".join(str(recorded[key]) for key in ("target", "recipe") if key in recorded) or manifest.precision


def _engine(contestant: Contestant, setting: Setting) -> Engine:
    options = EngineOptions(threads=1, batch_size=1 if setting == OV_FIXED else None)
    if setting == ORT:
        return make_engine("onnxruntime", contestant.model, options)

    def compile_model(
        core: Any, model: ModelFile, device: str, settings: dict[str, Any], batch_size: int | None
    ) -> Any:
        graph = ov_graph.read_graph(core, model) if model.data else core.read_model(contestant.path)
        if batch_size is not None:
            graph.reshape([batch_size, *list(graph.input().partial_shape)[1:]])
        return core.compile_model(graph, device, settings)

    # The runtime's own engine and settings; only how the graph gets into it is another.
    with patch.object(ov, "_compile", compile_model):
        return make_engine("openvino", contestant.model, options)
