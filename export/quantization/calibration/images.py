"""The images of a calibration as a graph takes them, decoded anew at each pass: none of them is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vit_edge.data import Rejections, refuse_overlap, stream_pixels
from vit_edge.data.near_duplicates import fingerprint
from vit_edge.image import pixel_hash
from vit_edge.model_file.artifact import Manifest
from vit_edge.progress import Progress, silent
from vit_edge.runtime.engines.protocol import Array

__all__ = ["CalibrationImages"]


class CalibrationImages:
    """What the graph takes for each image of `paths`, in order.

    `hashes` and `fingerprints` are those of the last pass: of the pixels, and what `near_duplicates` compares.

    Images that cannot be used are skipped and named in the log; a pass raises DataRejected when they are over 1 %,
    or where an image is among `judging`, the pixel hashes of the evaluation images.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        manifest: Manifest,
        *,
        stage: str = "calibrating",
        judging: Mapping[str, Path] | None = None,
        progress: Progress = silent,
    ) -> None:
        self.hashes: list[str] = []
        self.fingerprints: list[str] = []
        self._paths, self._manifest = paths, manifest
        self._stage, self._judging, self._progress = stage, judging or {}, progress
        self._has_told = False  # of those skipped: once, not in every pass

    def __iter__(self) -> Iterator[Array]:
        """Begin a pass."""
        self.hashes, self.fingerprints = hashes, fingerprints = [], []
        rejections = Rejections(len(self._paths))
        for position, pixels in stream_pixels(self._paths, self._manifest.preprocessing, rejections=rejections):
            self._progress(self._stage, position, len(self._paths))
            hashes.append(pixel_hash(pixels))
            fingerprints.append(fingerprint(pixels))
            refuse_overlap({hashes[-1]: self._paths[position]}, self._judging)
            yield self._manifest.network_input(pixels[None])[0]
        self._progress(self._stage, len(self._paths), len(self._paths))
        if not self._has_told:
            rejections.conclude()
            self._has_told = True

    def sample(self, num_images: int) -> list[Array]:
        """Return what the graph takes for so many of the images, evenly spaced, less those that cannot be used."""
        number = min(num_images, len(self._paths))
        paths = [self._paths[position * len(self._paths) // number] for position in range(number)]
        pixels = stream_pixels(paths, self._manifest.preprocessing, rejections=Rejections(len(self._paths)))
        return [self._manifest.network_input(found[None])[0] for _, found in pixels]
