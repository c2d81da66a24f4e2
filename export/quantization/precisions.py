"""Which precisions a float file can be brought to, and which options say something for which of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from vit_edge.errors import UsageError
from vit_edge.export.quantization.algorithms.recipes import CHOOSE_RANGES
from vit_edge.export.quantization.qdq.dynamic_ranges import BATCH
from vit_edge.machine.targets import Target
from vit_edge.model_file.artifact import ModelFile

__all__ = ["PRECISIONS", "Precision", "check_options", "check_target"]

Precision: TypeAlias = Literal["int8", "int8-dynamic", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_OPTIONS = {
    "target": "target",
    "recipe": "recipe",
    "effort": "effort",
    "algorithms": "algorithm",
    "without": "without",
    "ranges": "ranges",
    "batch_size": "batch-size",
    "max_drop_points": "max-drop",
    "min_agreement": "min-agreement",
    "time_limit_s": "time-limit",
}
# What only images that calibrate give a meaning to.
_CALIBRATING = tuple(name for name in _OPTIONS if name not in ("target", "ranges"))


def check_options(precision: Precision, told: Mapping[str, Any], *, calibrated: bool) -> None:
    """Raise UsageError where what was told says nothing for the precision; `told` are options by their field's name."""
    if precision == "int8" and not calibrated:
        reason = "ranges are found on images"
        remedy = "give --calibration, or take --precision int8-dynamic"
        raise UsageError("cannot quantize", reason=reason, remedy=remedy)
    if precision == "fp16" and calibrated:
        raise _useless("calibration", "float16 has no ranges")
    if precision == "fp16":
        _refuse(told, tuple(_OPTIONS), "float16 has nothing to choose")
    if precision == "int8-dynamic":
        _refuse(told, ("ranges",), "they are found at run time")
        if not calibrated:
            _refuse(told, _CALIBRATING, "without --calibration nothing is known of the activations")
        idle = [name for name in told.get("algorithms") or () if name in CHOOSE_RANGES]
        if idle:
            raise _useless(f"algorithm {idle[0]}", "it is for ranges that are constants")


def check_target(precision: Precision, target: Target, source: ModelFile) -> None:
    """Raise UsageError where the target takes no such file, or the float file is fixed at another batch."""
    dynamic = precision == "int8-dynamic"
    if dynamic and target.symmetric_activations:
        reason = f"{target.device} take constant ranges around zero only; int8-dynamic is for CPUs"
        raise UsageError("cannot quantize", reason=reason, remedy="take --precision int8, or the target of a CPU")
    wanted = BATCH if dynamic else target.static_batch
    fixed = source.manifest.batch
    if precision != "fp16" and wanted is not None and fixed not in (None, wanted):
        reason = f"its batch is fixed at {fixed}; {precision} for {target.name} needs {wanted}"
        remedy = "export it again with a dynamic batch"
        raise UsageError("cannot quantize", file=source.source, reason=reason, remedy=remedy)


def _refuse(told: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in told:
            raise _useless(_OPTIONS[name], why)


def _useless(option: str, why: str) -> UsageError:
    return UsageError("cannot quantize", reason=f"--{option} says nothing here: {why}", remedy="leave it out")
