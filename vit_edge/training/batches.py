"""Batches for training and evaluation, each a pure function of the seed and its number.

Every random choice is drawn from a seed made of the run's seed, what is chosen, the epoch and the image's place in
it. So a run can stop at any batch and go on as if it had not, and one process sees the same images as many.
Images are uint8 [3, height, width], or float32 of the same range where pairs were mixed.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from vit_edge.data import LabelledImages, Rejections, stream
from vit_edge.image import Pixels, Preprocessing, decode, pixel_hash
from vit_edge.machine.cpu import usable_threads
from vit_edge.progress import Progress
from vit_edge.training.recipe import Recipe

__all__ = ["Augmentation", "SplitImages", "TrainingBatches", "evaluation_batches", "load_split", "seed_of"]

# Decoded images are kept in memory while they fit into this; after that each is decoded whenever it is needed.
_KEPT_BYTES = 2 * 2**30
_ORDER, _IMAGE, _PAIR = 0, 1, 2
EVALUATION_BATCH = 64


def seed_of(*parts: int) -> int:
    """Return a seed for torch made of non-negative numbers; other numbers, another seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True, slots=True)
class SplitImages:
    """The usable images of a split: hashes of what evaluation sees of them, and their pixels while they fit."""

    images: LabelledImages
    preprocessing: Preprocessing
    cropped: bool  # whether `pixels` are those of evaluation, or the whole image
    hashes: tuple[str, ...]
    kept: tuple[Pixels | None, ...]

    def pixels(self, position: int) -> Tensor:
        """Return uint8 [3, height, width] of one image."""
        kept = self.kept[position]
        if kept is None:
            kept = _read(self.images.paths[position], self.preprocessing, cropped=self.cropped)[1]
        return torch.from_numpy(kept).permute(2, 0, 1)

    def by_hash(self) -> dict[str, Path]:
        """Return the path of each image by its hash."""
        return dict(zip(self.hashes, self.images.paths, strict=True))

    def without(self, hashes: Sequence[str]) -> SplitImages:
        """Return the images whose hash is not among these."""
        left_out = set(hashes)
        places = [i for i, digest in enumerate(self.hashes) if digest not in left_out]
        return SplitImages(
            images=self.images.take(places),
            preprocessing=self.preprocessing,
            cropped=self.cropped,
            hashes=tuple(self.hashes[i] for i in places),
            kept=tuple(self.kept[i] for i in places),
        )


def load_split(
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    cropped: bool,
    stage: str,
    progress: Progress,
    rejections: Rejections | None = None,
) -> SplitImages:
    """Decode every image once; unusable ones are named and left out, raises DataRejected where they are over 1 %."""
    places, hashes, kept, size_bytes = list[int](), list[str](), list[Pixels | None](), 0
    reading = stream(
        images.paths,
        lambda path: _read(path, preprocessing, cropped=cropped),
        threads=usable_threads(),
        rejections=rejections,
    )
    for position, (digest, pixels) in reading:
        size_bytes += pixels.nbytes
        places.append(position)
        hashes.append(digest)
        kept.append(pixels if size_bytes <= _KEPT_BYTES else None)
        progress(stage, position + 1, images.num_images)
    return SplitImages(images.take(places), preprocessing, cropped, tuple(hashes), tuple(kept))


def _read(path: Path, preprocessing: Preprocessing, *, cropped: bool) -> tuple[str, Pixels]:
    image = decode(path)
    seen = preprocessing.pixels(image)
    return pixel_hash(seen), seen if cropped else np.array(image)


class Augmentation:
    """A random change of one image, by the recipe; the same seed gives the same change."""

    def __init__(self, recipe: Recipe, preprocessing: Preprocessing) -> None:
        self._transform = v2.Compose([*_transforms(recipe, preprocessing), v2.Identity()])

    def __call__(self, pixels_CYX: Tensor, *, seed: int) -> Tensor:
        _seed(seed)
        changed_CYX: Tensor = self._transform(pixels_CYX)
        return changed_CYX


def _transforms(recipe: Recipe, preprocessing: Preprocessing) -> Iterator[Any]:
    if recipe.crop_area is not None:
        interpolation = InterpolationMode(preprocessing.interpolation)
        area = (recipe.crop_area, 1.0)
        yield v2.RandomResizedCrop(preprocessing.crop, scale=area, interpolation=interpolation, antialias=True)
    if recipe.flip_probability:
        yield v2.RandomHorizontalFlip(recipe.flip_probability)
    grey = [round(255 * mean) for mean in preprocessing.mean]
    if recipe.rand_augment_operations:
        yield v2.RandAugment(recipe.rand_augment_operations, recipe.rand_augment_magnitude, fill=grey)
    if recipe.rotate_degrees or recipe.shift_fraction or recipe.scale_fraction:
        yield _Affine(recipe)
    if recipe.random_erasing_probability:
        yield v2.RandomErasing(recipe.random_erasing_probability, value=grey)


class _Affine:
    """Rotate, scale and shift an image within the recipe's bounds; the corners become black.

    As v2.RandomAffine, which takes 0.5 ms of CPU for an image of 32x32 pixels; this takes a fifth of that.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._radians = math.radians(recipe.rotate_degrees)
        self._scale, self._shift = recipe.scale_fraction, recipe.shift_fraction

    def __call__(self, pixels_CYX: Tensor) -> Tensor:
        turn, zoom, right, down = (2 * torch.rand(4) - 1).tolist()
        _, height, width = pixels_CYX.shape
        across, along = (f(turn * self._radians) / (1 + zoom * self._scale) for f in (math.sin, math.cos))
        # From a place in the result to one in the image, both from -1 to 1, whatever the sides.
        from_result = torch.tensor(
            [
                [along, -across * height / width, 2 * right * self._shift],
                [across * width / height, along, 2 * down * self._shift],
            ]
        )
        grid = functional.affine_grid(from_result[None], [1, *pixels_CYX.shape], align_corners=False)
        moved_CYX = functional.grid_sample(pixels_CYX[None].float(), grid, align_corners=False)[0]
        return moved_CYX.round().to(pixels_CYX.dtype)


def _seed(seed: int) -> None:
    """Seed what draws on the CPU; torch.manual_seed takes 0.2 ms, to note who called it for devices not in use."""
    torch.default_generator.manual_seed(seed)


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item `step` is what one process trains on in that step: images, and labels [b] or mixed targets [b, classes].

    The images of a batch are cut into `world_size` runs of whole pairs, so that mixed pairs are the same ones however
    many processes there are; a process may get none of a short last batch.
    """

    def __init__(
        self, split_images: SplitImages, recipe: Recipe, *, num_classes: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.split_images, self.recipe, self.num_classes = split_images, recipe, num_classes
        self.rank, self.world_size = rank, world_size
        self._augment = Augmentation(recipe, split_images.preprocessing)
        mixers = [(v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha)]
        self._mixers = [kind(alpha=alpha, num_classes=max(2, num_classes)) for kind, alpha in mixers if alpha]
        self._ordered: tuple[int, list[int]] = (-1, [])
        self.steps_per_epoch = math.ceil(split_images.images.num_images / recipe.batch_size)

    def __len__(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def size(self, step: int) -> int:
        """Return how many images the whole batch of a step has, over all processes."""
        first = step % self.steps_per_epoch * self.recipe.batch_size
        return min(self.recipe.batch_size, self.split_images.images.num_images - first)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, number = divmod(step, self.steps_per_epoch)
        pairs = math.ceil(self.size(step) / 2)
        first, last = (2 * (pairs * rank // self.world_size) for rank in (self.rank, self.rank + 1))
        offset = number * self.recipe.batch_size
        places = range(offset + first, offset + min(last, self.size(step)))
        positions = self._order(epoch)[places.start : places.stop]
        labels = torch.tensor([self.split_images.images.labels[i] for i in positions], dtype=torch.int64)
        images = [
            self._augment(self.split_images.pixels(i), seed=seed_of(self.recipe.seed, _IMAGE, epoch, place))
            for i, place in zip(positions, places, strict=True)
        ]
        if not images:
            return torch.zeros(0, 3, *self.split_images.preprocessing.crop), labels
        batch = torch.stack(images)
        return self._mixed(batch, labels, epoch, places) if self._mixers else (batch, labels)

    def _order(self, epoch: int) -> list[int]:
        if self._ordered[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, _ORDER, epoch))
            order = torch.randperm(self.split_images.images.num_images, generator=generator)
            self._ordered = (epoch, order.tolist())
        return self._ordered[1]

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, places: range) -> tuple[Tensor, Tensor]:
        targets = functional.one_hot(labels, max(2, self.num_classes)).float()
        images = images.float()
        for i in range(0, len(labels) - 1, 2):
            _seed(seed_of(self.recipe.seed, _PAIR, epoch, places[i]))
            mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
            images[i : i + 2], targets[i : i + 2] = mixer(images[i : i + 2], labels[i : i + 2])
        return images, targets[:, : self.num_classes]

    def from_step(self, step: int, *, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of every step from `step` on, made ahead by `workers` processes."""
        # Seeds belong to the images, not to the loader: what it draws for its workers is never used.
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            self, batch_size=None, sampler=range(step, len(self)), num_workers=workers, worker_init_fn=_leave_signals
        )
        yield from loader


def _leave_signals(_worker: int) -> None:
    """Ignore what stops a run: sent to all its processes, it is for the main one, which ends the others in time."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def evaluation_batches(
    split_images: SplitImages, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield uint8 images [b, 3, height, width] and labels [b] of every `world_size`-th image, from `rank` on."""
    mine = range(rank, split_images.images.num_images, world_size)
    for first in range(0, len(mine), EVALUATION_BATCH):
        positions = mine[first : first + EVALUATION_BATCH]
        labels = torch.tensor([split_images.images.labels[i] for i in positions])
        yield torch.stack([split_images.pixels(i) for i in positions]), labels
