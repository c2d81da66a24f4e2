"""What `quantize` can be asked for, and which options apply to which precision and target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from vit_edge.errors import UsageError
from vit_edge.export.quantization.algorithms.recipes import (
    CHOOSE_RANGES,
    EFFORTS,
    Algorithm,
    EffortName,
    Recipe,
    choose_algorithms,
)
from vit_edge.export.quantization.calibration.observers import METHODS, Method
from vit_edge.export.quantization.qdq.dynamic_ranges import BATCH
from vit_edge.export.verification.verdict import Budget
from vit_edge.machine.targets import DEFAULT_TARGET, Target
from vit_edge.model_file.artifact import ModelFile

__all__ = ["PRECISIONS", "Precision", "QuantizationOptions", "check_options", "check_target"]

Precision: TypeAlias = Literal["int8", "int8-dynamic", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# The fields that do not apply to every precision, and their option on the command line.
_OPTION_OF = {
    "target": "target",
    "recipe": "recipe",
    "effort": "effort",
    "algorithms": "algorithm",
    "without": "without",
    "ranges": "ranges",
    "batch_size": "batch-size",
    "calibration_images": "calibration-images",
    "max_drop_points": "max-drop",
    "min_agreement": "min-agreement",
    "min_neighbours": "min-neighbours",
    "time_limit_s": "time-limit",
}
# Without calibration images int8-dynamic can honour only these two.
_NEED_CALIBRATION = tuple(name for name in _OPTION_OF if name not in ("target", "ranges"))


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationOptions:
    """How to quantize.

    `precision` "int8" has constant ranges from calibration images; "int8-dynamic" computes ranges at run time, for CPUs
    and one image at a time; "float16" halves the file. `target` is a name of `vit_edge.machine.targets.TARGETS`,
    "auto" for this machine, or a file from `vit-edge doctor --json`. `algorithms` replaces the recipe's, `without`
    removes some. `ranges` is the observer that finds the first ranges. `batch_size` is that of calibration and changes
    only the time. `calibration_images` draws so many of the images by `seed`; None takes all.
    `time_limit_s`, from the start of `quantize`, ends the accuracy search with the best file so far.
    """

    precision: Precision = "int8"
    target: str = DEFAULT_TARGET
    recipe: Recipe = "fast"
    effort: EffortName = "balanced"
    algorithms: Sequence[str] | None = None
    without: Sequence[str] = ()
    ranges: Method = "moving-average"
    batch_size: int = 1
    calibration_images: int | None = None
    seed: int = 0
    max_drop_points: float | None = None
    min_agreement: float | None = None
    min_neighbours: float | None = None
    unlabelled: bool = False
    time_limit_s: float | None = None
    use_cache: bool = True
    measure_speed: bool = True

    def __post_init__(self) -> None:
        choose_algorithms(self.recipe, algorithms=self.algorithms, without=self.without)
        chosen = ((self.precision, PRECISIONS), (self.effort, tuple(EFFORTS)), (self.ranges, METHODS))
        for value, known in chosen:
            if value not in known:
                raise _wrong(f"{value!r} is unknown", f"choose {', '.join(known)}")
        if (self.calibration_images or 1) < 1 or self.seed < 0:
            reason = f"{self.calibration_images} calibration images with the seed {self.seed}"
            raise _wrong(reason, "give 1 image or more, and a seed of 0 or more")
        if self.batch_size < 1 or not (self.time_limit_s is None or self.time_limit_s > 0):
            raise _wrong(f"batch size {self.batch_size}, time limit {self.time_limit_s}", "give numbers above zero")

    @property
    def specified(self) -> dict[str, Any]:
        """Return the fields that differ from their default, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def chosen_algorithms(self) -> tuple[Algorithm, ...]:
        """Return the algorithms to apply, in their order."""
        return choose_algorithms(self.recipe, algorithms=self.algorithms, without=self.without)

    @property
    def without_labels(self) -> bool:
        """Return whether labels are ignored: on request, or because only agreement or neighbours have a budget."""
        by_images = self.min_agreement is not None or self.min_neighbours is not None
        return self.unlabelled or (self.max_drop_points is None and by_images)

    @property
    def budget(self) -> Budget | None:
        """Return the accuracy budget, None if there is none."""
        limits = (self.max_drop_points, self.min_agreement, self.min_neighbours)
        if limits == (None, None, None):
            return None
        return Budget(max_drop_points=limits[0], min_agreement=limits[1], min_neighbours=limits[2])


def check_options(options: QuantizationOptions, *, calibrated: bool, evaluated: bool) -> None:
    """Raise UsageError if options contradict the precision, each other, or the images given."""
    if options.precision == "int8" and not calibrated:
        raise _wrong("int8 needs calibration images to find ranges", "give --calibration, or --precision int8-dynamic")
    if options.precision == "float16" and calibrated:
        raise _useless("calibration", "float16 has no ranges")
    if options.precision == "float16":
        _refuse(options, tuple(_OPTION_OF), "float16 has no such choice")
    if options.precision == "int8-dynamic":
        _check_dynamic(options, calibrated=calibrated)
    if options.budget is None and options.time_limit_s is not None:
        raise _wrong(
            "a time limit ends the accuracy search, and no budget is given",
            "add --max-drop, --min-agreement or --min-neighbours",
        )
    if options.budget is not None and not evaluated:
        remedy = "give --data; with --min-agreement or --min-neighbours the images need no labels"
        raise _wrong("an accuracy budget needs evaluation images", remedy)


def check_target(precision: Precision, target: Target, source: ModelFile) -> None:
    """Raise UsageError if the target cannot run the precision, or the float32 file has another fixed batch."""
    dynamic = precision == "int8-dynamic"
    if dynamic and target.symmetric_activations:
        reason = f"{target.device} need constant symmetric ranges; int8-dynamic is for CPUs"
        raise _wrong(reason, "use --precision int8, or the target of a CPU")
    if dynamic and target.channels_first:
        reason = f"{target.name} is for constant ranges: its ops are convolutions"
        raise _wrong(reason, "use --precision int8, or --target portable")
    wanted = BATCH if dynamic else target.static_batch
    fixed = source.manifest.batch
    if precision != "float16" and wanted is not None and fixed not in (None, wanted):
        reason = f"the file has a fixed batch of {fixed}; {precision} for {target.name} needs {wanted}"
        raise _wrong(reason, "export it again with a dynamic batch", file=source.source)


def _check_dynamic(options: QuantizationOptions, *, calibrated: bool) -> None:
    _refuse(options, ("ranges",), "int8-dynamic computes ranges at run time")
    if not calibrated:
        _refuse(options, _NEED_CALIBRATION, "without --calibration there are no activations to work on")
    idle = [name for name in options.algorithms or () if name in CHOOSE_RANGES]
    if idle:
        raise _useless(f"algorithm {idle[0]}", "the algorithm is for constant ranges")


def _refuse(options: QuantizationOptions, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in options.specified:
            raise _useless(_OPTION_OF[name], why)


def _useless(option: str, why: str) -> UsageError:
    return _wrong(f"--{option} has no effect here: {why}", f"remove --{option}")


def _wrong(reason: str, remedy: str, *, file: str | None = None) -> UsageError:
    return UsageError("cannot quantize", file=file, reason=reason, remedy=remedy)
