"""What each layer costs in time: the profiles that engines keep of the float file and of the one made from it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.artifact import ModelFile, open_model, pack
from vit_edge.errors import EngineUnavailable
from vit_edge.export.costs import PRODUCTS
from vit_edge.export.coverage import coverage, nodes_in_onnxruntime, nodes_in_openvino, running_nodes
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engine import EngineOptions
from vit_edge.runtime.golden import golden_images
from vit_edge.runtime.guard import check_graph

__all__ = ["BETWEEN", "EngineTimes", "LayerTime", "OperatorTime", "layer_times"]

Times: TypeAlias = npt.NDArray[np.float64]

# Both files by turns, so that drift hits both alike: 24 runs each that count.
_ROUNDS, _RUNS_A_TURN, _WARM_UP = 6, 4, 3
# What the engine needs beside its nodes, so that the sum is the whole run.
BETWEEN = "between the nodes"
_KERNEL = "_kernel_time"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """Median milliseconds of one product in the float file and in the other; None where no node of its own is left.

    `precision` is what the engine computes it in, in the second file.
    """

    node: str
    precision: Literal["integer", "float"]
    reference_ms: float | None
    candidate_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorTime:
    """Median milliseconds of all nodes of one operator that are no product of a layer; None where there is none."""

    operator: str
    reference_ms: float | None
    candidate_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTimes:
    """One engine's profile, one thread: `layers` and `rest` add up to the whole run of either file."""

    engine: str
    version: str
    batch_size: int
    num_runs: int
    reference_ms: float
    candidate_ms: float
    layers: tuple[LayerTime, ...]
    rest: tuple[OperatorTime, ...]


def layer_times(
    model: ModelFile, reference: ModelFile, engine: str, *, nodes: Sequence[str], progress: Progress = silent
) -> EngineTimes:
    """Return what `engine` takes for each product of `nodes`, and for everything else, in both files.

    What an engine computes together with a product (its bias, a GELU) counts as that product. Raises ModelRejected,
    EngineUnavailable for an engine without a profile, MissingExtra.
    """
    if engine not in _PROFILERS:
        reason = f"{engine!r} keeps no profile"
        raise EngineUnavailable("cannot time layers", reason=reason, remedy=f"choose {' or '.join(_PROFILERS)}")
    found = coverage(model, engine)
    left_float = {product.node for product in found.float_products}
    with tempfile.TemporaryDirectory(prefix="vit-edge.") as folder:
        profilers = [
            _PROFILERS[engine](_named(file), Path(folder) / str(n)) for n, file in enumerate((reference, model))
        ]
        _run(profilers, engine, progress)
        before, after = (_Summary.of(profiler) for profiler in profilers)
    operators = sorted(
        {*before.rest, *after.rest}, key=lambda name: -max(before.rest.get(name, 0), after.rest.get(name, 0))
    )
    return EngineTimes(
        engine=engine,
        version=found.version,
        batch_size=model.manifest.batch or 1,
        num_runs=_ROUNDS * _RUNS_A_TURN,
        reference_ms=before.whole_ms,
        candidate_ms=after.whole_ms,
        layers=tuple(
            LayerTime(
                node=node,
                precision="float" if node in left_float or model.manifest.precision != "int8" else "integer",
                reference_ms=before.layers.get(node),
                candidate_ms=after.layers.get(node),
            )
            for node in nodes
        ),
        rest=tuple(
            OperatorTime(operator=name, reference_ms=before.rest.get(name), candidate_ms=after.rest.get(name))
            for name in operators
        ),
    )


class _Profiler(Protocol):
    """One file in one engine; `walls_ms` has an entry for each run, and `profile` tells what the nodes took in it."""

    walls_ms: list[float]

    def __init__(self, model: ModelFile, folder: Path) -> None: ...

    def run(self) -> None: ...

    def profile(self) -> _Profile: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Profile:
    """Milliseconds of each node in each run, what each is, and the product of which layer it computes, if any."""

    ms_KR: Times
    kinds: Sequence[str]
    layers: Sequence[str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Summary:
    """Medians over the runs; the whole is their sum, with what passes between the nodes."""

    layers: dict[str, float]
    rest: dict[str, float]

    @classmethod
    def of(cls, profiler: _Profiler) -> _Summary:
        profile, num_runs = profiler.profile(), _ROUNDS * _RUNS_A_TURN
        ms_KR, walls_R = profile.ms_KR[:, -num_runs:], np.array(profiler.walls_ms[-num_runs:])
        layers: dict[str, float] = {}
        rest: dict[str, float] = {}
        for median_ms, kind, layer in zip(np.median(ms_KR, axis=1), profile.kinds, profile.layers, strict=True):
            into, name = (rest, kind) if layer is None else (layers, layer)
            into[name] = into.get(name, 0.0) + float(median_ms)
        rest[BETWEEN] = max(0.0, float(np.median(walls_R - ms_KR.sum(axis=0))))
        return cls(layers=layers, rest=rest)

    @property
    def whole_ms(self) -> float:
        return sum(self.layers.values()) + sum(self.rest.values())


def _run(profilers: Sequence[_Profiler], engine: str, progress: Progress) -> None:
    stage = f"timing layers in {engine}"
    for profiler in profilers:
        for _ in range(_WARM_UP):
            profiler.run()
    for number in range(_ROUNDS):
        progress(stage, number, _ROUNDS)
        for profiler in profilers:
            for _ in range(_RUNS_A_TURN):
                profiler.run()
    progress(stage, _ROUNDS, _ROUNDS)


@dataclass(slots=True)
class _OnnxRuntime:
    """ONNX Runtime writes its profile to a file, node by node under the names of its optimised graph."""

    model: ModelFile
    folder: Path
    walls_ms: list[float] = field(default_factory=list)
    _session: Any = None
    _feed: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vit_edge.runtime.ort import make_session

        self.folder.mkdir()
        optimised, profile = self.folder / "optimised.onnx", self.folder / "profile"
        self._session = make_session(self.model, EngineOptions(threads=1), optimised=optimised, profile=profile)
        self._feed = _feed(self.model)

    def run(self) -> None:
        started = time.perf_counter_ns()
        self._session.run(["logits"], self._feed)
        self.walls_ms.append((time.perf_counter_ns() - started) / 1e6)

    def profile(self) -> _Profile:
        events = json.loads(Path(self._session.end_profiling()).read_bytes())
        taken: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                key = (event["name"].removesuffix(_KERNEL), event["args"]["op_name"])
                taken.setdefault(key, []).append(event["dur"] / 1e3)
        optimised = onnx.load(self.folder / "optimised.onnx").graph
        found = nodes_in_onnxruntime(optimised, _graph(self.model))
        layer_of = {node.name: layer for layer, nodes in found.items() for node in nodes}
        layers = [layer_of.get(name) for name, _ in taken]
        kinds = [f"{kind} without a weight" if kind.removeprefix("Fused") in PRODUCTS else kind for _, kind in taken]
        return _Profile(ms_KR=_rectangular(taken, len(self.walls_ms)), kinds=kinds, layers=layers)


@dataclass(slots=True)
class _OpenVino:
    """OpenVINO tells after each run what its nodes took, under the names of the graph that it runs."""

    model: ModelFile
    folder: Path
    walls_ms: list[float] = field(default_factory=list)
    _compiled: Any = None
    _request: Any = None
    _feed: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    _taken: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vit_edge.runtime.ov import compile_model

        self._compiled = compile_model(self.model, EngineOptions(threads=1), profile=True)
        self._request, self._feed = self._compiled.create_infer_request(), _feed(self.model)

    def run(self) -> None:
        started = time.perf_counter_ns()
        self._request.infer(self._feed)
        self.walls_ms.append((time.perf_counter_ns() - started) / 1e6)
        for info in self._request.profiling_info:
            key = (info.node_name, info.node_type)
            self._taken.setdefault(key, []).append(info.real_time.total_seconds() * 1e3)

    def profile(self) -> _Profile:
        running = list(running_nodes(self._compiled.get_runtime_model()))
        graph = _graph(self.model)
        found = nodes_in_openvino(running, graph)
        layer_of = {entry.names[0]: layer for layer, entries in found.items() for entry in entries}
        operators = {name: node.op_type for node in graph.node for name in (node.name, *node.output)}
        made_of = {entry.names[0]: [operators[name] for name in entry.names if name in operators] for entry in running}
        # It names what it fuses after ONNX nodes; what it made itself goes by its own word.
        kinds = [", ".join(dict.fromkeys(made_of.get(name, ()))) or kind for name, kind in self._taken]
        layers = [layer_of.get(name) for name, _ in self._taken]
        return _Profile(ms_KR=_rectangular(self._taken, len(self.walls_ms)), kinds=kinds, layers=layers)


_PROFILERS: Mapping[str, type[_OnnxRuntime] | type[_OpenVino]] = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino}


def _rectangular(taken: Mapping[tuple[str, str], Sequence[float]], num_runs: int) -> Times:
    """Return [nodes, runs]: the last `num_runs` of each node, zeros before them where it was told of less often."""
    found = np.zeros((len(taken), num_runs))
    for row, values in zip(found, taken.values(), strict=True):
        last = values[-num_runs:]
        row[num_runs - len(last) :] = last
    return found


def _named(model: ModelFile) -> ModelFile:
    """Return the file with a name of its own for each node, as `prepare` gives them: profiles go by it."""
    proto = onnx.load_model_from_string(model.data)
    taken: set[str] = set()
    changed = False
    for node in proto.graph.node:
        name = node.name or node.output[0]
        while name in taken:
            name += "_"
        taken.add(name)
        changed, node.name = changed or name != node.name, name
    if not changed:
        return model
    del proto.metadata_props[:]
    named = open_model(pack(proto.SerializeToString(deterministic=True), model.manifest), warn=False)
    check_graph(named)
    return named


def _graph(model: ModelFile) -> onnx.GraphProto:
    return onnx.load_model_from_string(model.data).graph


def _feed(model: ModelFile) -> dict[str, npt.NDArray[Any]]:
    manifest = model.manifest
    height, width = manifest.preprocessing.crop
    images_NHWC = golden_images([0] * (manifest.batch or 1), height=height, width=width)
    return {manifest.input["name"]: manifest.network_input(images_NHWC)}
