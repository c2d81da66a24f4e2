"""Proof that the exported file is the network: PyTorch's logits against the engines', at batches never traced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vit_edge.errors import VerificationFailed
from vit_edge.export.parity.isolated_run import answer_elsewhere
from vit_edge.image import Pixels
from vit_edge.metrics import activated, sqnr_db
from vit_edge.model_file.artifact import Manifest, ModelFile
from vit_edge.runtime.checks.golden import Tolerance, differences
from vit_edge.runtime.engines.protocol import Array, Logits

__all__ = ["BATCHES", "PARITY_COLUMNS", "Parity", "Reference", "check_parity", "float32_tolerance", "nearest"]

BATCHES = (1, 2, 3, 7, 16)
# Of `Parity.row`.
PARITY_COLUMNS = ("engine", "on", "batch", "largest difference", "SQNR", "same top-1")
# In one batch, and in memory: an engine's process answers for so many before the next are read.
_IMAGES_AT_ONCE, _IMAGES_AT_A_TIME = 16, 512
# Float32 rounds on the scale of all logits of an image, not of each: a bound for each refused right networks on AVX2.
# How much depends on the network, so it is measured: PyTorch in float32 against float64, times 16, within these. On 24
# random networks (1 to 8 blocks, width 8 to 128, spreads of 0.1 to 100) both engines differ by 1e-7 to 1e-5 of the
# spread, AVX-512 and AVX2 alike; 1 % in a weight moves it by 7e-6 to 5e-3. No one bound parts the two: the networks
# that round most (1.6e-5) show 1 % at 5e-4 and more. A query of attention that hardly attends shows it at 1e-6: that is
# not found. Two classes differ by up to 2e-4 of one image's own spread: hence the mean over the images as the least.
_ROUNDINGS, _LEAST, _MOST = 16.0, 5e-6, 1e-4
# Logits that all lie far from zero round as that distance does: 1e-6 of it is 16 units in the last place.
_LEAST_SHARE = 0.01
_SQNR_DB = 80.0

# What PyTorch gives for uint8 images: the logits, and whatever else of the outputs it knows.
Reference: TypeAlias = Callable[[Pixels], Mapping[str, Array]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How near one engine comes to PyTorch: at one batch size on golden inputs, or over all images given."""

    engine: str
    inputs: Literal["golden", "images"]
    batch_size: int
    num_images: int
    max_difference: float
    mean_difference: float
    sqnr_db: float
    top1_equal: int

    def row(self) -> tuple[object, ...]:
        """Return the values as text: engine, inputs, batch size, largest difference, SQNR, equal predictions."""
        equal = f"{self.top1_equal} of {self.num_images}"
        return (
            self.engine,
            self.inputs,
            self.batch_size,
            f"{self.max_difference:.1e}",
            f"{self.sqnr_db:.0f} dB",
            equal,
        )


def nearest(parity: Sequence[Parity]) -> str:
    """Return the lowest SQNR of each engine as text."""
    lowest = {one.engine: min(other.sqnr_db for other in parity if other.engine == one.engine) for one in parity}
    return ", ".join(f"{engine} {sqnr:.0f} dB" for engine, sqnr in lowest.items())


def float32_tolerance(logits_BK: Logits, exact_BK: npt.NDArray[np.float64] | None = None) -> Tolerance:
    """Return the tolerance of a float32 file from PyTorch's logits, and those in float64 if `exact_BK` is given.

    It is a share of an image's spread, the largest logit less the smallest, and of no less than the mean spread: the
    two logits of two classes may lie close on one image, and are rounded no less. One logit alone spreads from zero.
    """
    spread_B = np.ptp(logits_BK, axis=1) if logits_BK.shape[1] > 1 else np.abs(logits_BK[:, 0])
    largest = float(np.abs(logits_BK).max())
    scale = max(float(spread_B.mean()), _LEAST_SHARE * largest)
    share = _MOST
    if exact_BK is not None and scale > 0:
        rounding = float(np.abs(logits_BK - exact_BK).max()) / scale
        share = float(np.clip(_ROUNDINGS * rounding, _LEAST, _MOST))
    return Tolerance(spread=share, least_spread=scale, sqnr_db=_SQNR_DB)


def check_parity(
    model: ModelFile,
    reference: Reference,
    *,
    images_NHWC: Pixels,
    engines: Sequence[str],
    real_images: Iterable[Pixels] = (),
    tolerance: Tolerance | None = None,
    first_apart: Callable[[ModelFile, str, Pixels], str] = lambda _model, _engine, _image: "",
) -> list[Parity]:
    """Return the parity of every engine, each in a subprocess: at every batch size, and over `images`.

    Raises VerificationFailed where one is beyond the tolerance; `first_apart` then says which tensor parts first, given
    the model, the engine and the image with the largest difference. Without `tolerance` it is that of float32.
    """
    tolerance = tolerance or float32_tolerance(reference(images_NHWC)[model.manifest.output])
    compared = partial(_compared, model, reference, engines, first_apart)
    golden = compared(tolerance, [np.resize(images_NHWC, (size, *images_NHWC.shape[1:])) for size in BATCHES])
    shots: dict[str, list[tuple[Logits, Logits]]] = {engine: [] for engine in engines}
    # An image alone may have logits near zero, and so any SQNR: how far a logit is off is what counts there.
    apart = tolerance if tolerance.spread is None else replace(tolerance, sqnr_db=None)
    for part in _in_parts(real_images, _IMAGES_AT_A_TIME):
        for engine, pairs in compared(apart, [np.stack(shot) for shot in _in_parts(part, _IMAGES_AT_ONCE)]).items():
            shots[engine] += pairs
    results = []
    for engine in engines:
        results += [_figures(engine, "golden", *pair) for pair in golden[engine]]
        if shots[engine]:
            right_BK, got_BK = (np.concatenate(side) for side in zip(*shots[engine], strict=True))
            results.append(_figures(engine, "images", right_BK, got_BK))
    return results


def _compared(
    model: ModelFile,
    reference: Reference,
    engines: Sequence[str],
    first_apart: Callable[[ModelFile, str, Pixels], str],
    tolerance: Tolerance,
    batches: Sequence[Pixels],
) -> dict[str, list[tuple[Logits, Logits]]]:
    """Return expected and found logits of each batch by engine; raises VerificationFailed beyond the tolerance."""
    expected, first = [reference(batch) for batch in batches], model.manifest.output
    pairs = {}
    for engine in engines:
        found = answer_elsewhere(model, engine=engine, batches=batches, outputs=model.manifest.outputs)
        for batch, right, got in zip(batches, expected, found, strict=True):
            problems = [*_problems(right, got, tolerance, model.manifest)]
            if problems:
                part = first_apart(model, engine, batch[[_worst(right[first], got[first])]])
                raise _not_the_network(f"{engine} at batch {len(batch)}: {'; '.join(problems)}{part}")
        pairs[engine] = [(right[first], got[first]) for right, got in zip(expected, found, strict=True)]
    return pairs


def _in_parts(values: Iterable[Pixels], size: int) -> Iterator[list[Pixels]]:
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part


def _figures(engine: str, inputs: Literal["golden", "images"], expected_BK: Logits, found_BK: Logits) -> Parity:
    off_BK = np.abs(expected_BK - found_BK)
    return Parity(
        engine=engine,
        inputs=inputs,
        batch_size=len(expected_BK) if inputs == "golden" else _IMAGES_AT_ONCE,
        num_images=len(expected_BK),
        max_difference=float(off_BK.max()),
        mean_difference=float(off_BK.mean()),
        sqnr_db=sqnr_db(expected_BK, found_BK),
        top1_equal=int(np.sum(expected_BK.argmax(axis=1) == found_BK.argmax(axis=1))),
    )


def _problems(
    expected: Mapping[str, Array], found: Mapping[str, Array], tolerance: Tolerance, manifest: Manifest
) -> Iterator[str]:
    """Yield what is beyond the tolerance: tensors that PyTorch gives too, and outputs that contradict the logits."""
    first = manifest.output
    yield from differences(expected[first], found[first], tolerance)
    for name in sorted(expected.keys() & found.keys() - {first}):
        flat = [np.asarray(side[name], np.float32).reshape(len(side[name]), -1) for side in (expected, found)]
        size = float(np.abs(flat[0]).max())
        inner = replace(tolerance, least_spread=size, top1_gap=None)
        yield from (f"{name}: {problem}" for problem in differences(flat[0], flat[1], inner))
    if first != "logits":
        return
    probabilities_BK = activated(found["logits"], manifest.activation)
    if "probabilities" in found and np.abs(found["probabilities"] - probabilities_BK).max() > 1e-5:
        yield "the probabilities are not those of the logits"
    if "top5" in found:
        largest_BK = -np.sort(-probabilities_BK, axis=1)[:, : found["top5"].shape[1]]
        chosen_BK = np.take_along_axis(probabilities_BK, found["top5"], axis=1)
        if max(np.abs(largest_BK - side).max() for side in (chosen_BK, found["top5_probabilities"])) > 1e-5:
            yield "the five likeliest are not those of the logits"


def _worst(expected_BK: Logits, found_BK: Logits) -> int:
    if expected_BK.shape != found_BK.shape:
        return 0
    return int(np.argmax(np.nan_to_num(np.abs(expected_BK - found_BK), nan=np.inf).max(axis=1)))


def _not_the_network(reason: str) -> VerificationFailed:
    remedy = "nothing was written; report it with the checkpoint, or try another version of the engine"
    return VerificationFailed("the exported graph is not the network", reason=reason, remedy=remedy)
