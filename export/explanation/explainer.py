"""Where the error comes from: the same images in every form of a network, and the noise and time of each layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx

from vit_edge.data import Rejections, stream_pixels
from vit_edge.errors import DataRejected, printable
from vit_edge.export.explanation.inputs import ExplanationOptions, Preparation, prepare_explanation
from vit_edge.export.explanation.layer_noise import Columns, scaled_columns, sqnr_by_op
from vit_edge.export.explanation.layer_times import EngineTimes, layer_times
from vit_edge.export.explanation.stages import RemadeStage, remade_stages
from vit_edge.export.graph.macs import macs_by_node
from vit_edge.export.graph.matmuls import QuantizableOp, find_quantizable_ops
from vit_edge.export.graph.preparation import prepare
from vit_edge.export.quantization.algorithms.sensitivity import noise_by_op
from vit_edge.export.verification.request import Model
from vit_edge.image import Pixels
from vit_edge.metrics import Logits, decibels, sqnr_db
from vit_edge.model_file.artifact import PIXELS_INPUT, ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.load_policy import without_sandbox
from vit_edge.runtime.engines.protocol import Array, EngineOptions, chosen_engines
from vit_edge.runtime.loading import load_model
from vit_edge.runtime.notebook import html_table

if TYPE_CHECKING:
    from vit_edge.export.tracing.network import Network

__all__ = ["Explanation", "Layer", "Stage", "explain"]

_BATCH = 16
# All ONNX forms run in this engine, so that two stages differ in the network alone.
_ENGINE = "onnxruntime"
# The key of the manifest that lists the tensors that are int8 in OpenVINO only.
_OPENVINO_ROUNDS = "openvino_rounds"
# Images on which each op is quantized alone: 51 ops of DeiT-tiny take 45 seconds on 16 (busy machine).
_MOST_ALONE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One form of the network: its logits against those of the first form and of the form before.

    `agreement` is the percentage of images with the prediction of the first form; None for the first form itself.
    """

    name: str
    engine: str
    note: str
    sqnr_db: float | None
    sqnr_before_db: float | None
    agreement: float | None
    agreement_before: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One op with constant weights: its node, billions of multiply-accumulates per image, and its noise.

    `sqnr_db` is the SQNR of the op's output in the file, noise of earlier layers included; `alone_sqnr_db` that of the
    logits if only this op is quantized, and `noise_share` its percentage of the sum of all such noise. None is unknown.
    """

    node: str
    operator: str
    gmac: float | None
    sqnr_db: float | None
    alone_sqnr_db: float | None
    noise_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Explanation:
    """The stages in order, the noise of each layer, its time in each engine, and what was left out and why."""

    name: str
    precision: str
    num_images: int
    stages: tuple[Stage, ...]
    layers: tuple[Layer, ...]
    engines: tuple[EngineTimes, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        near = "-" if last.sqnr_db is None else f"{last.sqnr_db:.1f}"
        what = f"{self.name!r}, {self.precision}, {self.num_images} images, {len(self.layers)} layers"
        return f"<Explanation {what}: SQNR {near} dB against {first.name}>"

    def _repr_html_(self) -> str:
        rows = [
            (stage.name, stage.engine, "-" if stage.sqnr_db is None else f"{stage.sqnr_db:.1f} dB", stage.note)
            for stage in self.stages
        ]
        return html_table(repr(self)[1:-1], ("stage", "engine", "SQNR", "what changed"), rows)


def explain(
    model: Model,
    *,
    reference: Model,
    data: str | os.PathLike[str],
    options: ExplanationOptions | None = None,
    progress: Progress = silent,
) -> Explanation:
    """Return where the error of a quantized file comes from: stage by stage and layer by layer, with times.

        >>> options = ExplanationOptions(calibration="images/train", num_images=16)
        >>> found = explain("model.int8.onnx", reference="model.onnx", data="images/test", options=options)
        >>> found
        <Explanation ..., int8, 16 images, ... layers: SQNR ... dB against fused graph>
        >>> worst = max(found.layers, key=lambda layer: layer.noise_share or 0)

    The images in `data` need no labels. Raises DataRejected if no image can be read or the calibration images are
    others, ModelRejected or VerificationFailed if a form of the network does not run, InputError and UsageError.
    """
    options = options or ExplanationOptions()
    prepared = prepare_explanation(model, reference=reference, data=data, options=options, progress=progress)
    return _explained(prepared, progress)


def _explained(prepared: Preparation, progress: Progress) -> Explanation:
    breakdown = _Breakdown(prepared, progress)
    last = breakdown.run()
    layers = _layers(prepared, breakdown.images_NHWC, last, progress)
    nodes = [layer.node for layer in layers]
    engines = chosen_engines(prepared.options.engines)
    candidate, source = prepared.model, prepared.reference
    return Explanation(
        name=candidate.manifest.name,
        precision=candidate.manifest.precision,
        num_images=len(breakdown.images_NHWC),
        stages=tuple(breakdown.stages),
        layers=tuple(layers),
        engines=tuple(layer_times(candidate, source, engine, nodes=nodes, progress=progress) for engine in engines),
        notes=tuple(_left_out(prepared)),
    )


class _Breakdown:
    """The stages so far, and the logits of the first and of the latest."""

    def __init__(self, prepared: Preparation, progress: Progress) -> None:
        self.stages: list[Stage] = []
        self.images_NHWC = _pixels(prepared, progress)
        self._prepared, self._progress = prepared, progress
        self._first: Logits | None = None
        self._before: Logits | None = None

    def run(self) -> RemadeStage | None:
        """Run every stage; return the last one that was made again, if any."""
        prepared = self._prepared
        if prepared.network is not None:
            self._torch(prepared.network)
        form = prepared.reference.manifest.provenance.get("form")
        name = "fused graph" if form == "fused" else "float32 file"
        self._add(name, _ENGINE, f"the reference file, {printable(prepared.reference.source)}", prepared.reference)
        last = None
        if prepared.calibration is not None:
            for last in remade_stages(
                prepared.model, prepared.reference, prepared.calibration, progress=self._progress
            ):
                self._add(last.name, _ENGINE, last.note, last.model(prepared.model))
        others = [engine for engine in chosen_engines(prepared.options.engines) if engine != _ENGINE]
        self._add("the file", _ENGINE, "the file", prepared.model)
        if last is not None:
            self._compare_with_remade()
        for engine in others:
            self._in_other_engine(engine)
        return last

    def _in_other_engine(self, engine: str) -> None:
        """Run the file in another engine; tensors that are rounded only there make a separate stage."""
        model, note = self._prepared.model, "same file, other kernels"
        quantization = dict(model.manifest.quantization or {})
        if engine == "openvino" and quantization.pop(_OPENVINO_ROUNDS, None):
            manifest = replace(model.manifest, quantization=quantization, golden=None)
            without = open_model(model.with_manifest(manifest), warn=False)
            self._add("the file, less attention-scores", engine, note, without)
            note = "attention scores from int8 queries and keys, which is faster in this engine only"
        self._add("the file", engine, note, model)

    def _torch(self, network: Network) -> None:
        from vit_edge.export.tracing.network import reference_logits

        run = reference_logits(network.model, network.preprocessing)
        images_NHWC, parts = self.images_NHWC, []
        for start in range(0, len(images_NHWC), _BATCH):
            self._progress("running PyTorch", start, len(images_NHWC))
            parts.append(run(images_NHWC[start : start + _BATCH]))
        self._progress("running PyTorch", len(images_NHWC), len(images_NHWC))
        self._keep("PyTorch", "pytorch", f"the network of {printable(network.name)}", np.concatenate(parts))
        self._progress("tracing plain ONNX", 0, 1)
        plain = _plain_file(network, self._prepared.reference)
        self._progress("tracing plain ONNX", 1, 1)
        self._add("plain ONNX", _ENGINE, "traced without fusion", plain)

    def _add(self, name: str, engine: str, note: str, model: ModelFile) -> None:
        self._keep(name, engine, note, self._logits(f"running {name} in {engine}", engine, model))

    def _logits(self, stage: str, engine: str, model: ModelFile) -> Logits:
        images_NHWC, parts = self.images_NHWC, []
        options = EngineOptions(threads=self._prepared.options.threads)
        with load_model(
            model, engine=engine, options=options, verify="hash", warn=False, policy=without_sandbox()
        ) as classifier:
            for start in range(0, len(images_NHWC), _BATCH):
                self._progress(stage, start, len(images_NHWC))
                parts.append(classifier.run(images_NHWC[start : start + _BATCH]))
        self._progress(stage, len(images_NHWC), len(images_NHWC))
        return np.concatenate(parts)

    def _keep(self, name: str, engine: str, note: str, logits_BK: Logits) -> None:
        first, before = self._first, self._before
        self.stages.append(
            Stage(
                name=name,
                engine=engine,
                note=note,
                sqnr_db=None if first is None else sqnr_db(first, logits_BK),
                sqnr_before_db=None if before is None else sqnr_db(before, logits_BK),
                agreement=None if first is None else self._agreement(first, logits_BK),
                agreement_before=None if before is None else self._agreement(before, logits_BK),
            )
        )
        self._first, self._before = logits_BK if first is None else first, logits_BK

    def _agreement(self, first_BK: Logits, found_BK: Logits) -> float | None:
        """Return the agreement in percent; an encoder makes no predictions that could agree."""
        return None if self._prepared.reference.manifest.is_encoder else _agreement(first_BK, found_BK)

    def _compare_with_remade(self) -> None:
        """Note on the latest stage, the file, whether it equals the last stage that was made again."""
        level = self.stages[-1].sqnr_before_db
        note = "the file: bit for bit equal to the stage before"
        if level is not None and np.isfinite(level):
            note = f"the file: {level:.1f} dB against the stage before; another version or CPU made it"
        self.stages[-1] = replace(self.stages[-1], note=note)


def _layers(prepared: Preparation, images_NHWC: Pixels, last: RemadeStage | None, progress: Progress) -> list[Layer]:
    """Return every quantizable op of the float32 file in graph order."""
    manifest = prepared.reference.manifest
    float_graph, graph = (file.graph() for file in (prepared.reference, prepared.model))
    float_graph = prepare(float_graph)
    ops = find_quantizable_ops(float_graph)
    levels = sqnr_by_op(
        float_graph,
        graph,
        ops,
        _counted((manifest.network_input(image[None])[0] for image in images_NHWC), len(images_NHWC), progress),
        scaled=_scaled(prepared, float_graph, ops),
    )
    alone = _alone(last, [manifest.network_input(image[None]) for image in images_NHWC], progress)
    total, macs = sum(alone.values()), macs_by_node(float_graph) or {}
    return [
        Layer(
            node=op.node,
            operator=op.operator,
            gmac=macs[op.node] / 1e9 if op.node in macs else None,
            sqnr_db=levels.get(op.node),
            alone_sqnr_db=_level(alone.get(op.node)),
            noise_share=100 * alone[op.node] / total if total and op.node in alone else None,
        )
        for op in ops
    ]


def _counted(images: Iterator[Array], total: int, progress: Progress) -> Iterator[Array]:
    for number, image in enumerate(images):
        progress("comparing layers", number, total)
        yield image
    progress("comparing layers", total, total)


def _scaled(prepared: Preparation, graph: onnx.ModelProto, ops: Sequence[QuantizableOp]) -> Mapping[str, Columns]:
    """Return the channels that the file scales, by op; none if the manifest does not list that algorithm."""
    quantization = prepared.model.manifest.quantization
    algorithms = (quantization or {}).get("algorithms", ("cross-layer-equalization",))
    if quantization is None or not isinstance(algorithms, list | tuple) or "cross-layer-equalization" not in algorithms:
        return {}
    return scaled_columns(graph, ops)


def _alone(last: RemadeStage | None, images: Sequence[Array], progress: Progress) -> dict[str, float]:
    """Return the noise of each quantized op, alone in a float32 network; empty if nothing was made again."""
    if last is None:
        return {}
    number = min(_MOST_ALONE, len(images))
    chosen = [images[position * len(images) // number] for position in range(number)]
    found = last.calibrated
    ops = [op for op in found.ops if op.node not in last.left]
    return noise_by_op(found.graph, ops, found.only, chosen, progress=progress)


def _level(noise: float | None) -> float | None:
    return None if noise is None else decibels(1.0, noise)


def _agreement(expected_BK: Logits, found_BK: Logits) -> float:
    return 100 * float(np.mean(expected_BK.argmax(axis=1) == found_BK.argmax(axis=1)))


def _pixels(prepared: Preparation, progress: Progress) -> Pixels:
    paths, found = prepared.images, []
    rejections = Rejections(len(paths))
    for position, pixels in stream_pixels(paths, prepared.reference.manifest.preprocessing, rejections=rejections):
        progress("reading images", position, len(paths))
        found.append(pixels)
    progress("reading images", len(paths), len(paths))
    if not found:
        reason, remedy = f"none of the {len(paths)} images can be read", "give other images with --data"
        raise DataRejected("cannot explain with these images", reason=reason, remedy=remedy)
    return np.stack(found)


def _left_out(prepared: Preparation) -> Iterator[str]:
    if prepared.network is None:
        yield "without --checkpoint, the stages before the reference file are left out"
    if prepared.calibration is None and prepared.model.manifest.precision.startswith("int8"):
        yield "without --calibration, the stages of the algorithms and the share of the noise are left out"


def _plain_file(network: Network, reference: ModelFile) -> ModelFile:
    """Return the network, traced without fusion, as a model file."""
    from vit_edge.export.tracing.network import traced_form
    from vit_edge.export.tracing.options import ExportOptions
    from vit_edge.export.tracing.outputs import finish
    from vit_edge.export.tracing.tracer import trace

    options = ExportOptions(fuse=False)
    height, width = network.preprocessing.crop
    graph = finish(trace(traced_form(network, options), height=height, width=width), options)
    manifest = replace(
        reference.manifest,
        input=dict(PIXELS_INPUT),
        outputs=("logits",),
        golden=None,
        evaluation=None,
        provenance={"form": "plain"},
    )
    return ModelFile.from_graph(graph, manifest)
