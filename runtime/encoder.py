"""Images in, vectors out: a loaded encoder with its preprocessing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vit_edge.errors import UsageError
from vit_edge.image import Color, ImageSource, Pixels
from vit_edge.runtime.engines.protocol import Array
from vit_edge.runtime.loaded_model import LoadedModel

__all__ = ["Encoder", "as_encoder"]


class Encoder(LoadedModel):
    """A loaded model that gives a vector for each image; usable from several threads, not across a fork.

    `vit_edge.runtime.load` makes it from the file of an encoder; `load_encoder` does the same with this type.

        >>> with load("encoder.int8.onnx") as encoder:
        ...     encoder.embed("image.jpg").shape
        (192,)
    """

    _verb = "embed"

    @property
    def width(self) -> int:
        """Return how many values a vector has."""
        return self._manifest.num_values

    @property
    def is_normalized(self) -> bool:
        """Return whether every vector has length 1: their scalar product is then the cosine similarity."""
        return bool((self._manifest.embedding or {}).get("normalized"))

    def embed(self, source: ImageSource, *, color: Color = "rgb") -> Array:
        """Return the vector of one image, float32 [width]; raises ImageRejected if the image cannot be read.

        An image is what a `Classifier` takes: a path, bytes, a binary file, a PIL image, or an array of pixels.
        """
        vector_D: Array = self.run(self.prepare(source, color=color).pixels[None])[0]
        return vector_D

    def embed_batch(self, images: Iterable[ImageSource], *, color: Color = "rgb") -> Array:
        """Return float32 [images, width], computed in batches of 64: of the images only these are in memory."""
        parts = [self.run(np.stack([one.pixels for one in part])) for part in self._parts(images, color)]
        return np.concatenate(parts) if parts else np.zeros((0, self.width), dtype=np.float32)

    def tokens(self, images_NHWC: Pixels) -> Array:
        """Return float32 [batch, tokens, width] after the last block, from uint8 RGB [batch, height, width, 3].

        Class token, further prefix tokens, then the patches row by row. Raises UsageError if the file has no tokens:
        export it with `vit-edge export --outputs embedding,tokens`.
        """
        return self._output("tokens", images_NHWC)


def as_encoder(model: LoadedModel, source: str) -> Encoder:
    """Return the model if it is an encoder; a classifier is closed, and raises UsageError."""
    if isinstance(model, Encoder):
        return model
    model.close()
    remedy = "export it with `vit-edge export --outputs embedding`"
    raise UsageError("cannot embed", file=source, reason="the file is a classifier, not an encoder", remedy=remedy)
