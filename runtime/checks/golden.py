"""Golden vectors: inputs that anyone can generate again, and the logits that a model file records for them.

The inputs come from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in integers only, so every machine makes the same
ones from their seeds. The logits are kept for each precision and engine: INT8 is not the same function in two engines.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vit_edge.errors import GoldenMismatch, ModelRejected
from vit_edge.image import Pixels, Preprocessing, pixel_hash
from vit_edge.machine.cpu import cpu_name, instruction_set
from vit_edge.metrics import sqnr_db
from vit_edge.model_file.artifact import Manifest
from vit_edge.runtime.engines.protocol import Engine, Logits

__all__ = [
    "GENERATOR",
    "Tolerance",
    "check_golden",
    "check_images",
    "differences",
    "expectation",
    "golden_images",
    "made_here",
    "promised",
    "recorded_version",
    "top2_gap",
]

GENERATOR = "splitmix64-mosaic-1"
# On one CPU and engine version INT8 answers are bitwise the same at any number of threads and any batch (measured in
# both engines on DeiT-tiny and the digits), so there a small edit shows that another CPU's rounding would hide.
_SAME_MACHINE_SQNR_DB = 60.0
_MOST_INPUTS = 64
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How near logits must be. Each bound that is not None is checked; `absolute` and `relative` work together.

    `spread`: the largest difference of an image's logits, as a share of their spread, or of `least_spread` where that
    is more. Twice that closes no gap between two answers, so it needs no `top1_gap`.
    `top1_gap`: the answer must be equal wherever the two largest expected logits are farther apart than this.
    """

    absolute: float | None = None
    relative: float | None = None
    spread: float | None = None
    least_spread: float | None = None
    sqnr_db: float | None = None
    top1_gap: float | None = None

    def __post_init__(self) -> None:
        bounds = (self.absolute, self.relative, self.spread, self.sqnr_db)
        others = (self.least_spread, self.top1_gap)
        if not all(b is None or (isinstance(b, int | float) and abs(b) < 1e9) for b in (*bounds, *others)):
            raise ValueError("a tolerance is not a number")
        if all(bound is None for bound in bounds):
            raise ValueError("a tolerance needs a bound on the logits")

    def allowed(self, expected_BK: Logits) -> Logits:
        """Return how far each logit may be off, [images, classes]; infinite if neither size nor spread bounds it."""
        allowed_BK: Logits = np.full(expected_BK.shape, np.inf, np.float32)
        if self.absolute is not None or self.relative is not None:
            size_BK = np.abs(expected_BK)
            allowed_BK = ((self.absolute or 0.0) + (self.relative or 0.0) * size_BK).astype(np.float32)
        if self.spread is not None:
            scale_B = np.maximum(np.ptp(expected_BK, axis=1), self.least_spread or 0.0)
            allowed_BK = np.minimum(allowed_BK, self.spread * scale_B[:, None]).astype(np.float32)
        return allowed_BK


# bfloat16 alone makes 36 dB on photographs (DeiT-tiny), together with integers no less than integers alone.
_REDUCED = Tolerance(sqnr_db=20.0, top1_gap=0.5)
# What the first output is called in messages.
_PLURAL = {"logits": "logits", "embedding": "embeddings"}


def golden_images(seeds: Sequence[int], *, height: int, width: int) -> Pixels:
    """Return uint8 [seeds, height, width, 3]: for each seed a mosaic of coloured tiles under fine noise.

    Seed s has 2 + s mod 7 tiles a side. Tiles drive the network to different answers, noise reaches every weight, and
    colours differ from their mirror and transpose, so that swapped channels or axes show.
    """
    return np.stack([_mosaic(seed, height, width) for seed in seeds])


def _encode_logits(logits_BK: Logits) -> str:
    """Return logits as base64 of little-endian float32, row by row."""
    return base64.b64encode(np.ascontiguousarray(logits_BK, dtype="<f4").tobytes()).decode("ascii")


def check_golden(engine: Engine, manifest: Manifest) -> None:
    """Raise GoldenMismatch if `engine` does not give the logits or embeddings that the manifest records for it."""
    golden = manifest.golden or {}
    try:
        if golden["generator"] != GENERATOR:
            raise ValueError(f"its inputs come from {golden['generator']!r}; this vit-edge knows {GENERATOR!r}")
        height, width = manifest.preprocessing.crop
        if not 1 <= len(golden["seeds"]) <= _MOST_INPUTS:
            raise ValueError(f"it has {len(golden['seeds'])} inputs; 1 to {_MOST_INPUTS} are run")
        images = golden_images(golden["seeds"], height=height, width=width)
        entry = next((e for e in golden["expected"] if engine.name in e["engines"]), None)
        if entry is None:
            raise _not_accepted(engine.name, sorted({name for e in golden["expected"] for name in e["engines"]}))
        expected = _decode_logits(entry[manifest.output], len(images))
        tolerance = _tolerance(entry, engine, manifest)
    except _MALFORMED as error:
        raise _unreadable(error) from error
    found = engine.run(images)
    problems = differences(expected, found, tolerance)
    if problems:
        reason = f"on {len(images)} golden inputs, {'; '.join(problems)}"
        remedy = f"do not use the file here: it was edited, or this machine computes differently{_recorded_on(entry)}"
        what = f"the model gives other {_PLURAL[manifest.output]} in {engine.name} than where it was exported"
        raise GoldenMismatch(what, reason=reason, remedy=remedy)


def promised(manifest: Manifest) -> frozenset[str]:
    """Return the names of the engines that the file has golden logits for."""
    expected = (manifest.golden or {}).get("expected", ())
    return frozenset(str(name) for entry in expected if isinstance(entry, Mapping) for name in entry.get("engines", ()))


def recorded_version(engine: Engine, manifest: Manifest) -> str | None:
    """Return the version of the engine in which the golden vectors were recorded, None where the file does not say."""
    for entry in (manifest.golden or {}).get("expected", ()):
        if isinstance(entry, Mapping) and engine.name in entry.get("engines", ()):
            made_on = entry.get("made_on")
            return str(made_on.get("engine_version")) if isinstance(made_on, Mapping) else None
    return None


def check_images(golden: Mapping[str, Any], preprocessing: Preprocessing) -> None:
    """Raise GoldenMismatch if an image in the file decodes, turns or resizes to other pixels than recorded."""
    try:
        entries = [(e["format"], base64.b64decode(e["data"]), e["pixels_sha256"]) for e in golden["images"]]
    except _MALFORMED as error:
        raise _unreadable(error) from error
    for kind, data, expected in entries:
        if pixel_hash(preprocessing.pixels(data)) != expected:
            reason = f"the {kind} image in it gives other pixels after preprocessing"
            remedy = "install another version of Pillow: this one decodes or resizes differently"
            raise GoldenMismatch("images are prepared differently here", reason=reason, remedy=remedy)


def differences(expected_BK: Logits, found_BK: Logits, tolerance: Tolerance) -> list[str]:
    """Return one sentence for each bound that is broken: none where all hold."""
    if expected_BK.shape != found_BK.shape:
        return [f"the values have shape {list(found_BK.shape)}, not {list(expected_BK.shape)}"]
    if not np.isfinite(found_BK).all():
        return ["not every value is finite"]
    problems = []
    allowed = tolerance.allowed(expected_BK)
    excess = np.abs(found_BK - expected_BK) - allowed
    if np.max(excess) > 0:
        row, column = np.unravel_index(int(np.argmax(excess)), excess.shape)
        off, bound = abs(found_BK[row, column] - expected_BK[row, column]), allowed[row, column]
        problems.append(f"a value is off by {off:.3g}, more than {bound:.3g}")
    if tolerance.sqnr_db is not None and (level := sqnr_db(expected_BK, found_BK)) < tolerance.sqnr_db:
        problems.append(f"SQNR is {level:.1f} dB, below {tolerance.sqnr_db:g} dB")
    if tolerance.top1_gap is not None:
        clear = top2_gap(expected_BK) > tolerance.top1_gap
        changed = int(np.sum(clear & (expected_BK.argmax(axis=1) != found_BK.argmax(axis=1))))
        if changed:
            problems.append(f"{changed} clear answers changed")
    return problems


def top2_gap(logits_BK: Logits) -> Logits:
    """Return how far the largest logit of each row is above the second; infinite for a single class."""
    if logits_BK.shape[1] < 2:
        return np.full(len(logits_BK), np.inf, dtype=np.float32)
    ordered = np.sort(logits_BK, axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2], dtype=np.float32)


def expectation(
    values_BK: Logits, *, engines: Sequence[str], tolerance: Tolerance, output: str = "logits"
) -> dict[str, Any]:
    """Return one entry of a manifest's `golden.expected`: what `output` gives for the golden inputs."""
    bounds = {name: bound for name, bound in asdict(tolerance).items() if bound is not None}
    return {"engines": list(engines), output: _encode_logits(values_BK), "tolerance": bounds}


def made_here(engine: Engine) -> dict[str, str]:
    """Return what decides the last bit of INT8 logits: engine version, CPU, instructions, float32 instead of INT8."""
    made_on = {"engine_version": engine.version, "cpu": cpu_name(), "instruction_set": instruction_set()}
    return made_on if engine.int8_fallback is None else {**made_on, "ops_in": "float32"}


def _tolerance(entry: Mapping[str, Any], engine: Engine, manifest: Manifest) -> Tolerance:
    """Return the entry's tolerance; values must nearly repeat on the same CPU and version.

    That does not hold with a batch that was fixed only when it was loaded: OpenVINO then takes other kernels. Where the
    float parts run in fewer bits than those of the record, it is that of integers.
    """
    tolerance = Tolerance(**entry["tolerance"])
    if engine.float_precision not in ("float32", "none"):
        return _REDUCED if manifest.chooses_class else replace(_REDUCED, top1_gap=None)
    as_recorded = engine.batch_size == manifest.batch and entry.get("made_on") == made_here(engine)
    if tolerance.sqnr_db is not None and as_recorded:
        return replace(tolerance, sqnr_db=max(tolerance.sqnr_db, _SAME_MACHINE_SQNR_DB))
    return tolerance


def _recorded_on(entry: Mapping[str, Any]) -> str:
    """Return which CPU the logits were recorded on, and what to do; empty where this one is of the same class."""
    made_on = entry.get("made_on")
    recorded = made_on.get("instruction_set") if isinstance(made_on, Mapping) else None
    if recorded in (None, instruction_set()):
        return ""
    return f"; it was made on {recorded}, this CPU is {instruction_set()}: quantize it here, or with --target portable"


def _unreadable(error: Exception) -> ModelRejected:
    reason = f"the golden vectors cannot be read ({type(error).__name__}: {error})"
    return ModelRejected("cannot check the model", reason=reason, remedy="export it again")


def _mosaic(seed: int, height: int, width: int) -> Pixels:
    tiles = 2 + seed % 7
    rows, columns = np.arange(height) * tiles // height, np.arange(width) * tiles // width
    colours = _bytes(2 * seed, tiles * tiles * 3).reshape(tiles, tiles, 3).astype(np.int64)
    noise = _bytes(2 * seed + 1, height * width * 3).reshape(height, width, 3).astype(np.int64)
    mixed: Pixels = ((3 * colours[rows[:, None], columns[None, :]] + noise) // 4).astype(np.uint8)
    return mixed


def _bytes(stream: int, count: int) -> Pixels:
    """Return the top byte of each of the first `count` outputs of SplitMix64 seeded with `stream` x 2^32."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z = (np.uint64(stream) << np.uint64(32)) + _GOLDEN_RATIO * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    top: Pixels = (z >> np.uint64(56)).astype(np.uint8)
    return top


def _decode_logits(text: str, rows: int) -> Logits:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").reshape(rows, -1).astype(np.float32)


def _not_accepted(engine: str, engines: Sequence[str]) -> GoldenMismatch:
    reason = f"the file has golden logits for {', '.join(engines) or 'no engine'} only"
    remedy = "export the model again where this engine is installed, or choose one of those engines"
    return GoldenMismatch(f"the model was never checked in {engine}", reason=reason, remedy=remedy)
