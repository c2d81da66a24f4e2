"""Quantize a model file to INT8 with calibration images, and record what it was made from and how near it comes."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from vit_edge.data import find_images, pixel_hashes
from vit_edge.errors import DataRejected, Interrupted, UsageError, printable
from vit_edge.export.graph.macs import macs_by_node
from vit_edge.export.parity.golden_vectors import with_answers
from vit_edge.export.quantization.accuracy_budget import Ladder, RungMemory, climb, order_of
from vit_edge.export.quantization.algorithms.recipes import EFFORTS, EffortName, Recipe, choose_algorithms
from vit_edge.export.quantization.calibrated_graph import CalibratedGraph, Plan, calibrate, uncalibrated
from vit_edge.export.quantization.calibration.cache import CalibrationCache, default_folder
from vit_edge.export.quantization.calibration.images import CalibrationImages
from vit_edge.export.quantization.calibration.observers import METHODS, Method
from vit_edge.export.quantization.coverage import Coverage, coverage
from vit_edge.export.quantization.float16_file import halved
from vit_edge.export.quantization.manifest_record import record_of, with_evaluation
from vit_edge.export.quantization.precisions import PRECISIONS, Precision, check_options, check_target
from vit_edge.export.quantization.qdq.integer_chains import only_for_onnxruntime
from vit_edge.export.quantization.qdq.placement import Scheme
from vit_edge.export.quantization.speed import Speed, compare_speed
from vit_edge.export.tracing.outputs import fix_batch
from vit_edge.export.verification.paired_run import find_evaluation_images
from vit_edge.export.verification.results import Verification
from vit_edge.export.verification.verdict import Budget
from vit_edge.export.verification.verifier import verify
from vit_edge.files import may_write, sha256_hex, write_atomic
from vit_edge.machine.cpu import instruction_set
from vit_edge.machine.targets import DEFAULT_TARGET, Target, resolve_target
from vit_edge.model_file.artifact import ModelFile, open_model
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engines.protocol import EngineOptions, installed_engines
from vit_edge.runtime.loading import load_model

__all__ = ["QuantizationOptions", "QuantizationResult", "quantize", "quantize_model"]

_FEW_IMAGES = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationOptions:
    """How to quantize.

    `precision` "int8" has constant ranges, found on images; "int8-dynamic" finds them at run time, for CPUs, one
    image at a time; "fp16" halves the file. `target` is a name of `vit_edge.machine.targets.TARGETS`, "auto" for this
    machine, or a file from `vit-edge doctor --json`. `algorithms` replaces those of the recipe, `without` leaves some
    out. `ranges` is how ranges are found before any search. `batch_size` is that of calibration, and changes nothing
    but time. `time_limit_s`, counted from the start of `quantize`, ends the search for an accuracy budget with the best
    file so far.
    """

    precision: Precision = "int8"
    target: str = DEFAULT_TARGET
    recipe: Recipe = "fast"
    effort: EffortName = "balanced"
    algorithms: Sequence[str] | None = None
    without: Sequence[str] = ()
    ranges: Method = "averaged min-max"
    batch_size: int = 1
    max_drop_points: float | None = None
    min_agreement: float | None = None
    unlabelled: bool = False
    time_limit_s: float | None = None
    use_cache: bool = True
    measure_speed: bool = True

    def __post_init__(self) -> None:
        choose_algorithms(self.recipe, algorithms=self.algorithms, without=self.without)
        chosen = ((self.precision, PRECISIONS), (self.effort, tuple(EFFORTS)), (self.ranges, METHODS))
        for value, known in chosen:
            if value not in known:
                raise UsageError("cannot quantize", reason=f"{value!r} is unknown", remedy=f"choose {', '.join(known)}")
        if self.batch_size < 1 or not (self.time_limit_s is None or self.time_limit_s > 0):
            reason = f"batch size {self.batch_size}, time limit {self.time_limit_s}"
            raise UsageError("cannot quantize", reason=reason, remedy="give numbers above zero")

    @property
    def told(self) -> dict[str, Any]:
        """Return what is not as it is by default, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def without_labels(self) -> bool:
        """Return whether labels are not looked at: as was said, or because agreement alone is asked for."""
        return self.unlabelled or (self.max_drop_points is None and self.min_agreement is not None)

    @property
    def budget(self) -> Budget | None:
        """Return what may be lost, None where nothing was said."""
        if self.max_drop_points is None and self.min_agreement is None:
            return None
        return Budget(max_drop_points=self.max_drop_points, min_agreement=self.min_agreement)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationResult:
    """The file written, what calibrated it, what was left float, and what was found out about it.

    `verification` is there where images that judge were given, `coverage` and `speed` are one for each engine; a
    float16 file has neither of them, nor a target, algorithms or products.
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
    num_calibration_images: int = 0
    num_ops: int = 0
    float32_ops: tuple[str, ...] = ()
    float_share: float = 0.0
    coverage: tuple[Coverage, ...] = ()
    speed: tuple[Speed, ...] = ()
    ladder: Ladder | None = None
    verification: Verification | None = None


def quantize(
    model: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    options: QuantizationOptions = QuantizationOptions(),
    force: bool = False,
    progress: Progress = silent,
) -> QuantizationResult:
    """Write the INT8 model file `out` from the float32 file `model` and the images in `calibration`.

    "int8-dynamic" needs no such images, and comes nearer with them; "fp16" takes none. With images `data` the
    result is verified on them and the figures are kept in the file; calibration images that are also in `data` are
    refused. With an accuracy budget in `options` products stay float until `data` certify it. Raises DataRejected,
    ModelRejected, NotTrusted, UsageError, VerificationFailed.
    """
    return quantize_model(
        open_model(model), calibration=calibration, out=out, data=data, options=options, force=force, progress=progress
    )


def quantize_model(
    source: ModelFile,
    *,
    calibration: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    options: QuantizationOptions = QuantizationOptions(),
    force: bool = False,
    progress: Progress = silent,
) -> QuantizationResult:
    """Write what `quantize` writes, from a file that was opened already."""
    deadline = None if options.time_limit_s is None else time.monotonic() + options.time_limit_s
    check_options(options.precision, options.told, calibrated=calibration is not None)
    resolved = resolve_target(options.target)
    _check_source(source, options, data)
    check_target(options.precision, resolved.target, source)
    # Loaded as a user's application would: hostile or damaged graphs end here, not in fresh golden vectors.
    load_model(source, options=EngineOptions()).close()
    paths = [] if calibration is None else find_images(calibration)
    written = may_write(out, force=force, made_from=source.source)
    judging, judged_by = _judging(source, data, options)
    judge = partial(_judge, reference=source, data=data, options=options, progress=progress)
    if options.precision == "fp16":
        return _halve(source, written, judge if data is not None else None, progress)
    images = CalibrationImages(paths, source.manifest, judging=judging, progress=progress)
    found = _calibrated(source, images if paths else None, resolved.target, options, progress)
    if calibration is not None:
        _check_calibration(images.hashes, calibration)

    def make(left: frozenset[str]) -> ModelFile:
        return _finished(source, found, left, record_of(resolved.target, found, left, images, options))

    ladder: Ladder | None = None
    verification: Verification | None = None
    if options.budget is not None:
        memory = RungMemory(default_folder().parent / "budget", judged_by=judged_by) if options.use_cache else None
        ladder, finished, verification = _climbed(found, make, judge, memory, deadline, progress)
    else:
        finished = make(found.float32_ops)
        verification = judge(finished) if data is not None else None
    finished = with_evaluation(finished, verification, ladder)
    write_atomic(written, finished.data)
    if ladder is not None and ladder.cut_short == "interrupted":
        remedy = "it holds the best so far, its verdict in it; the same command goes on where it was stopped"
        raise Interrupted("stopped", file=written, reason="interrupted by the user", remedy=remedy)
    left = found.float32_ops | frozenset(() if ladder is None else ladder.float32_ops)
    all_integer = make(frozenset()) if left and options.measure_speed else None
    finished = replace(finished, source=printable(written))
    engines = _promised(finished)
    timed = partial(compare_speed, source, finished, all_integer, engines=engines, progress=progress)
    return QuantizationResult(
        **_written(written, finished, source),
        **_figures(found, left),
        precision=options.precision,
        target=resolved.target,
        target_reason=resolved.reason,
        recipe=options.recipe,
        num_calibration_images=len(images.hashes),
        coverage=tuple(coverage(finished, engine) for engine in engines),
        speed=timed() if options.measure_speed else (),
        ladder=ladder,
        verification=verification,
    )


def _halve(
    source: ModelFile, written: Path, judge: Callable[[ModelFile], Verification] | None, progress: Progress
) -> QuantizationResult:
    """Write the float16 file, verified where there is somebody to judge."""
    model = halved(source, progress=progress)
    verification = None if judge is None else judge(model)
    model = with_evaluation(model, verification, None)
    write_atomic(written, model.data)
    return QuantizationResult(**_written(written, model, source), precision="fp16", verification=verification)


def _climbed(
    found: CalibratedGraph,
    make: Callable[[frozenset[str]], ModelFile],
    judge: Callable[[ModelFile], Verification],
    memory: RungMemory | None,
    deadline: float | None,
    progress: Progress,
) -> tuple[Ladder, ModelFile, Verification]:
    """Return how far the budget let products become integers, and the file that it ended with."""
    noisy = order_of(found.noise, macs_by_node(found.graph) or {})
    return climb(
        [node for node in noisy if node not in found.float32_ops],
        lambda more: make(found.float32_ops | more),
        judge,
        memory=memory,
        deadline=deadline,
        progress=progress,
    )


def _figures(found: CalibratedGraph, left: frozenset[str]) -> dict[str, Any]:
    """Return what a result says of the graph with the products `left` in float."""
    return {
        "algorithms": found.applied,
        "num_ops": len(found.ops) - len(left),
        "float32_ops": tuple(sorted(left)),
        "float_share": _share(found, left),
    }


def _promised(model: ModelFile) -> tuple[str, ...]:
    """Return the installed engines that the file was checked in."""
    expected = (model.manifest.golden or {}).get("expected", ())
    named = {name for entry in expected for name in entry["engines"]}
    return tuple(name for name in installed_engines() if name in named)


def _judge(
    candidate: ModelFile,
    *,
    reference: ModelFile,
    data: str | os.PathLike[str] | None,
    options: QuantizationOptions,
    progress: Progress,
) -> Verification:
    assert data is not None
    return verify(
        candidate,
        reference=reference,
        data=data,
        max_drop_points=options.max_drop_points,
        min_agreement=options.min_agreement,
        unlabelled=options.without_labels,
        engines=_promised(candidate),
        progress=progress,
    )


def _written(path: Path, model: ModelFile, source: ModelFile) -> dict[str, Any]:
    """Return what a result says of the file written."""
    size_bytes = len(model.data)
    sizes = {"size_bytes": size_bytes, "size_ratio": size_bytes / len(source.data)}
    return {"model": path, "sha256": model.sha256, **sizes}


def _check_source(source: ModelFile, options: QuantizationOptions, data: str | os.PathLike[str] | None) -> None:
    if source.manifest.precision != "float32":
        reason = f"its precision is {source.manifest.precision}; quantization starts from float32"
        remedy = "give the file that `vit-edge export` wrote"
        raise UsageError("cannot quantize", file=source.source, reason=reason, remedy=remedy)
    if source.weights is not None:
        reason = "its weights lie beside it, being over 2 GiB; quantization works within one file"
        raise UsageError("cannot quantize", file=source.source, reason=reason, remedy="take a smaller network")
    if options.budget is None and options.time_limit_s is not None:
        reason = "a time limit ends the search for a budget, and none is given"
        raise UsageError("cannot quantize", reason=reason, remedy="give --max-drop or --min-agreement too")
    if options.budget is not None and data is None:
        reason = "a budget needs images to judge by, which did not calibrate"
        raise UsageError("cannot quantize", reason=reason, remedy="give --data; for --min-agreement it needs no labels")


def _judging(
    source: ModelFile, data: str | os.PathLike[str] | None, options: QuantizationOptions
) -> tuple[dict[str, Path], str]:
    """Return the pixel hashes of the images that judge, and one hash of all that decides on a budget."""
    if data is None:
        return {}, ""
    labels = source.manifest.labels
    found = find_evaluation_images(data, labels, unlabelled=options.without_labels)
    hashes = pixel_hashes(found.paths, source.manifest.preprocessing)
    label_of = dict(zip(found.paths, found.labels, strict=True))
    parts = {
        "reference": source.sha256,
        "images": sorted((digest, label_of[path]) for digest, path in hashes.items()),
        "budget": asdict(options.budget) if options.budget else None,
        "engines": [(name, metadata.version(name)) for name in installed_engines()],
        "cpu": instruction_set(),
    }
    return hashes, sha256_hex(json.dumps(parts).encode())


def _calibrated(
    source: ModelFile,
    images: CalibrationImages | None,
    target: Target,
    options: QuantizationOptions,
    progress: Progress,
) -> CalibratedGraph:
    graph = source.graph()
    plan = Plan(
        algorithms=choose_algorithms(options.recipe, algorithms=options.algorithms, without=options.without),
        effort=EFFORTS[options.effort],
        scheme=Scheme(weight_bits=target.weight_bits, activation=target.activation),
        method=options.ranges,
        batch_size=options.batch_size,
        dynamic=options.precision == "int8-dynamic",
    )
    if images is None:
        return uncalibrated(graph, plan)
    cache = CalibrationCache(preprocessing=source.manifest.preprocessing) if options.use_cache else None
    needs_noise = options.budget is not None
    return calibrate(graph, images, plan, needs_noise=needs_noise, cache=cache, progress=progress)


def _check_calibration(hashes: Sequence[str], folder: str | os.PathLike[str]) -> None:
    if len(hashes) > 1 and len(set(hashes)) == 1:
        reason = f"all {len(hashes)} images are the same"
        raise DataRejected("cannot calibrate", file=folder, reason=reason, remedy="give images like those in use")
    if len(hashes) < _FEW_IMAGES:
        _log.warning("few calibration images (%d): ranges from fewer than %d vary", len(hashes), _FEW_IMAGES)


def _finished(source: ModelFile, found: CalibratedGraph, left: frozenset[str], record: Mapping[str, Any]) -> ModelFile:
    """Return the INT8 file with its manifest and with what each installed engine answers for the golden inputs."""
    quantized = found.quantized(left)
    entry = dict(source.manifest.input)
    batch = record["batch"]
    if batch is not None:
        fix_batch(quantized.graph, batch)
        entry["batch"] = batch
    manifest = replace(
        source.manifest,
        precision="int8",
        input=entry,
        evaluation=None,
        golden=None,
        provenance={**source.manifest.provenance, "float_model_sha256": source.sha256, "onnx": onnx.__version__},
    )
    skips = only_for_onnxruntime(quantized)
    if skips:
        record = {**record, "openvino_skips": skips}
    manifest = replace(manifest, quantization=dict(record))
    packed = ModelFile.from_graph(quantized, manifest)
    return with_answers(packed, source)


def _share(found: CalibratedGraph, left: frozenset[str]) -> float:
    """Return the share of multiplications with constant weights that stay float."""
    macs = macs_by_node(found.graph) or {}
    total = sum(macs.get(op.node, 0) for op in found.ops)
    return sum(macs.get(node, 0) for node in left) / total if total else 0.0
