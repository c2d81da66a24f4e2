"""Quantize a model file with calibration images, and record what it was made from and how accurate it is."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import onnx

from vit_edge.data import draw_images, find_images
from vit_edge.errors import DataRejected, Interrupted, UsageError, printable
from vit_edge.export.graph.intermediate_tensors import logits_of
from vit_edge.export.graph.macs import macs_by_node
from vit_edge.export.parity.golden_vectors import promised_engines, with_answers
from vit_edge.export.quantization.accuracy_budget import SearchTrace, StepCache, ordered_by_noise, search_budget
from vit_edge.export.quantization.algorithms.recipes import EFFORTS, Algorithm, Recipe
from vit_edge.export.quantization.algorithms.sensitivity import noise_by_op
from vit_edge.export.quantization.calibrated_graph import CalibratedGraph, Plan, calibrate, uncalibrated
from vit_edge.export.quantization.calibration.cache import CalibrationCache, default_folder
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.coverage import Coverage, coverage
from vit_edge.export.quantization.float16_file import to_float16_file
from vit_edge.export.quantization.manifest_record import record_of, with_evaluation
from vit_edge.export.quantization.options import Precision, QuantizationOptions, check_options, check_target
from vit_edge.export.quantization.qdq.channels_first import channels_first
from vit_edge.export.quantization.qdq.integer_chains import only_for_onnxruntime
from vit_edge.export.quantization.qdq.placement import Scheme
from vit_edge.export.quantization.speed import Speed, compare_speed
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.export.verification.encoder_results import AnyVerification
from vit_edge.export.verification.encoder_verifier import run_any_verification
from vit_edge.export.verification.request import Model, VerificationRequest, open_request, opened
from vit_edge.files import may_write, sha256_hex, write_atomic
from vit_edge.machine.cpu import instruction_set
from vit_edge.machine.targets import Resolved, Target, resolve_target
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress, silent
from vit_edge.runtime.checks.acceptance import accept_own
from vit_edge.runtime.checks.load_policy import without_sandbox
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines
from vit_edge.runtime.loading import admit, load_model
from vit_edge.runtime.notebook import html_table

__all__ = ["QuantizationResult", "quantize"]

_DEFAULTS = QuantizationOptions()
_FEW_IMAGES = 32
# Below this many dB predictions change that should not; a usual ViT has 19 to 25.
_LEAST_DB, _NUM_CHECKED, _NUM_WORST = 15.0, 8, 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class QuantizationResult:
    """The file written, what calibrated it, the ops left in float32, and how accurate and fast it is.

    `accounts` say what algorithms did and left alone; `calibration_sqnr_db` is of the logits of calibration images.
    `verification` is there if evaluation images were given, `search` if there was an accuracy budget; `coverage` and
    `speed` have one entry for each engine. A float16 file has no target, algorithms, coverage or speed.
    """

    model: Path
    sha256: str
    size_bytes: int
    size_ratio: float
    precision: Precision
    target: Target | None = None
    target_reason: str | None = None
    recipe: Recipe | None = None
    algorithms: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    calibration_sqnr_db: float | None = None
    num_calibration_images: int = 0
    num_ops: int = 0
    float32_ops: tuple[str, ...] = ()
    float_share: float = 0.0
    coverage: tuple[Coverage, ...] = ()
    speed: tuple[Speed, ...] = ()
    search: SearchTrace | None = None
    verification: AnyVerification | None = None

    def __repr__(self) -> str:
        kept = f", {len(self.float32_ops)} in float32" if self.float32_ops else ""
        size = f"{self.size_bytes / 1e6:.2f} MB, {self.size_ratio:.2f} of the float32 file"
        speeds = "".join(f", {one.ratio:.2f} times as fast in {one.engine}" for one in self.speed)
        verdict = f", {self.verification.verdict}" if self.verification and self.search else ""
        return f"<QuantizationResult {self.model}: {self.precision}, {size}, {self.num_ops} ops{kept}{speeds}{verdict}>"

    def _repr_html_(self) -> str:
        speeds = {one.engine: f"{one.ratio:.2f}" for one in self.speed}
        rows = [(one.engine, f"{one.percent_of_all:.1f} %", speeds.get(one.engine, "-")) for one in self.coverage]
        caption = f"{self.model}, {self.precision}, {self.size_bytes / 1e6:.2f} MB"
        return html_table(caption, ("engine", "share of the multiplications in INT8", "times as fast as float32"), rows)


def quantize(
    model: Model,
    *,
    calibration: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    options: QuantizationOptions = _DEFAULTS,
    force: bool = False,
    progress: Progress = silent,
) -> QuantizationResult:
    """Write a quantized file of the float32 file `model`, a path or an opened file, with the images in `calibration`.

        >>> quantize("model.onnx", calibration="images/train", out="vit.int8.onnx")
        <QuantizationResult vit.int8.onnx: int8, ... MB, ... of the float32 file, ... ops, ... times as fast in ...>

    "int8-dynamic" runs without such images, and is more accurate with them; "float16" takes none. With evaluation
    images `data` the result is verified and its figures are kept in the file; they must not overlap the calibration
    images. With an accuracy budget in `options`, ops stay in float32 until `data` certify it. Raises DataRejected,
    ModelRejected, NotTrusted, UsageError, VerificationFailed.
    """
    job = _opened(model, calibration=calibration, out=out, data=data, options=options, force=force, progress=progress)
    if options.precision == "float16":
        return _float16(job)
    found = _calibrated(job)
    trace, finished, verification = _chosen(job, found)
    finished = with_evaluation(finished, verification, trace)
    write_atomic(job.out, finished.data)
    if trace is not None and trace.cut_short == "interrupted":
        remedy = "run the same command to continue; the file holds the best model so far and its verdict"
        raise Interrupted("stopped", file=job.out, reason="interrupted by the user", remedy=remedy)
    level = None if job.folder is None else _checked_noise(job, found, trace)
    return _result(job, found, finished, trace, verification, level)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """Everything that `quantize` was given, opened and checked; `request` is there if there are evaluation images."""

    source: ModelFile
    images: CalibrationImages
    folder: str | os.PathLike[str] | None
    out: Path
    target: Resolved
    request: VerificationRequest | None
    options: QuantizationOptions
    deadline: float | None
    progress: Progress

    def verify(self, candidate: ModelFile) -> AnyVerification:
        """Return how the candidate compares with the source, in the engines that it was checked in."""
        assert self.request is not None
        request = replace(self.request, model=candidate, engines=promised_engines(candidate))
        return run_any_verification(request, progress=self.progress)


def _opened(
    model: Model,
    *,
    calibration: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    options: QuantizationOptions,
    force: bool,
    progress: Progress,
) -> _Job:
    deadline = None if options.time_limit_s is None else time.monotonic() + options.time_limit_s
    source = opened(model)
    check_options(options, calibrated=calibration is not None, evaluated=data is not None)
    target = resolve_target(options.target)
    _check_source(source, options.precision)
    check_target(options.precision, target.target, source)
    # Hostile or damaged graphs end here, not in fresh golden vectors.
    admit(source, engines=[*dict.fromkeys(("onnxruntime", *promised_engines(source)))])
    load_model(source, options=EngineOptions()).close()
    found = () if calibration is None else find_images(calibration)
    paths = draw_images(found, options.calibration_images, seed=options.seed)
    _warn_of_one_class(paths, source.manifest.labels)
    written = may_write(out, force=force, made_from=source.source)
    request = None if data is None else _request(source, data, options)
    evaluation = request.reference_run.path_of if request is not None else {}
    images = CalibrationImages(paths, source.manifest, judging=evaluation, progress=progress)
    return _Job(
        source=source,
        images=images,
        folder=calibration,
        out=written,
        target=target,
        request=request,
        options=options,
        deadline=deadline,
        progress=progress,
    )


def _request(source: ModelFile, data: str | os.PathLike[str], options: QuantizationOptions) -> VerificationRequest:
    """Return a request that serves every candidate made from `source`."""
    return open_request(
        source,
        reference=source,
        data=data,
        max_drop_points=options.max_drop_points,
        min_agreement=options.min_agreement,
        min_neighbours=options.min_neighbours,
        unlabelled=options.without_labels,
    )


def _check_source(source: ModelFile, precision: Precision) -> None:
    if source.manifest.precision != "float32":
        reason = f"the file is {source.manifest.precision}; quantization starts from float32"
        remedy = "give the file that `vit-edge export` wrote"
        raise UsageError("cannot quantize", file=source.source, reason=reason, remedy=remedy)
    if source.weights is not None and precision != "float16":
        reason = "the weights are in a second file, as they exceed 2 GiB; int8 supports one file only"
        raise UsageError("cannot quantize", file=source.source, reason=reason, remedy="use a smaller network")


def _float16(job: _Job) -> QuantizationResult:
    """Write the float16 file, verified if there are evaluation images."""
    model = to_float16_file(job.source, progress=job.progress)
    verification = None if job.request is None else job.verify(model)
    model = with_evaluation(model, verification, None)
    write_atomic(job.out, model.data)
    return QuantizationResult(
        model=job.out,
        sha256=model.sha256,
        size_bytes=len(model.data),
        size_ratio=_size_ratio(model, job.source),
        precision="float16",
        verification=verification,
    )


def _calibrated(job: _Job) -> CalibratedGraph:
    """Return the float32 graph with ranges and weights for INT8."""
    options, target = job.options, job.target.target
    plan = Plan(
        algorithms=_fitting(options.chosen_algorithms, target),
        effort=EFFORTS[options.effort],
        scheme=Scheme(weight_bits=target.weight_bits, activation=target.activation),
        method=options.ranges,
        batch_size=options.batch_size,
        dynamic=options.precision == "int8-dynamic",
        named=tuple(options.algorithms or ()),
    )
    if job.folder is None:
        return uncalibrated(job.source.graph(), plan)
    cache = CalibrationCache(preprocessing=job.source.manifest.preprocessing) if options.use_cache else None
    needs_noise = options.budget is not None
    found = calibrate(job.source.graph(), job.images, plan, needs_noise=needs_noise, cache=cache, progress=job.progress)
    _check_calibration(job.images.hashes, job.folder)
    return found


def _fitting(algorithms: Sequence[Algorithm], target: Target) -> tuple[Algorithm, ...]:
    """Return the algorithms without integers in attention where the CPU's integer kernel for it is slower."""
    return tuple(name for name in algorithms if not (target.channels_first and name == "attention-scores"))


def _check_calibration(hashes: Sequence[str], folder: str | os.PathLike[str]) -> None:
    if len(hashes) > 1 and len(set(hashes)) == 1:
        reason = f"all {len(hashes)} images are the same"
        raise DataRejected("cannot calibrate", file=folder, reason=reason, remedy="give images like those in use")
    if len(hashes) < _FEW_IMAGES:
        _log.warning("few calibration images (%d): ranges from fewer than %d vary", len(hashes), _FEW_IMAGES)


def _warn_of_one_class(paths: Sequence[Path], labels: Sequence[str]) -> None:
    folders = {path.parent.name for path in paths}
    if len(labels) > 1 and len(folders) == 1 and folders <= {*labels}:
        text = (
            "all %d calibration images are of the class %r: ranges may not suit the others; give images of all classes"
        )
        _log.warning(text, len(paths), printable(folders.pop()))


def _chosen(job: _Job, found: CalibratedGraph) -> tuple[SearchTrace | None, ModelFile, AnyVerification | None]:
    """Return the file to write: that of the accuracy search if there is a budget, else that of the recipe."""
    make = partial(_candidate, job, found)
    if job.options.budget is None:
        finished = make(found.float32_ops)
        if job.request is not None:
            return None, finished, job.verify(finished)
        for engine in promised_engines(finished):  # a verification loads the file too
            load_model(finished, engine=engine, options=EngineOptions(), warn=False, policy=without_sandbox()).close()
            accept_own(finished, engine=engine)
        return None, finished, None
    order = ordered_by_noise(found.noise, macs_by_node(found.graph) or {})
    cache = StepCache(default_folder().parent / "budget", judged_by=_judged_by(job)) if job.options.use_cache else None
    return search_budget(
        [node for node in order if node not in found.float32_ops],
        lambda more: make(found.float32_ops | more),
        job.verify,
        cache=cache,
        deadline=job.deadline,
        progress=job.progress,
    )


def _judged_by(job: _Job) -> str:
    """Return one hash of everything besides the candidate that decides a verdict."""
    assert job.request is not None
    run, budget = job.request.reference_run, job.options.budget
    parts = {
        "reference": job.source.sha256,
        "images": sorted(zip(run.hashes, run.images.labels, run.images.truths or run.images.labels, strict=True)),
        "budget": asdict(budget) if budget else None,
        "engines": [(name, metadata.version(name)) for name in installed_engines()],
        "cpu": instruction_set(),
    }
    return sha256_hex(json.dumps(parts).encode())


def _candidate(job: _Job, found: CalibratedGraph, left: frozenset[str]) -> ModelFile:
    """Return the INT8 file with the ops `left` in float32, and the golden logits of each installed engine."""
    return with_answers(_unproven(job, found, left), job.source)


def _unproven(job: _Job, found: CalibratedGraph, left: frozenset[str]) -> ModelFile:
    """Return the INT8 file without golden vectors."""
    source = job.source
    quantized = found.quantized(left)
    target = job.target.target
    record = record_of(target, found, left, job.images, job.options)
    entry = dict(source.manifest.input)
    if record["batch"] is not None:
        fix_batch(quantized.graph, record["batch"])
        entry["batch"] = record["batch"]
    if target.channels_first:
        quantized = channels_first(quantized)
    skips = only_for_onnxruntime(quantized)
    manifest = replace(
        source.manifest,
        precision="int8-dynamic" if found.dynamic else "int8",
        input=entry,
        evaluation=None,
        golden=None,
        macs=_macs(found, left),
        quantization={**record, "openvino_skips": skips} if skips else record,
        provenance={**source.manifest.provenance, "float_model_sha256": source.sha256, "onnx": onnx.__version__},
    )
    return ModelFile.from_graph(quantized, manifest)


def _result(
    job: _Job,
    found: CalibratedGraph,
    finished: ModelFile,
    trace: SearchTrace | None,
    verification: AnyVerification | None,
    level: float | None,
) -> QuantizationResult:
    left = found.float32_ops | frozenset(() if trace is None else trace.float32_ops)
    finished = replace(finished, source=printable(job.out))
    engines = promised_engines(finished)
    speed: tuple[Speed, ...] = ()
    if job.options.measure_speed:
        all_integer = _unproven(job, found, frozenset()) if left else None
        speed = compare_speed(job.source, finished, all_integer, engines=engines, progress=job.progress)
    return QuantizationResult(
        model=job.out,
        sha256=finished.sha256,
        size_bytes=len(finished.data),
        size_ratio=_size_ratio(finished, job.source),
        precision=job.options.precision,
        target=job.target.target,
        target_reason=job.target.reason,
        recipe=job.options.recipe,
        algorithms=found.applied,
        accounts=tuple(map(str, found.accounts)),
        calibration_sqnr_db=level,
        num_calibration_images=len(job.images.hashes),
        num_ops=len(found.ops) - len(left),
        float32_ops=tuple(sorted(left)),
        float_share=_share(found, left),
        coverage=tuple(coverage(finished, engine) for engine in engines),
        speed=speed,
        search=trace,
        verification=verification,
    )


def _checked_noise(job: _Job, found: CalibratedGraph, trace: SearchTrace | None) -> float:
    """Return the SQNR of the logits on a few calibration images in dB; warn, by the worst layers, if it is low."""
    left = found.float32_ops | frozenset(() if trace is None else trace.float32_ops)
    images = [image[None] for image in job.images.sample(_NUM_CHECKED)]
    level = sqnr_db(logits_of(found.graph, images), logits_of(found.quantized(left), images))
    if level < _LEAST_DB:
        quantized = [op for op in found.ops if op.node not in left]
        noise = found.noise or noise_by_op(found.graph, quantized, found.only, images, progress=job.progress)
        worst = sorted((op.node for op in quantized), key=lambda node: -noise[node])[:_NUM_WORST]
        text = "the logits of INT8 are only %.1f dB above its noise on calibration images (usual: over %g); worst: %s"
        _log.warning(text, level, _LEAST_DB, ", ".join(worst))
    return level


def _size_ratio(model: ModelFile, source: ModelFile) -> float:
    return len(model.data) / (len(source.data) + len(source.weights or b""))


def _macs(found: CalibratedGraph, left: frozenset[str]) -> dict[str, int] | None:
    """Return the multiply-accumulates of one image by precision, None if shapes are unknown."""
    macs = macs_by_node(found.graph)
    if macs is None:
        return None
    quantized = sum(macs[op.node] for op in found.ops if op.node not in left)
    return {"int8": quantized, "float32": sum(macs.values()) - quantized}


def _share(found: CalibratedGraph, left: frozenset[str]) -> float:
    """Return the share of multiplications with constant weights that stay in float32."""
    macs = macs_by_node(found.graph) or {}
    total = sum(macs.get(op.node, 0) for op in found.ops)
    return sum(macs.get(node, 0) for node in left) / total if total else 0.0
