"""Write scikit-learn's handwritten digits as an image folder, and the calibration set that ships beside this script.

    python calibration_data/make_digits.py --out demo/digits     # train/<class>/*.png and test/<class>/*.png
    python calibration_data/make_digits.py --calibration DIR     # DIR/digits/<class>/*.png and DIR/manifest.json

Both give the same bytes on every machine: the split comes from hashes of the images, not from a random generator
whose stream may change; images are enlarged in integers, PNGs are stored, not compressed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from vit_edge.files import sha256_hex, write_atomic

SEED = "vit-edge digits 1"
NUM_TEST = 360
NUM_CALIBRATION = 128
# 8x8 counts (0 to 16) become 32x32 pixels, the size of the original scans, by linear interpolation: the same network
# learns 99 % of the test images from these, 97 % from images of 4x4 blocks.
SIDE, SCALE, MAX_COUNT = 8, 4, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Digit:
    """One image: its position in scikit-learn's set, its class, its pixels and its place in the shuffled order."""

    index: int
    label: int
    pixels: npt.NDArray[np.uint8]
    rank: str

    @property
    def file_name(self) -> str:
        return f"{self.label}/{self.index:04d}.png"

    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, format="PNG", compress_level=0)
        return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the whole set, split into train and test")
    parser.add_argument("--calibration", type=Path, help="folder for the calibration set and its manifest")
    arguments = parser.parse_args()
    if not (arguments.out or arguments.calibration):
        parser.error("give --out or --calibration")
    training, test = split()
    if arguments.out:
        for name, digits in (("train", training), ("test", test)):
            write(digits, arguments.out / name)
        print(f"{len(training)} training and {len(test)} test images in {arguments.out}")
    if arguments.calibration:
        write_calibration(balanced(training, NUM_CALIBRATION), arguments.calibration)
        print(f"{NUM_CALIBRATION} calibration images in {arguments.calibration}")


def split() -> tuple[list[Digit], list[Digit]]:
    """Return the training and the test images: 1,437 and 360, every class in proportion."""
    digits = sorted(read(), key=lambda digit: digit.rank)
    by_class = [[d for d in digits if d.label == label] for label in range(10)]
    counts = _in_proportion([len(group) for group in by_class], NUM_TEST)
    test = [d for group, count in zip(by_class, counts, strict=True) for d in group[:count]]
    training = [d for group, count in zip(by_class, counts, strict=True) for d in group[count:]]
    return training, test


def balanced(digits: list[Digit], number: int) -> list[Digit]:
    """Return `number` images, as many of each class as of any other (or one more)."""
    by_class = [[d for d in digits if d.label == label] for label in range(10)]
    counts = [number // 10 + (label < number % 10) for label in range(10)]
    return [d for group, count in zip(by_class, counts, strict=True) for d in group[:count]]


def read() -> Iterator[Digit]:
    """Yield the 1,797 images of scikit-learn's bundled set."""
    bunch = load_digits()
    for index, (counts, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        pixels = enlarged(counts.astype(np.int64))
        rank = hashlib.sha256(SEED.encode() + pixels.tobytes()).hexdigest()
        yield Digit(index=index, label=int(label), pixels=pixels, rank=rank)


def enlarged(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return uint8 [32, 32] from counts [8, 8]: linear interpolation between their centres, rounded once."""
    # Output i lies at (2i + 1 - SCALE) / (2 SCALE) of the input: below and above it, in parts of 2 SCALE.
    parts = 2 * SCALE
    below, rest = np.divmod(2 * np.arange(SIDE * SCALE) + 1 - SCALE, parts)
    low, high = below.clip(0, SIDE - 1), (below + 1).clip(0, SIDE - 1)
    weights = np.zeros((SIDE * SCALE, SIDE), dtype=np.int64)
    np.add.at(weights, (np.arange(len(low)), low), parts - rest)
    np.add.at(weights, (np.arange(len(high)), high), rest)
    whole = MAX_COUNT * parts * parts
    return ((weights @ counts @ weights.T * 255 + whole // 2) // whole).astype(np.uint8)


def write(digits: list[Digit], folder: Path) -> None:
    """Write each image as `folder`/<class>/<index>.png."""
    for digit in digits:
        path = folder / digit.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, digit.png())


def write_calibration(digits: list[Digit], folder: Path) -> None:
    """Write the images below `folder`/digits and what they are in `folder`/manifest.json."""
    write(digits, folder / "digits")
    entries = [
        {"file": f"digits/{d.file_name}", "sha256": sha256_hex(d.png()), "class": str(d.label), "index": d.index}
        for d in digits
    ]
    manifest = {
        "origin": "scikit-learn load_digits: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
        "made_by": "calibration_data/make_digits.py",
        "split": "train",
        "images": entries,
    }
    write_atomic(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def _in_proportion(sizes: list[int], total: int) -> list[int]:
    """Share `total` out by largest remainders."""
    exact = [size * total / sum(sizes) for size in sizes]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


if __name__ == "__main__":
    main()
