"""The images whose prediction changed: as the model sees them, with the attention of both models side by side."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vit_edge.errors import ImageRejected, VitEdgeError
from vit_edge.export.verification.flips import path_below
from vit_edge.image import Pixels, Preprocessing, decode, pixel_hash
from vit_edge.model_file.artifact import ModelFile
from vit_edge.progress import Progress
from vit_edge.report.sources import Verified

__all__ = ["Flip", "data_uri", "flips_of"]

# Small images stay sharp; large ones are shown no larger than this, in pixels of their longer side.
_SMALL, _LARGE = 96, 320
# Patches without attention stay visible, to show what the network does not look at.
_DARKEST = 0.15
_ORDER = ("worse", None, "neither", "better")
_EFFECTS = {
    "worse": "only the reference is correct",
    "better": "only the candidate is correct",
    "neither": "neither is correct",
    None: "no label",
}
_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """An image whose prediction changed, in the engines named; images are data URIs.

    `attention` has the image under the attention of the reference and of the candidate, `overlap` the share of
    attention that they have in common, in percent. `missing` says why there is no image.
    """

    path: str
    reference: str
    candidate: str
    margins: tuple[float, float]
    label: str | None
    effect: str
    engines: tuple[str, ...]
    image: str | None = None
    attention: tuple[str, str] | None = None
    overlap: float | None = None
    missing: str = ""


def flips_of(
    verified: Verified,
    pair: tuple[ModelFile, ModelFile] | None,
    *,
    most: int,
    folder: str | os.PathLike[str] | None,
    progress: Progress,
) -> tuple[list[Flip], int]:
    """Return at most `most` images whose prediction changed, lost correct ones first, and the number of all.

    `pair` are candidate and reference, for input and attention; `folder` is where the images are now.
    """
    changed = _by_image(verified.engines)
    order = sorted(changed, key=lambda each: (_ORDER.index(each[0]["effect"]), each[0]["path"]))
    found = []
    for number, (entry, engines) in enumerate(order[:most]):
        progress("reading changed images", number, min(most, len(order)))
        found.append(_flip(entry, engines, was=verified.folder, now=folder, pair=pair))
    progress("reading changed images", len(found), len(found))
    return found, len(order)


def data_uri(data: bytes, media_type: str) -> str:
    """Return bytes as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _by_image(engines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], tuple[str, ...]]]:
    """Return each image once, as in the first engine in which it changed, with all the engines."""
    found: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for engine in engines:
        for change in engine["changed"]:
            found.setdefault(change["pixels_sha256"], (change, []))[1].append(engine["engine"])
    return [(change, tuple(names)) for change, names in found.values()]


def _flip(
    entry: Mapping[str, Any],
    engines: tuple[str, ...],
    *,
    was: str | None,
    now: str | os.PathLike[str] | None,
    pair: tuple[ModelFile, ModelFile] | None,
) -> Flip:
    shown_path = entry["path"] if was is None else path_below(entry["path"], was)
    path = Path(entry["path"]) if now is None else Path(now) / shown_path
    shown: dict[str, Any] = {}
    try:
        pixels = _pixels(path, pair[0].manifest.preprocessing if pair else None)
        if pair and pixel_hash(pixels) != entry["pixels_sha256"]:
            shown["missing"] = f"{path} holds another image now"
        else:
            shown = {"image": _encoded(pixels), **(_attention(pair, pixels) if pair else {})}
    except ImageRejected as error:
        shown["missing"] = f"{error.reason}: {path}"
    if shown.get("missing"):
        _log.warning("an image whose prediction changed is not shown: %s", shown["missing"])
    return Flip(
        path=shown_path,
        reference=entry["reference"],
        candidate=entry["candidate"],
        margins=(float(entry["reference_margin"]), float(entry["candidate_margin"])),
        label=entry["label"],
        effect=_EFFECTS[entry["effect"]],
        engines=engines,
        **shown,
    )


def _pixels(path: Path, preprocessing: Preprocessing | None) -> Pixels:
    """Return the input of the model for an image, or the image itself if no model is given."""
    return np.asarray(decode(path)) if preprocessing is None else preprocessing.pixels(path)


def _attention(pair: tuple[ModelFile, ModelFile], pixels: Pixels) -> dict[str, Any]:
    """Return the image under both attentions on one scale, and their overlap; empty if there is no attention."""
    from vit_edge.export.explanation.attention_maps import attention_maps

    try:
        maps = [attention_maps(model, pixels[None]) for model in reversed(pair)]
    except VitEdgeError as error:
        _log.warning("no attention is shown: %s", error)
        return {}
    if maps[0] is None or maps[1] is None:
        return {}
    reference, candidate = maps[0][0], maps[1][0]
    peak = max(float(reference.max()), float(candidate.max()), 1e-12)
    shares = [each / max(float(each.sum()), 1e-12) for each in (reference, candidate)]
    return {
        "attention": tuple(_encoded(_under(pixels, each / peak)) for each in (reference, candidate)),
        "overlap": 100 * float(np.minimum(*shares).sum()),
    }


def _under(pixels: Pixels, attention: Floats) -> Pixels:
    """Return the image, darker the less attention a patch gets."""
    height, width = pixels.shape[:2]
    mask = np.asarray(Image.fromarray(attention).resize((width, height), Image.Resampling.BILINEAR))
    bright = _DARKEST + (1 - _DARKEST) * np.sqrt(np.clip(mask, 0, 1))
    found: Pixels = np.round(pixels * bright[..., None]).astype(np.uint8)
    return found


def _encoded(pixels: Pixels) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_LARGE, _LARGE))
    kind = "PNG" if max(image.size) <= _SMALL else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 85} if kind == "JPEG" else {}))
    return data_uri(buffer.getvalue(), f"image/{kind.lower()}")
