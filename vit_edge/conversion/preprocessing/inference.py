"""What labelled images show about an unspecified preprocessing: `vit-edge convert --data`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vit_edge.conversion.preprocessing.search import Finding, sample, search_preprocessing
from vit_edge.data import EVALUATION_SPLITS, LabelledImages, read_labelled
from vit_edge.errors import DataRejected, printable
from vit_edge.image import Preprocessing
from vit_edge.progress import Progress, silent
from vit_edge.vit import VisionTransformer

__all__ = ["InferredPreprocessing", "infer_preprocessing"]

# Part of a candidate -> what it settles in a checkpoint.
_FIELDS = {
    "normalisation": ("preprocessing.mean", "preprocessing.std"),
    "geometry": ("preprocessing.resize",),
    "interpolation": ("preprocessing.interpolation",),
    "label_order": ("labels",),
}
_PREPROCESSING = ("mean", "std", "interpolation", "resize")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferredPreprocessing:
    """What to use from here on, which assumptions the images settled, and notes.

    `bgr` is whether the network was trained on blue, green, red: its patch embedding has to be turned round.
    """

    finding: Finding
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    bgr: bool
    settled: tuple[str, ...]
    notes: tuple[str, ...]


def infer_preprocessing(
    model: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing,
    labels: tuple[str, ...],
    assumed: Sequence[str],
    seed: int = 0,
    progress: Progress = silent,
) -> InferredPreprocessing:
    """Return what the labelled images in `data` say of the network; raises DataRejected where they cannot say it."""
    labels_specified = "labels" not in assumed
    labelled, orders = _possible_orders(data, labels if labels_specified else None, num_classes=len(labels))
    positions = sample(labelled.labels, seed=seed)
    specified = {name for name in _PREPROCESSING if f"preprocessing.{name}" not in assumed}
    finding = search_preprocessing(
        model,
        [labelled.paths[position] for position in positions],
        orders={order: [index[labelled.labels[p]] for p in positions] for order, (index, _) in orders.items()},
        preprocessing=preprocessing,
        specified=frozenset(specified | ({"labels"} if labels_specified else set())),
        num_images=labelled.num_images,
        progress=progress,
    )
    if not finding.better_than_chance:
        return _nothing_found(finding, preprocessing, labels)
    if finding.contradiction:
        _log.warning("the images contradict what was specified: %s", finding.contradiction)
    return _found(finding, orders[finding.proposed.candidate.label_order][1], labels=labels, assumed=assumed)


def _found(
    finding: Finding, names: tuple[str, ...] | None, *, labels: tuple[str, ...], assumed: Sequence[str]
) -> InferredPreprocessing:
    best = finding.proposed.candidate
    settled = tuple(
        name
        for part, fields in _FIELDS.items()
        for name in fields
        if part not in finding.open and name in assumed and (name != "labels" or names is not None)
    )
    return InferredPreprocessing(
        finding=finding,
        preprocessing=finding.preprocessing,
        labels=labels if names is None else names,
        bgr=best.colours == "BGR",
        settled=settled,
        notes=_notes(finding, settled),
    )


def _nothing_found(finding: Finding, preprocessing: Preprocessing, labels: tuple[str, ...]) -> InferredPreprocessing:
    note = (
        f"no way of feeding it does better than chance: at best {finding.scores[0].top1:.1f} % of "
        f"{finding.num_images} images; the labels or the weights are not those of these images"
    )
    _log.warning("%s", note)
    return InferredPreprocessing(
        finding=finding, preprocessing=preprocessing, labels=labels, bgr=False, settled=(), notes=(note,)
    )  # fmt: skip


def _notes(finding: Finding, settled: Sequence[str]) -> tuple[str, ...]:
    best = finding.proposed
    notes = [f"best of {len(finding.scores)} ways to feed it: {best.top1:.1f} % of {finding.num_images} images right"]
    if settled:
        notes.append(f"found on {finding.num_images} images: {', '.join(settled)}")
    for part, others in finding.open.items():
        chosen = getattr(best.candidate, part)
        notes.append(
            f"{finding.num_images} images cannot distinguish {part.replace('_', ' ')} {chosen}"
            f" from {' or '.join(others)}"
        )
    if best.candidate.colours == "BGR":
        notes.append("trained on BGR: the patch embedding's colours were turned round, the checkpoint takes RGB")
    if finding.contradiction:
        notes.append(f"the images contradict what was specified: {finding.contradiction}")
    return tuple(notes)


_Order = tuple[Mapping[int, int], "tuple[str, ...] | None"]


def _possible_orders(
    data: str | os.PathLike[str], labels: tuple[str, ...] | None, *, num_classes: int
) -> tuple[LabelledImages, dict[str, _Order]]:
    """Return the images, and for each possible order of labels their class -> the network's, and its names."""
    splits = (*EVALUATION_SPLITS, "train")
    if labels is not None:
        labelled = read_labelled(data, splits=splits, class_names=labels)
        same = {position: position for position in range(num_classes)}
        if not set(read_labelled(data, splits=splits).class_names) & set(labels):
            return labelled, {"indices": (same, None)}
        others = _orders_of(labels)
        return labelled, {"as specified": (same, None)} | {name: o for name, o in others.items() if o[0] != same}
    labelled = read_labelled(data, splits=splits)
    names = labelled.class_names
    orders: dict[str, _Order] = {}
    if all(name.isascii() and name.isdigit() and int(name) < num_classes for name in names):
        orders["indices"] = ({position: int(name) for position, name in enumerate(names)}, None)
    if len(names) == num_classes:
        known = [order for order, _ in orders.values()]
        orders |= {name: order for name, order in _orders_of(names).items() if order[0] not in known}
    if not orders:
        reason = f"the data set's {len(names)} classes do not match the {num_classes} unnamed classes"
        raise DataRejected(
            "cannot infer the preprocessing",
            file=printable(data),
            reason=reason,
            remedy="name the classes with --labels",
        )
    return labelled, orders


def _orders_of(names: tuple[str, ...]) -> dict[str, _Order]:
    """Return the orders that programs put class names in, those that differ: position in `names` -> the network's."""
    keys: dict[str, Callable[[str], Any]] = {
        "sorted": lambda name: name,
        "case-insensitive": lambda name: (name.lower(), name),
        "natural": lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())],
    }
    orders: dict[str, _Order] = {}
    for order, key in keys.items():
        ranked = sorted(range(len(names)), key=lambda position, key=key: key(names[position]))  # type: ignore[misc]
        index = {position: rank for rank, position in enumerate(ranked)}
        if index not in [known for known, _ in orders.values()]:
            orders[order] = (index, tuple(names[position] for position in ranked))
    return orders
