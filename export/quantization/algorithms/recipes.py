"""Which algorithms a recipe takes, and how much work each effort is: chosen by measurements, docs/quantization.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from vit_edge.errors import UsageError

__all__ = [
    "ALGORITHMS",
    "CHOOSE_RANGES",
    "EARLIER_NAMES",
    "EFFORTS",
    "RECIPES",
    "Algorithm",
    "Effort",
    "EffortName",
    "Recipe",
    "choose_algorithms",
]

Algorithm: TypeAlias = Literal[
    "repq",
    "cross-layer-equalization",
    "range-search",
    "gptq-rounding",
    "bias-correction",
    "mixed-precision",
    "attention-scores",
]
Recipe: TypeAlias = Literal["fast", "accurate"]
EffortName: TypeAlias = Literal["fast", "balanced", "thorough"]

# In the order in which they are applied.
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
# Names in manifests that were written before these had the terms of the field.
EARLIER_NAMES: dict[str, Algorithm] = {"value-scaling": "cross-layer-equalization", "rounding": "gptq-rounding"}
# What there is nothing to do for where ranges are found at run time: it chooses ranges, or makes up for theirs.
CHOOSE_RANGES: frozenset[Algorithm] = frozenset({"range-search", "bias-correction", "attention-scores"})
_STATIC: tuple[Algorithm, ...] = ("repq", "cross-layer-equalization", "range-search", "gptq-rounding")
# `fast` keeps every product in integers with ranges that are constants; `accurate` leaves those float that err most.
RECIPES: dict[Recipe, tuple[Algorithm, ...]] = {
    "fast": (*_STATIC, "attention-scores"),
    "accurate": (*_STATIC, "mixed-precision"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """What an optimiser may do: images that it looks at, steps of a range, sweeps over the weights."""

    num_images: int
    range_steps: int
    sweeps: int


EFFORTS: dict[EffortName, Effort] = {
    "fast": Effort(num_images=16, range_steps=3, sweeps=1),
    "balanced": Effort(num_images=32, range_steps=5, sweeps=4),
    "thorough": Effort(num_images=128, range_steps=12, sweeps=16),
}


def choose_algorithms(
    recipe: Recipe, *, algorithms: Sequence[str] | None = None, without: Sequence[str] = ()
) -> tuple[Algorithm, ...]:
    """Return the recipe's algorithms, or `algorithms` instead, less those in `without`; raises UsageError."""
    unknown = [name for name in (*(algorithms or ()), *without) if name not in ALGORITHMS]
    if recipe not in RECIPES or unknown:
        reason = f"no algorithm is named {unknown[0]!r}" if unknown else f"no recipe is named {recipe!r}"
        remedy = f"recipes: {', '.join(RECIPES)}; algorithms: {', '.join(ALGORITHMS)}"
        raise UsageError("cannot quantize", reason=reason, remedy=remedy)
    asked = RECIPES[recipe] if algorithms is None else algorithms
    return tuple(name for name in ALGORITHMS if name in asked and name not in without)
