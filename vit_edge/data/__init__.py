"""Which images there are and what they show: image folders, label files, shards, and the pixels of each image."""

from __future__ import annotations

from vit_edge.data.labelled import (
    EVALUATION_SPLITS,
    LabelledImages,
    Splits,
    hold_out,
    lies_loose,
    read_class_names,
    read_labelled,
    read_splits,
    read_unlabelled,
    refuse_one_class,
    training_folder,
)
from vit_edge.data.shards import draw_images, find_images
from vit_edge.data.streaming import (
    Rejections,
    pixel_hashes,
    refuse_overlap,
    set_hash,
    stream,
    stream_pixels,
)

__all__ = [
    "EVALUATION_SPLITS",
    "LabelledImages",
    "Rejections",
    "Splits",
    "draw_images",
    "find_images",
    "hold_out",
    "lies_loose",
    "pixel_hashes",
    "read_class_names",
    "read_labelled",
    "read_splits",
    "read_unlabelled",
    "refuse_one_class",
    "refuse_overlap",
    "set_hash",
    "stream",
    "stream_pixels",
    "training_folder",
]
