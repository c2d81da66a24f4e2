"""How a network was fed in training, found out by feeding it: known candidates scored on a few labelled images.

Two rounds, because every candidate with every other would take three times as long: first mean, standard deviation
and order of colours at one geometry, then every geometry and interpolation with the two best of them. Orders of the
labels cost nothing, each is scored on the same logits. Best is by top-1, then by mean cross entropy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from vit_edge.conversion.preprocessing.knowledge import CLIP, HALF, IMAGENET, Geometry, Triple
from vit_edge.data import Rejections, stream_pixels
from vit_edge.errors import DataRejected, require
from vit_edge.image import Pixels, Preprocessing
from vit_edge.progress import Progress, silent

__all__ = ["MOST_IMAGES", "Candidate", "Finding", "Score", "sample", "search_preprocessing"]

MOST_IMAGES = 64
_BATCH = 16
_GEOMETRIES: dict[str, Geometry] = {
    "squash": Geometry(fraction=1.0, squash=True),
    "crop 0.875": Geometry(fraction=0.875),
    "crop 0.9": Geometry(fraction=0.9),
    "crop 1.0": Geometry(fraction=1.0),
}
_NORMALISATIONS: dict[str, tuple[Triple, Triple]] = {"ImageNet": IMAGENET, "0.5": HALF, "CLIP": CLIP}
_FIRST_GEOMETRY = ("crop 0.9", "bicubic")
# One in twenty, as everywhere: two candidates differ only where chance would not explain it.
_SIGNIFICANCE = 0.05
_AS_SPECIFIED = "as specified"
Losses = npt.NDArray[np.float64]
Colours = Literal["RGB", "BGR"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way of feeding a network, each part by its name in the table."""

    normalisation: str
    geometry: str
    interpolation: str
    colours: Colours
    label_order: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How a candidate did: top-1 in percent and the mean cross entropy; and of each image, that and whether right."""

    candidate: Candidate
    top1: float
    cross_entropy: float
    losses: Losses
    right: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The scores, best first; the best that contradicts nothing specified; and how sure the images are of it.

    `settled` names the parts of the candidate in which every other value did worse by more than chance explains, `open`
    those where another did as well, with its values. `contradiction` says what was specified and the images deny.
    """

    num_images: int
    scores: tuple[Score, ...]
    proposed: Score
    preprocessing: Preprocessing
    settled: tuple[str, ...]
    open: Mapping[str, tuple[str, ...]]
    better_than_chance: bool
    contradiction: str | None


def sample(labels: Sequence[int], *, most: int = MOST_IMAGES, seed: int = 0) -> tuple[int, ...]:
    """Return the positions of at most `most` images, as many of each class as there are, drawn with a seed."""
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label, []).append(position)
    generator = random.Random(seed)
    classes = sorted(by_class)
    generator.shuffle(classes)
    for positions in by_class.values():
        generator.shuffle(positions)
    rounds = max(map(len, by_class.values()), default=0)
    drawn = [by_class[label][turn] for turn in range(rounds) for label in classes if turn < len(by_class[label])]
    return tuple(sorted(drawn[:most]))


def search_preprocessing(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    orders: Mapping[str, Sequence[int]],
    preprocessing: Preprocessing,
    specified: frozenset[str],
    num_images: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """Return what the images say; raises DataRejected where none can be read.

    `orders` has the class of each image under each order of the labels that is possible. `preprocessing` is what
    would be used otherwise; `specified` names its known fields ("mean", "std", "interpolation", "resize"), or
    "labels": the proposal keeps them. `num_images` is of how many `paths` are a sample.
    """
    case = _Case(
        model=model, paths=paths, orders={k: np.asarray(v) for k, v in orders.items()}, specified=specified,
        progress=progress, preprocessing=preprocessing, num_images=num_images or len(paths),
    )  # fmt: skip
    scores = case.run()
    scores.sort(key=lambda score: (-score.top1, score.cross_entropy))
    allowed = [score for score in scores if case.keeps_what_was_specified(score.candidate)]
    proposed = _in_usual_colours(allowed)
    settled, still_open = _judge(proposed, allowed)
    return Finding(
        num_images=len(proposed.losses),
        scores=tuple(scores),
        proposed=proposed,
        preprocessing=case.preprocessing_of(proposed.candidate),
        settled=settled,
        open=still_open,
        better_than_chance=_better_than_chance(proposed, model, num_tried=len(allowed)),
        contradiction=_contradiction(scores[0], proposed),
    )


@dataclass(slots=True)
class _Case:
    """The candidates of one network, and the images they are tried on."""

    model: nn.Module
    paths: Sequence[Path]
    orders: Mapping[str, npt.NDArray[np.int64]]
    preprocessing: Preprocessing
    specified: frozenset[str]
    num_images: int
    progress: Progress
    done: int = 0
    total: int = 0

    @property
    def normalisations(self) -> dict[str, tuple[Triple, Triple]]:
        own = (self.preprocessing.mean, self.preprocessing.std)
        known = {name: pair for name, pair in _NORMALISATIONS.items() if not _near(pair, own)}
        name = next((name for name, pair in _NORMALISATIONS.items() if _near(pair, own)), _AS_SPECIFIED)
        return {name: own, **known}  # what was specified, or is likeliest, first

    @property
    def geometries(self) -> dict[str, Geometry]:
        own = self._resized(Geometry.of(self.preprocessing))
        known = {name: geometry for name, geometry in _GEOMETRIES.items() if self._resized(geometry) != own}
        name = next((name for name in _GEOMETRIES if name not in known), _AS_SPECIFIED)
        return {name: Geometry.of(self.preprocessing), **known}

    def _resized(self, geometry: Geometry) -> Preprocessing:
        size = self.preprocessing.crop
        return replace(self.preprocessing, resize=geometry.resize_for(size), keep_ratio=geometry.keeps_ratio(size))

    @property
    def interpolations(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.preprocessing.interpolation, "bilinear", "bicubic")))

    def run(self) -> list[Score]:
        likeliest = next(iter(self.geometries)), self.preprocessing.interpolation
        first = likeliest if "resize" in self.specified else _FIRST_GEOMETRY
        pairs: list[tuple[str, Colours]] = [(name, c) for name in self.normalisations for c in ("RGB", "BGR")]
        plans = [(g, i) for g in self.geometries for i in self.interpolations]
        self.total = len(pairs) + 2 * (len(plans) - 1)
        scores = self._score(*first, pairs)
        best = sorted(scores, key=lambda score: (-score.top1, score.cross_entropy))
        kept = dict.fromkeys((s.candidate.normalisation, s.candidate.colours) for s in best)
        chosen = list(kept)[:2]
        if {"mean", "std"} & self.specified:  # what was specified is always among those that are compared
            chosen = list(dict.fromkeys([*chosen, (next(iter(self.normalisations)), "RGB")]))
        for geometry, interpolation in plans:
            if (geometry, interpolation) != first:
                scores += self._score(geometry, interpolation, chosen)
        return scores

    def _score(self, geometry: str, interpolation: str, pairs: Iterable[tuple[str, Colours]]) -> list[Score]:
        """Decode every image once for this geometry, and score each normalisation and order of colours on it."""
        base = self._preprocessing(geometry, interpolation)
        rejections = Rejections(self.num_images)
        decoded: list[tuple[int, Pixels]] = list(stream_pixels(self.paths, base, rejections=rejections))
        if not self.done:  # said once, not for every way
            rejections.conclude()
        if not decoded:
            raise DataRejected(
                "cannot infer the preprocessing", reason="no image could be read", remedy="give other images"
            )
        positions = [position for position, _ in decoded]
        pixels_NHWC = np.stack([pixels for _, pixels in decoded])
        found = []
        for normalisation, colours in pairs:
            mean, std = self.normalisations[normalisation]
            shown = pixels_NHWC if colours == "RGB" else pixels_NHWC[..., ::-1]
            logits_BK = self._logits(replace(base, mean=mean, std=std), shown)
            self.done += 1
            self.progress("trying preprocessings", min(self.done, self.total), self.total)
            for order, labels in self.orders.items():
                candidate = Candidate(
                    normalisation=normalisation, geometry=geometry, interpolation=interpolation, colours=colours,
                    label_order=order,
                )  # fmt: skip
                found.append(_scored(candidate, logits_BK, torch.from_numpy(labels[positions])))
        return found

    def _logits(self, preprocessing: Preprocessing, pixels_NHWC: Pixels) -> torch.Tensor:
        batches = range(0, len(pixels_NHWC), _BATCH)
        with torch.inference_mode():
            return torch.cat(
                [self.model(torch.from_numpy(preprocessing.normalise(pixels_NHWC[b : b + _BATCH]))) for b in batches]
            )

    def _preprocessing(self, geometry: str, interpolation: str) -> Preprocessing:
        chosen: Any = interpolation
        return replace(self._resized({**_GEOMETRIES, **self.geometries}[geometry]), interpolation=chosen)

    def preprocessing_of(self, candidate: Candidate) -> Preprocessing:
        """Return the settings for images in RGB: mean and deviation in the order of the colours they belong to."""
        mean, std = self.normalisations[candidate.normalisation]
        if candidate.colours == "BGR":
            mean, std = (mean[2], mean[1], mean[0]), (std[2], std[1], std[0])
        return replace(self._preprocessing(candidate.geometry, candidate.interpolation), mean=mean, std=std)

    def keeps_what_was_specified(self, candidate: Candidate) -> bool:
        normalised = {"mean", "std"} & self.specified
        if normalised and (candidate.colours == "BGR" or candidate.normalisation != next(iter(self.normalisations))):
            return False
        if "resize" in self.specified and candidate.geometry != next(iter(self.geometries)):
            return False
        if "interpolation" in self.specified and candidate.interpolation != self.preprocessing.interpolation:
            return False
        return "labels" not in self.specified or candidate.label_order == next(iter(self.orders))


def _near(pair: tuple[Triple, Triple], other: tuple[Triple, Triple]) -> bool:
    return bool(np.allclose(np.array(pair), np.array(other), atol=2e-3))


def _scored(candidate: Candidate, logits_BK: torch.Tensor, labels: torch.Tensor) -> Score:
    losses = functional.cross_entropy(logits_BK, labels, reduction="none").double().numpy()
    right = (logits_BK.argmax(dim=1) == labels).numpy()
    return Score(
        candidate=candidate, top1=float(right.mean()) * 100, cross_entropy=float(losses.mean()), losses=losses,
        right=right,
    )  # fmt: skip


_PARTS = ("normalisation", "geometry", "interpolation", "colours", "label_order")


def _judge(proposed: Score, allowed: Sequence[Score]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return in which parts of the candidate the images leave no other value, and where they leave which."""
    settled: list[str] = []
    still_open: dict[str, tuple[str, ...]] = {}
    for part in _PARTS:
        chosen = getattr(proposed.candidate, part)
        best_other: dict[str, Score] = {}
        for score in allowed:  # sorted: the first of each value is its best
            value = getattr(score.candidate, part)
            if value != chosen:
                best_other.setdefault(value, score)
        as_good = tuple(value for value, score in best_other.items() if not _worse(score, proposed))
        if as_good:
            still_open[part] = as_good
        elif best_other:
            settled.append(part)
    return tuple(settled), still_open


def _in_usual_colours(allowed: Sequence[Score]) -> Score:
    """Return the best; one in BGR, which is rare, only where every one in RGB does worse by more than chance."""
    usual = next((score for score in allowed if score.candidate.colours == "RGB"), allowed[0])
    return usual if not _worse(usual, allowed[0]) else allowed[0]


def _worse(score: Score, best: Score) -> bool:
    """Return whether a candidate is worse on the same images by more than chance explains.

    Either by a paired one-sided t test of the cross entropies, or by a sign test of the images that only one gets
    right; each at half of the level. A network without calibrated probabilities shows itself in the second.
    """
    if len(score.losses) != len(best.losses):
        return False
    stats = require("scipy.stats", extra="export", what="compare the candidates")
    won, lost = int((best.right & ~score.right).sum()), int((score.right & ~best.right).sum())
    if won and stats.binomtest(won, won + lost, alternative="greater").pvalue < _SIGNIFICANCE / 2:
        return True
    difference = score.losses - best.losses
    if np.ptp(difference) < 1e-9:
        return bool(difference.mean() > 1e-6)
    return bool(stats.ttest_1samp(difference, 0.0, alternative="greater").pvalue < _SIGNIFICANCE / 2)


def _better_than_chance(score: Score, model: Any, *, num_tried: int) -> bool:
    # The best of many tries is good by chance more often than one: the level is divided by their number (Bonferroni).
    stats = require("scipy.stats", extra="export", what="compare the candidates")
    num_images = len(score.losses)
    num_right = round(score.top1 / 100 * num_images)
    chance = 1 / max(2, int(model.config.num_classes))
    return bool(
        stats.binomtest(num_right, num_images, chance, alternative="greater").pvalue < _SIGNIFICANCE / num_tried
    )


def _contradiction(best: Score, proposed: Score) -> str | None:
    if best is proposed or not _worse(proposed, best) or proposed.top1 > best.top1:
        return None
    differing = [
        f"{part.replace('_', ' ')} {getattr(best.candidate, part)} instead of {getattr(proposed.candidate, part)}"
        for part in _PARTS
        if getattr(best.candidate, part) != getattr(proposed.candidate, part)
    ]
    return (
        f"with {', '.join(differing)} the {len(best.losses)} images give {best.top1:.1f} % top-1 and a cross "
        f"entropy of {best.cross_entropy:.3f}; what was specified gives {proposed.top1:.1f} % and "
        f"{proposed.cross_entropy:.3f}"
    )
