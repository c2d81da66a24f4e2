"""A float32 graph with all that is needed to quantize it: each algorithm of a recipe applied, in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from threadpoolctl import threadpool_limits

from vit_edge.errors import VerificationFailed
from vit_edge.export.graph.intermediate_tensors import Activations, logits_of
from vit_edge.export.graph.macs import shapes_for_one_image
from vit_edge.export.graph.matmuls import QuantizableOp, find_quantizable_ops, is_convolutional
from vit_edge.export.graph.preparation import prepare
from vit_edge.export.quantization.algorithms.attention_scores import find_scores, with_room
from vit_edge.export.quantization.algorithms.cross_layer_equalization import equalize, find_mixings
from vit_edge.export.quantization.algorithms.mixed_precision import choose_float
from vit_edge.export.quantization.algorithms.recipes import ALGORITHMS, CHOOSE_RANGES, Algorithm, Effort
from vit_edge.export.quantization.algorithms.reconstruction import Reconstruction, reconstruct
from vit_edge.export.quantization.algorithms.reparameterisation import find_norms, reparameterise
from vit_edge.export.quantization.algorithms.sensitivity import noise_by_op
from vit_edge.export.quantization.calibration.cache import CalibrationCache
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.calibration.observers import (
    Method,
    Range,
    observe_channels,
    observe_min_max,
    observe_ranges,
)
from vit_edge.export.quantization.qdq.dynamic_ranges import dynamic_ops, insert_dynamic
from vit_edge.export.quantization.qdq.integers import QuantizedWeight
from vit_edge.export.quantization.qdq.placement import Scheme, insert_qdq, range_names
from vit_edge.metrics import sqnr_db
from vit_edge.progress import Progress, silent

__all__ = ["CalibratedGraph", "Plan", "calibrate", "uncalibrated"]

Array: TypeAlias = npt.NDArray[Any]

# Exact algorithms leave float32 rounding only; over a hundred dB was measured.
_EXACT_DB = 60.0
_NUM_PROOFS = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be done: which algorithms with how much effort, which integers, how ranges are found at first.

    `dynamic` ranges are found at run time; then algorithms that choose ranges have nothing to do.
    """

    algorithms: tuple[Algorithm, ...]
    effort: Effort
    scheme: Scheme
    method: Method = "moving-average"
    batch_size: int = 1
    dynamic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedGraph:
    """What `calibrate` found; `quantized` makes the INT8 graph of it.

    `noise` is each product's share of noise in the logits, where it was measured. `float32_ops` are those that the
    recipe leaves float, `openvino_rounds` what 127 stands for in what is int8 in OpenVINO only.
    """

    graph: onnx.ModelProto
    ops: tuple[QuantizableOp, ...]
    ranges: Mapping[str, Range]
    weights: Mapping[str, QuantizedWeight]
    scheme: Scheme
    applied: tuple[Algorithm, ...]
    noise: Mapping[str, float]
    float32_ops: frozenset[str]
    openvino_rounds: Mapping[str, float] = field(default_factory=dict)
    dynamic: bool = False

    def only(self, node: str) -> onnx.ModelProto:
        """Return the graph with one product in integers."""
        return self.quantized(frozenset(op.node for op in self.ops if op.node != node))

    def quantized(self, exclude: frozenset[str] | None = None) -> onnx.ModelProto:
        """Return the INT8 graph; the products `exclude` stay float, by default those of the recipe."""
        left = self.float32_ops if exclude is None else exclude
        scheme = replace(self.scheme, exclude=left)
        if left >= {op.node for op in self.ops}:
            return self.graph
        if self.dynamic:
            return insert_dynamic(self.graph, scheme=scheme, weights=self.weights)
        return insert_qdq(self.graph, self.ranges, scheme=scheme, weights=self.weights)


def calibrate(
    model: onnx.ModelProto,
    images: CalibrationImages,
    plan: Plan,
    *,
    needs_noise: bool = False,
    cache: CalibrationCache | None = None,
    progress: Progress = silent,
) -> CalibratedGraph:
    """Return the float32 graph `model` with ranges and weights for integers, from calibration images.

    Algorithms that do not fit the graph are left out: all of them where convolutions do most of the work, whose ranges
    are then as `plan.method` finds them. Raises DataRejected, ModelRejected, UsageError.
    """
    # Linear algebra on more threads sums in another order, and some weights are rounded the other way: the same inputs
    # would give other bytes where more CPUs are granted. The sums of ONNX Runtime do not depend on its threads.
    with threadpool_limits(limits=1, user_api="blas"):
        return _calibrated(model, images, plan, needs_noise=needs_noise, cache=cache, progress=progress)


def _calibrated(
    model: onnx.ModelProto,
    images: CalibrationImages,
    plan: Plan,
    *,
    needs_noise: bool,
    cache: CalibrationCache | None,
    progress: Progress,
) -> CalibratedGraph:
    graph = prepare(model)
    ops = _quantizable_ops(graph, plan)
    sample = [image[None] for image in images.sample(plan.effort.num_images)]
    wanted = _wanted(graph, plan)
    aligned, exact = _align(graph, images, wanted, plan, cache)
    _check_exact(graph, aligned, sample[:_NUM_PROOFS])
    scores = find_scores(aligned) if "attention-scores" in wanted else {}
    peaks = _peaks(aligned, list(scores), images, plan, cache)
    fitting = wanted & {"range-search", "gptq-rounding", "bias-correction"}
    fitted = Reconstruction(model=aligned, ranges={})
    if fitting or not plan.dynamic:
        fitted = _fitted(aligned, images, ops, sample, fitting, plan, cache, progress)
    calibrated = CalibratedGraph(
        graph=fitted.model,
        ops=ops,
        ranges={} if plan.dynamic else fitted.ranges,
        weights=fitted.weights,
        scheme=plan.scheme,
        applied=tuple(n for n in ALGORITHMS if n in exact | fitting or (n == "attention-scores" and peaks)),
        noise={},
        float32_ops=plan.scheme.exclude,
        openvino_rounds=with_room(peaks, scores, bits=plan.scheme.weight_bits),
        dynamic=plan.dynamic,
    )
    if not (needs_noise or "mixed-precision" in wanted):
        return calibrated
    return _with_noise(calibrated, sample, mixed="mixed-precision" in wanted, progress=progress)


def _peaks(
    graph: onnx.ModelProto,
    tensors: Sequence[str],
    images: CalibrationImages,
    plan: Plan,
    cache: CalibrationCache | None,
) -> dict[str, float]:
    """Return the averaged largest value of each tensor that is not always zero.

    In a pass of its own: observed with others, tensors change how ONNX Runtime fuses, and so their last bit.
    """
    if not tensors:
        return {}
    found, _ = observe_min_max(graph, tensors, images, batch_size=plan.batch_size, cache=cache)
    peaks = {name: max(-found[name].low, found[name].high) for name in tensors}
    return {name: peak for name, peak in peaks.items() if peak > 0}


def _with_noise(
    calibrated: CalibratedGraph, sample: Sequence[Array], *, mixed: bool, progress: Progress
) -> CalibratedGraph:
    """Return it with each product's noise, and with the products that `mixed` precision leaves float."""
    ops = calibrated.ops
    noise = noise_by_op(calibrated.graph, ops, calibrated.only, sample, progress=progress)
    if not mixed:
        return replace(calibrated, noise=noise)
    left = calibrated.scheme.exclude | choose_float(calibrated.graph, ops, noise)
    applied = tuple(name for name in ALGORITHMS if name in calibrated.applied or name == "mixed-precision")
    return replace(calibrated, noise=noise, float32_ops=left, applied=applied)


def uncalibrated(model: onnx.ModelProto, plan: Plan) -> CalibratedGraph:
    """Return the float32 graph `model` as it is, for dynamic ranges: nothing is known of its activations."""
    graph = prepare(model)
    return CalibratedGraph(
        graph=graph,
        ops=_quantizable_ops(graph, plan),
        ranges={},
        weights={},
        scheme=plan.scheme,
        applied=(),
        noise={},
        float32_ops=plan.scheme.exclude,
        dynamic=True,
    )


def _quantizable_ops(graph: onnx.ModelProto, plan: Plan) -> tuple[QuantizableOp, ...]:
    return tuple(dynamic_ops(graph) if plan.dynamic else find_quantizable_ops(graph))


def _wanted(graph: onnx.ModelProto, plan: Plan) -> frozenset[Algorithm]:
    """Return the algorithms of the plan that are for such a graph."""
    if plan.algorithms and is_convolutional(graph):
        _log.info("Conv does most of the work: only ranges are calibrated, no algorithm applies")
        return frozenset()
    return frozenset(plan.algorithms) - (CHOOSE_RANGES if plan.dynamic else frozenset())


def _fitted(
    aligned: onnx.ModelProto,
    images: CalibrationImages,
    ops: Sequence[QuantizableOp],
    sample: Sequence[Array],
    fitting: frozenset[Algorithm],
    plan: Plan,
    cache: CalibrationCache | None,
    progress: Progress,
) -> Reconstruction:
    """Return ranges as the plan's method finds them, and what the algorithms `fitting` make of them."""
    names = range_names(aligned, plan.scheme)
    tensors = list(dict.fromkeys(names.values()))
    averaged, overall = observe_min_max(aligned, tensors, images, batch_size=plan.batch_size, cache=cache)
    start = averaged
    if plan.method != "moving-average":
        start = observe_ranges(aligned, tensors, images, method=plan.method, batch_size=plan.batch_size, cache=cache)
    if not fitting:
        return Reconstruction(model=aligned, ranges=dict(start))
    moved = {tensor: start[name] for tensor, name in names.items()}
    copies = _num_copies(aligned, sample[0])
    fitted = reconstruct(
        aligned, {**start, **moved}, overall, ops, [np.repeat(image, copies, axis=0) for image in sample],
        scheme=plan.scheme, algorithms=fitting, effort=plan.effort, progress=progress,
    )  # fmt: skip
    fitted.ranges = {name: fitted.ranges[name] for name in tensors}
    return fitted


def _num_copies(model: onnx.ModelProto, image: Array) -> int:
    """Return how many times an image has to be in a batch: more than once where constants inside hold the batch."""
    activations = Activations(model, [model.graph.output[0].name])
    list(activations.of([image[0]]))
    return activations.num_copies


def _align(
    graph: onnx.ModelProto,
    images: CalibrationImages,
    wanted: frozenset[Algorithm],
    plan: Plan,
    cache: CalibrationCache | None,
) -> tuple[onnx.ModelProto, frozenset[Algorithm]]:
    """Return the same function with channels of nearer ranges, and which algorithms found something to do."""
    norms = find_norms(graph) if "repq" in wanted else []
    mixings = find_mixings(graph, _known_shapes(graph)) if "cross-layer-equalization" in wanted else []
    observed = [*norms, *(mixing.input for mixing in mixings)]
    # Hashes of the images come with this pass, even where nothing is to be observed.
    ranges = observe_channels(graph, observed, images, batch_size=plan.batch_size, cache=cache)
    norms = [name for name in norms if ranges[name].varies]
    mixings = [mixing for mixing in mixings if ranges[mixing.input].varies]
    aligned = reparameterise(graph, {name: ranges[name] for name in norms})
    aligned = equalize(aligned, mixings, {mixing.input: ranges[mixing.input] for mixing in mixings})
    applied: dict[Algorithm, bool] = {"repq": bool(norms), "cross-layer-equalization": bool(mixings)}
    return aligned, frozenset(name for name, done in applied.items() if done)


def _known_shapes(graph: onnx.ModelProto) -> dict[str, list[int]]:
    return {name: shape for name, shape in shapes_for_one_image(graph).items() if shape is not None}


def _check_exact(before: onnx.ModelProto, after: onnx.ModelProto, images: Sequence[Array]) -> None:
    """Raise VerificationFailed where what should be the same function is another one."""
    logits = [logits_of(model, images) for model in (before, after)]
    level = sqnr_db(*logits)
    if level < _EXACT_DB:
        reason = f"an exact re-parameterisation changed the logits: {level:.1f} dB, at least {_EXACT_DB:g} are expected"
        remedy = "use --without repq --without cross-layer-equalization, and report it with the model"
        raise VerificationFailed("cannot quantize", reason=reason, remedy=remedy)
