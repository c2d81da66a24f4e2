"""The headline of a report: size, speed, and accuracy with its bound, of each candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vit_edge.export.deployment.record import INT8_FILE, speed_of
from vit_edge.model_file.artifact import ModelFile
from vit_edge.report.sources import Sources, Verified, VerifiedEncoder

__all__ = ["Fact", "Headline", "headlines"]

# How many times as fast, its 95 % interval, and how it was measured.
_Measured: TypeAlias = tuple[float, tuple[float, float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One figure, and what it rests on."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """What is known of one candidate, and the verdict on its accuracy."""

    title: str
    verdict: str
    facts: tuple[Fact, ...]


def headlines(sources: Sources) -> tuple[Headline, ...]:
    """Return the headline of every candidate that was verified."""
    return tuple(
        Headline(
            title=verified.title,
            verdict=verified.verdict,
            facts=(
                *_of_files(sources, verified),
                *(_drop(verified) if isinstance(verified, Verified) else _kept(verified)),
            ),
        )
        for verified in _all(sources)
    )


def _all(sources: Sources) -> tuple[Verified | VerifiedEncoder, ...]:
    return (*sources.verified, *sources.encoders)


def _of_files(sources: Sources, verified: Verified | VerifiedEncoder) -> Iterator[Fact]:
    pair = sources.pair_of(verified)
    if pair is not None:
        candidate, reference = map(_megabytes, pair)
        detail = f"{candidate / reference:.2f} of the {reference:.2f} MB in float32"
        yield Fact(name="size", value=f"{candidate:.2f} MB", detail=detail)
        yield from _speed(sources, *pair)


def _kept(verified: VerifiedEncoder) -> Iterator[Fact]:
    worst = verified.worst
    kept = worst["neighbours"][-1]
    detail = (
        f"at least {kept['lower_bound']:.2f} % with 95 % confidence, k = {kept['k']}, on {worst['images']:,} images"
    )
    yield Fact(name="neighbours kept", value=f"{kept['percent']:.2f} %", detail=detail)


def _drop(verified: Verified) -> Iterator[Fact]:
    worst = verified.worst
    at_most = "at most " if worst["unlabelled"] else ""
    bound = f"no more than {worst['drop_upper_bound_points']:.2f} with 95 % confidence"
    top1 = worst["reference_top1"], worst["candidate_top1"]
    change = "" if None in top1 else f", top-1 {top1[0]:.2f} to {top1[1]:.2f} %"
    detail = f"{bound}, on {worst['images']:,} images{change}"
    yield Fact(name="accuracy drop", value=f"{at_most}{worst['drop_points']:.2f} points", detail=detail)


def _megabytes(model: ModelFile) -> float:
    return (len(model.data) + len(model.weights or b"")) / 1e6


def _speed(sources: Sources, model: ModelFile, reference: ModelFile) -> Iterator[Fact]:
    """Yield the speed of a file against its reference, in the engine in which the interval is best."""
    found = [*_deployed(sources, model), *_benchmarked(sources, model, reference)]
    if found:
        ratio, (low, high), how = max(found, key=lambda each: each[1][0])
        yield Fact(
            name="speed",
            value=f"{ratio:.2f} times as fast",
            detail=f"{low:.2f} to {high:.2f} with 95 % confidence, {how}",
        )


def _deployed(sources: Sources, model: ModelFile) -> Iterator[_Measured]:
    for given in sources.deployed:
        speed = speed_of(given.values) if given.values["files"][INT8_FILE] == model.sha256 else None
        yield from map(_of_engine, speed["engines"] if speed else ())
    for given in sources.quantized:
        if given.values["sha256"] == model.sha256:
            yield from map(_of_engine, given.values["speed"])


def _benchmarked(sources: Sources, model: ModelFile, reference: ModelFile) -> Iterator[_Measured]:
    """Yield the ratios of benchmarks at batch 1 whose first result is the reference: ratios are against that one."""
    for given in sources.benchmarks:
        first, *others = given.values["results"]
        noisy = ", on a noisy machine" if given.values.get("invalid_because") else ""
        for entry in others if first["sha256"] == reference.sha256 else ():
            if entry["sha256"] == model.sha256 and entry["ratio"] is not None and entry["batch_size"] == 1:
                threads = f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"
                how = f"{entry['engine']}, batch 1, {threads}, against float32 in {first['engine']}{noisy}"
                low, high = entry["ratio"]["interval"]
                yield entry["ratio"]["by_round"], (low, high), how


def _of_engine(entry: Mapping[str, Any]) -> _Measured:
    low, high = entry["ratio_interval"]
    return entry["ratio"], (low, high), f"{entry['engine']}, batch 1, one thread"
