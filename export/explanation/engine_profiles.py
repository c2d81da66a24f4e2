"""The time of each node of a file in an engine, run by run, from the profile that the engine keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.export.graph.macs import PRODUCTS
from vit_edge.export.quantization.coverage import nodes_in_onnxruntime, nodes_in_openvino, running_nodes
from vit_edge.image import Pixels
from vit_edge.model_file.artifact import ModelFile
from vit_edge.runtime.checks.golden import golden_images
from vit_edge.runtime.engines.protocol import EngineOptions

__all__ = ["PROFILERS", "Profile", "Profiler", "one_batch"]

Times: TypeAlias = npt.NDArray[np.float64]

_KERNEL = "_kernel_time"
# The name of MatMuls that belong to no layer: those of attention.
_WITHOUT_WEIGHT = "{} without a weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Milliseconds of each node in each run, its operator, and the quantizable op that it computes, if any."""

    ms_KR: Times
    kinds: Sequence[str]
    ops: Sequence[str | None]


class Profiler(Protocol):
    """One file in one engine, one thread; the engine writes into `folder`, which must not exist yet."""

    def __init__(self, model: ModelFile, folder: Path) -> None: ...

    def run(self) -> None:
        """Run one image, or the batch that the file is fixed at."""
        ...

    def profile(self) -> Profile:
        """Return the profile of all runs; no further run can follow."""
        ...


class _OnnxRuntime:
    """ONNX Runtime writes its profile to a file, node by node under the names of its optimised graph."""

    def __init__(self, model: ModelFile, folder: Path) -> None:
        from vit_edge.runtime.engines.ort import make_session

        folder.mkdir()
        self._output = model.manifest.output
        self._graph, self._optimised = model.graph().graph, folder / "optimised.onnx"
        self._feed, self._num_runs = _feed(model), 0
        self._session = make_session(
            model, EngineOptions(threads=1), optimised=self._optimised, profile=folder / "profile"
        )

    def run(self) -> None:
        self._session.run([self._output], self._feed)
        self._num_runs += 1

    def profile(self) -> Profile:
        events = json.loads(Path(self._session.end_profiling()).read_bytes())
        taken: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                key = (event["name"].removesuffix(_KERNEL), event["args"]["op_name"])
                taken.setdefault(key, []).append(event["dur"] / 1e3)
        found = nodes_in_onnxruntime(onnx.load(self._optimised).graph, self._graph)
        op_of = {node.name: op for op, nodes in found.items() for node in nodes}
        return Profile(
            ms_KR=_rectangular(taken.values(), self._num_runs),
            kinds=[_kind([kind.removeprefix("Fused")], kind) for _, kind in taken],
            ops=[op_of.get(name) for name, _ in taken],
        )


class _OpenVino:
    """OpenVINO reports the mean time of each node over all runs so far, under the names of the graph that it runs.

    The difference of two sums is the time of the last run. Means come in whole microseconds, an error of up to one for
    each run so far, which the median over the runs leaves out.
    """

    def __init__(self, model: ModelFile, folder: Path) -> None:
        from vit_edge.runtime.engines.ov import compile_model

        self._graph, self._feed = model.graph().graph, _feed(model)
        self._compiled = compile_model(model, EngineOptions(threads=1), profile=True)
        self._request = self._compiled.create_infer_request()
        self._sums: dict[tuple[str, str], list[float]] = {}
        self._num_runs = 0

    def run(self) -> None:
        self._request.infer(self._feed)
        self._num_runs += 1
        for info in self._request.profiling_info:
            so_far_ms = info.real_time.total_seconds() * 1e3 * self._num_runs
            self._sums.setdefault((info.node_name, info.node_type), []).append(so_far_ms)

    def profile(self) -> Profile:
        running = list(running_nodes(self._compiled.get_runtime_model()))
        found = nodes_in_openvino(running, self._graph)
        op_of = {entry.names[0]: op for op, entries in found.items() for entry in entries}
        operators = {name: node.op_type for node in self._graph.node for name in (node.name, *node.output)}
        # Fused nodes are named after the ONNX nodes; nodes that OpenVINO added have names of OpenVINO only.
        made_of = {entry.names[0]: [operators[name] for name in entry.names if name in operators] for entry in running}
        each = [np.diff(sums, prepend=0.0) for sums in self._sums.values()]
        return Profile(
            ms_KR=_rectangular(each, self._num_runs),
            kinds=[_kind(made_of.get(name, ()), kind) for name, kind in self._sums],
            ops=[op_of.get(name) for name, _ in self._sums],
        )


PROFILERS: Mapping[str, type[Profiler]] = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino}


def one_batch(model: ModelFile) -> Pixels:
    """Return one image, or the batch that the file is fixed at."""
    height, width = model.manifest.preprocessing.crop
    return golden_images([0] * (model.manifest.batch or 1), height=height, width=width)


def _feed(model: ModelFile) -> dict[str, npt.NDArray[Any]]:
    return {model.manifest.input["name"]: model.manifest.network_input(one_batch(model))}


def _kind(operators: Sequence[str], own_name: str) -> str:
    """Return what a node computes that is not the op of a layer."""
    names = list(dict.fromkeys(operators))
    if len(names) == 1 and names[0] in PRODUCTS:
        return _WITHOUT_WEIGHT.format(names[0])
    return ", ".join(names) or own_name


def _rectangular(taken: Iterable[Sequence[float] | Times], num_runs: int) -> Times:
    """Return [nodes, runs]: the last `num_runs` of each node, with zeros in front if there are fewer."""
    rows = [np.asarray(values, np.float64)[-num_runs:] for values in taken]
    return np.stack([np.pad(row, (num_runs - len(row), 0)) for row in rows])
