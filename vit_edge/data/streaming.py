"""The pixels of one image after another, what is refused of them, and hashes that tell images apart."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from vit_edge.errors import DataRejected, ImageRejected, printable
from vit_edge.files import sha256_hex
from vit_edge.image import Pixels, Preprocessing, pixel_hash

__all__ = ["Rejections", "pixel_hashes", "refuse_overlap", "set_hash", "stream", "stream_pixels"]

Read = TypeVar("Read")

_MAX_REJECTED = 0.01
_NUM_NAMED = 5
_log = logging.getLogger(__name__)


def stream_pixels(
    paths: Sequence[Path], preprocessing: Preprocessing, *, rejections: Rejections | None = None
) -> Iterator[tuple[int, Pixels]]:
    """Yield (position in `paths`, pixels) of one image after another.

    Images that cannot be used are skipped and named in the log; raises DataRejected when they are over 1 %.
    """
    yield from stream(paths, preprocessing.pixels, rejections=rejections)


class Rejections:
    """Images that could not be used, of `num_images` in all: raises DataRejected when they are over 1 %."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._errors: list[ImageRejected] = []

    def add(self, error: ImageRejected) -> None:
        """Count one more; some are gathered before the refusal, so that it names them."""
        self._errors.append(error)
        if len(self._errors) > max(_MAX_REJECTED * self.num_images, _NUM_NAMED):
            self.conclude()

    def conclude(self) -> None:
        """Name them in the log, once all images were read."""
        if not self._errors:
            return
        named = "; ".join(f"{error.file}: {error.reason}" for error in self._errors[:_NUM_NAMED])
        if len(self._errors) > _MAX_REJECTED * self.num_images:
            reason = f"{len(self._errors)} or more of {self.num_images} images cannot be used, over 1 %: {named}"
            raise DataRejected("cannot use the images", reason=reason, remedy="mend or remove them")
        _log.warning("%d of %d images were skipped: %s", len(self._errors), self.num_images, named)


def stream(
    paths: Sequence[Path],
    read: Callable[[Path], Read],
    *,
    threads: int = 1,
    rejections: Rejections | None = None,
) -> Iterator[tuple[int, Read]]:
    """Yield (position in `paths`, what `read` makes of the file) in order, read by `threads` at once.

    Images that `read` rejects are skipped and named in the log; raises DataRejected when they are over 1 %. With
    `rejections` these are a part of more images: they are counted there, and the caller concludes.
    """
    counted = rejections or Rejections(len(paths))

    def attempt(path: Path) -> Read | ImageRejected:
        try:
            return read(path)
        except ImageRejected as error:
            return error

    for position, found in enumerate(_ahead(attempt, paths, threads)):
        if not isinstance(found, ImageRejected):
            yield position, found
            continue
        counted.add(found)
    if rejections is None:
        counted.conclude()


def _ahead(
    read: Callable[[Path], Read | ImageRejected], paths: Sequence[Path], threads: int
) -> Iterator[Read | ImageRejected]:
    """Yield `read(path)` in order, never more than a few files ahead: a million images must not pile up."""
    if threads == 1:
        yield from map(read, paths)
        return
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(paths)
        running = deque(pool.submit(read, path) for path in islice(remaining, 4 * threads))
        while running:
            done = running.popleft().result()
            running.extend(pool.submit(read, path) for path in islice(remaining, 1))
            yield done


def pixel_hashes(paths: Sequence[Path], preprocessing: Preprocessing) -> dict[str, Path]:
    """Return the hash of each image's pixels after preprocessing, and its path."""
    return {pixel_hash(pixels): paths[position] for position, pixels in stream_pixels(paths, preprocessing)}


def set_hash(hashes: Sequence[str]) -> str:
    """Return one hash for a set of images, independent of their order and names."""
    return sha256_hex("\n".join(sorted(hashes)).encode())


def refuse_overlap(
    tuning: Sequence[str] | Mapping[str, Path], judging: Mapping[str, Path], *, used_for: str = "calibration"
) -> None:
    """Raise DataRejected where an image that tuned the model is an evaluation image too; both by pixel hash.

    Where the paths of those that tuned are known too, both names are in the message.
    """
    paths = tuning if isinstance(tuning, Mapping) else {}
    shared = sorted(
        printable(judging[h]) + (f" (as {printable(paths[h])})" if h in paths else "")
        for h in set(tuning) & judging.keys()
    )
    if shared:
        reason = f"{len(shared)} of the evaluation images were used for {used_for}: {', '.join(shared[:_NUM_NAMED])}"
        remedy = "evaluate on other images: a model is too good on images that tuned it"
        raise DataRejected("cannot verify on these images", reason=reason, remedy=remedy)
