"""Quantize a model file to INT8 with calibration pictures, and record what it was made from and how near it comes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vit_edge.artifact import ModelFile, open_model, pack
from vit_edge.data import EVALUATION_SPLITS, find_images, pixel_hashes
from vit_edge.errors import DataRejected, UsageError
from vit_edge.export.budget import Ladder, climb
from vit_edge.export.calibrated_graph import CalibratedGraph, Plan, calibrate
from vit_edge.export.calibration import METHODS, Method, Range
from vit_edge.export.calibration_cache import CalibrationCache
from vit_edge.export.costs import macs_by_node
from vit_edge.export.coverage import Coverage, coverage
from vit_edge.export.judgement import Budget
from vit_edge.export.paired_run import find_pictures
from vit_edge.export.pictures import CalibrationPictures
from vit_edge.export.placement import Scheme
from vit_edge.export.recipes import EFFORTS, EffortName, Recipe, choose_algorithms
from vit_edge.export.speed import Speed, compare_speed
from vit_edge.export.verification import Verification, verify_models
from vit_edge.files import may_write, write_atomic
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engine import EngineOptions, installed_engines, make_engine
from vit_edge.runtime.golden import Tolerance, expectation, golden_images, made_here
from vit_edge.runtime.loading import load_model
from vit_edge.targets import DEFAULT_TARGET, Target, resolve_target

__all__ = ["QuantizationOptions", "QuantizationResult", "quantize", "quantize_model"]

# Float sums in another order move values across rounding steps: two sets of kernels on one CPU, both right, differ by
# 22.8 to 27.2 dB (DeiT-tiny, 200 photographs; ONNX Runtime against OpenVINO, OpenVINO's dynamic against static shapes).
# Answers changed only where the two largest logits were less than 0.5 apart.
_GOLDEN_TOLERANCE = Tolerance(sqnr_db=20.0, top1_gap=0.5)
_FEW_IMAGES = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationOptions:
    """How to quantize.

    `target` is a name of `vit_edge.targets.TARGETS`, "auto" for this machine, or a file from `vit-edge doctor --json`.
    `algorithms` replaces those of the recipe, `without` leaves some out. `ranges` is how ranges are found before any
    search. `batch_size` is that of calibration, and changes nothing but time. `time_limit_s` ends the search for an
    accuracy budget with the best file so far.
    """

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
        for value, known in ((self.effort, tuple(EFFORTS)), (self.ranges, METHODS)):
            if value not in known:
                raise UsageError("cannot quantize", reason=f"{value!r} is unknown", remedy=f"choose {', '.join(known)}")
        if self.batch_size < 1 or (self.time_limit_s is not None and self.time_limit_s <= 0):
            reason = f"batch size {self.batch_size}, time limit {self.time_limit_s}"
            raise UsageError("cannot quantize", reason=reason, remedy="give numbers above zero")

    @property
    def budget(self) -> Budget | None:
        """Return what may be lost, None where nothing was said."""
        if self.max_drop_points is None and self.min_agreement is None:
            return None
        return Budget(max_drop_points=self.max_drop_points, min_agreement=self.min_agreement)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationResult:
    """The file written, what calibrated it, what was left float, and what was found out about it.

    `verification` is there where pictures that judge were given, `coverage` and `speed` are one for each engine.
    """

    model: Path
    sha256: str
    size_bytes: int
    size_ratio: float
    target: Target
    target_reason: str
    recipe: Recipe
    algorithms: tuple[str, ...]
    num_calibration_images: int
    num_products: int
    float_products: tuple[str, ...]
    float_share: float
    coverage: tuple[Coverage, ...]
    speed: tuple[Speed, ...]
    ladder: Ladder | None = None
    verification: Verification | None = None


def quantize(
    model: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    options: QuantizationOptions = QuantizationOptions(),  # noqa: B008 - it is frozen
    force: bool = False,
    progress: Progress = silent,
) -> QuantizationResult:
    """Write the INT8 model file `out` from the float32 file `model` and the pictures in `calibration`.

    With pictures `data` the result is verified on them and the figures are kept in the file; calibration pictures that
    are also in `data` are refused. With an accuracy budget in `options` products stay float until `data` certify it.
    Raises DataRejected, ModelRejected, NotTrusted, UsageError, VerificationFailed.
    """
    return quantize_model(
        open_model(model), calibration=calibration, out=out, data=data, options=options, force=force, progress=progress
    )


def quantize_model(
    source: ModelFile,
    *,
    calibration: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    options: QuantizationOptions = QuantizationOptions(),  # noqa: B008 - it is frozen
    force: bool = False,
    progress: Progress = silent,
) -> QuantizationResult:
    """Write what `quantize` writes, from a file that was opened already."""
    resolved = resolve_target(options.target)
    _check_source(source, options, data)
    paths = find_images(calibration)
    written = may_write(out, force=force, made_from=source.source)
    judging = _judging_hashes(source, data, options)
    pictures = CalibrationPictures(paths, source.manifest, judging=judging, progress=progress)
    graph = onnx.load_model_from_string(source.data)
    del graph.metadata_props[:]
    cache = CalibrationCache(preprocessing=source.manifest.preprocessing) if options.use_cache else None
    plan = Plan(
        algorithms=choose_algorithms(options.recipe, algorithms=options.algorithms, without=options.without),
        effort=EFFORTS[options.effort],
        scheme=Scheme(weight_bits=resolved.target.weight_bits, activation=resolved.target.activation),
        method=options.ranges,
        batch_size=options.batch_size,
    )
    found = calibrate(
        graph, pictures, plan, needs_noise=options.budget is not None, cache=cache, progress=progress
    )
    _check_calibration(pictures.hashes, calibration)
    maker = _Maker(source, resolved.target, found, pictures, options)
    return maker.result
