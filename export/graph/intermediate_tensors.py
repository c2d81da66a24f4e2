"""What tensors inside a graph hold for each image, whatever the batch they ran in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from vit_edge.errors import ModelRejected
from vit_edge.export.graph.editing import with_outputs
from vit_edge.machine.cpu import usable_threads

__all__ = ["Activations", "logits_of"]

Array: TypeAlias = npt.NDArray[Any]

# Images run at once while their tensors fit into this; a larger batch runs in parts, so that memory does not depend
# on it either. One image of a DeiT-tiny has 13 MB, of a ViT-B 50 MB, of a ViT-L at 384 pixels 400 MB, and one has to
# be held. On CPUs more at once is only slower: DeiT-tiny, 30 photographs, 2.5 s one by one and 6.9 s 16 at once.
_MOST_HELD_BYTES = 2**24
_log = logging.getLogger(__name__)


class Activations:
    """Runs images through a graph in ONNX Runtime, and gives `tensors` of each as the image alone gives them.

    The first batch runs both ways. Where one bit differs (a graph that mixes images, another order of sums), images
    run one by one from then on: a batch is for speed and never shows in a result. `num_copies` of one image are run
    where the graph takes no other number, as the first run shows.
    """

    def __init__(
        self, model: onnx.ModelProto, tensors: Sequence[str], *, most_held_bytes: int = _MOST_HELD_BYTES
    ) -> None:
        self._tensors = list(tensors)
        self._most_held_bytes = most_held_bytes
        self._model = model
        self._session: Any = _session(model, tensors, free_batch=True)
        self._input = self._session.get_inputs()[0].name
        self.num_copies = 1  # of an image, where the graph takes no other number
        self._axes: list[int | None] | None = None  # of the images in each tensor
        self.num_at_once: int | None = None  # set by the first batch

    def of(self, images: Sequence[Array]) -> Iterator[list[Array]]:
        """Yield the tensors of each image in order; raises ModelRejected where the graph does not run."""
        if self.num_at_once is None and len(images) > 1:
            self.num_at_once = self._try_batch(images)
        size = self.num_at_once or 1
        for start in range(0, len(images), size):
            part = images[start : start + size]
            yield from self._together(part) if len(part) > 1 else [self._alone(part[0])]

    def _alone(self, image: Array) -> list[Array]:
        """Return the tensors of one image: of so many copies of it as the graph has to have."""
        try:
            return self._run([image] * self.num_copies)
        except ModelRejected:
            fixed = _fixed_batch(self._model)
            if self.num_copies > 1 or fixed is None or fixed == 1:
                raise
            # Its batch is not only in its signature but inside, in a constant shape.
            self._session, self.num_copies = _session(self._model, self._tensors, free_batch=False), fixed
            return self._run([image] * self.num_copies)

    def _together(self, images: Sequence[Array]) -> list[list[Array]]:
        """Return the tensors of each image of a batch, divided along the axes that the first batch showed."""
        assert self._axes is not None
        values = [
            [value] * len(images) if axis is None else np.split(value, len(images), axis=axis)
            for value, axis in zip(self._run(images), self._axes, strict=True)
        ]
        return [list(each) for each in zip(*values, strict=True)]

    def _try_batch(self, images: Sequence[Array]) -> int:
        """Return how many images run at once: as many as memory allows, where each gives what it gives alone."""
        alone = [self._alone(images[0])]
        fitting = max(1, self._most_held_bytes // max(sum(value.nbytes for value in alone[0]), 1))
        if self.num_copies > 1 or fitting == 1:
            return 1
        tried = images[:fitting]
        alone += [self._alone(image) for image in tried[1:]]
        try:
            self._axes = [_axis(value.shape, len(tried)) for value in self._run(tried)]
            found = self._together(tried)
        except (ModelRejected, ValueError):
            found = []
        if found and all(all(map(_same, *pair)) for pair in zip(alone, found, strict=True)):
            return len(tried)
        _log.info("images run one by one: in this graph a batch gives other values")
        return 1

    def _run(self, images: Sequence[Array]) -> list[Array]:
        stacked = np.stack(images)
        inner = [name for name in self._tensors if name != self._input]
        try:
            # Without names a session would return every output.
            found = self._session.run(inner, {self._input: stacked}) if inner else []
        except Exception as error:  # its exceptions share no base but this
            raise _failed("run", error) from error
        values = dict(zip(inner, found, strict=True)) | {self._input: stacked}
        return [values[name] for name in self._tensors]


def logits_of(model: onnx.ModelProto, images: Sequence[Array]) -> npt.NDArray[np.float32]:
    """Return the first output [images, classes] of `images`, each [1, ...] as the graph takes it.

    One by one: a trial of a batch costs more than it can win for the few images of a sample.
    """
    activations = Activations(model, [model.graph.output[0].name])
    activations.num_at_once = 1
    return np.concatenate([values[0] for values in activations.of([image[0] for image in images])])


def _same(left: Array, right: Array) -> bool:
    """Return whether two arrays are equal, whatever of their shape is 1."""
    return left.size == right.size and left.tobytes() == np.ascontiguousarray(right).tobytes()


def _axis(shape: Sequence[int], num_images: int) -> int | None:
    """Return the axis as long as the batch, else the first that it divides: windows, or heads, of images."""
    equal = [axis for axis, size in enumerate(shape) if size == num_images]
    divided = [axis for axis, size in enumerate(shape) if size and size % num_images == 0]
    return next(iter(equal + divided), None)


def _fixed_batch(model: onnx.ModelProto) -> int | None:
    constants = {tensor.name for tensor in model.graph.initializer}
    value = next(value for value in model.graph.input if value.name not in constants)
    dims = value.type.tensor_type.shape.dim
    return dims[0].dim_value if dims and dims[0].dim_value > 0 else None


def _session(model: onnx.ModelProto, tensors: Sequence[str], *, free_batch: bool) -> Any:
    """Return a session that gives `tensors`; with `free_batch` images come one by one, whatever was fixed."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = usable_threads()
    if free_batch and _fixed_batch(model) is not None:
        freed = onnx.ModelProto()
        freed.CopyFrom(model)
        for value in (*freed.graph.input, *freed.graph.output):
            if value.type.tensor_type.shape.dim:
                value.type.tensor_type.shape.dim[0].dim_param = "batch"
        del freed.graph.value_info[:]
        model = freed
    given = {value.name for value in model.graph.input}
    data = with_outputs(model, [name for name in tensors if name not in given])
    try:
        return onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but this
        raise _failed("load", error) from error


def _failed(verb: str, error: Exception) -> ModelRejected:
    reason = " ".join(str(error).split())[:300]
    remedy = "export it again, or update ONNX Runtime"
    return ModelRejected(
        f"ONNX Runtime {onnxruntime.__version__} cannot {verb} the graph", reason=reason, remedy=remedy
    )
