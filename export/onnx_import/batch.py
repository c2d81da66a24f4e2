"""Find by running it which output of a third-party classifier holds the logits, and which batch sizes run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.export.graph.editing import with_outputs
from vit_edge.export.onnx_import.cleanup import free_batch
from vit_edge.export.onnx_import.reference import ThirdPartyReference
from vit_edge.export.onnx_import.sandbox import probe
from vit_edge.export.onnx_import.shape_folding import fold_shapes, open_batch, reshaped_tensors, shape_tensors
from vit_edge.export.parity.parity import float32_tolerance
from vit_edge.model_file.tasks import Activation
from vit_edge.runtime.checks.golden import differences
from vit_edge.runtime.onnx_import.editing import prune
from vit_edge.runtime.onnx_import.head import Output, are_probabilities, check_labels, drop_activation

__all__ = ["choose_output", "settle_batch"]

Array: TypeAlias = npt.NDArray[Any]

_BATCHES = (1, 2, 3)


def choose_output(
    model: onnx.ModelProto, reference: ThirdPartyReference, chosen: str | None, num_labels: int, notes: list[str]
) -> tuple[Output, Activation | None]:
    """Return the output chosen, or the first [batch, classes], and the activation that ended it; None if none did.

    A softmax or sigmoid is taken out of `model`; `reference` returns the logits before it from then on. Raises
    UsageError if the labels do not fit, ModelRejected if there is no such output.
    """
    names = [value.name for value in model.graph.output]
    if chosen is not None and chosen not in names:
        reason = f"the model has no output {chosen!r}; its outputs are {', '.join(names)}"
        raise UsageError("cannot import", reason=reason, remedy="name one of these with --logits")
    batch, values = reference.values([chosen] if chosen else names)
    fitting = [name for name, value in values.items() if _is_logits(value, batch)]
    if not fitting:
        shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values.items())
        reason = f"no output is float32 [batch, classes] at batch {batch}: {shapes}"
        raise ModelRejected("cannot import", reason=reason, remedy="export an image classifier")
    name = min(fitting, key=lambda name: (values[name].ndim, names.index(name)))
    num_classes = values[name].size // batch
    check_labels(num_classes, num_labels)
    if len(names) > 1:
        notes.append(f"of the outputs {', '.join(names)}, {name} is used as the logits")
    found = Output(name=name, rank=values[name].ndim, num_classes=num_classes)
    return found, _without_activation(model, reference, found, values[name].reshape(batch, -1), notes)


def _is_logits(value: Array, batch: int) -> bool:
    is_flat = value.ndim >= 2 and value.shape[0] == batch and value.size == batch * value.shape[1]
    return value.dtype == np.float32 and is_flat


def _without_activation(
    model: onnx.ModelProto, reference: ThirdPartyReference, output: Output, values_BK: Array, notes: list[str]
) -> Activation | None:
    """Take the last activation out of graph and reference; "none" if the graph gives probabilities in another way."""
    activation = drop_activation(model.graph, output.name, rank=output.rank)
    reference.use_output(output.name, rank=output.rank, before_activation=activation in ("softmax", "sigmoid"))
    if activation in ("softmax", "sigmoid"):
        notes.append(f"the last operator, {activation.capitalize()}, is left out: the file gives the logits before it")
        return activation
    if activation == "none" or are_probabilities(values_BK):
        notes.append("the outputs are probabilities, not logits: margins and SQNR are computed from them")
        return "none"
    return None


def settle_batch(
    model: onnx.ModelProto, output: Output, reference: ThirdPartyReference
) -> tuple[onnx.ModelProto, int | None]:
    """Return the graph up to the logits, shapes folded, and the fixed batch size; None if the batch is dynamic.

    The batch is dynamic if 1, 2 and 3 images give what each image gives alone. Raises ModelRejected if no batch runs.
    """
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=output.name))
    prune(model.graph)
    found = _folded(free_batch(model), _BATCHES, reference)
    if not isinstance(found, str) and _agrees(found, _BATCHES, reference):
        return found, None
    fixed = reference.entry.batch_size or 1
    folded = _folded(free_batch(model, fixed=fixed), [fixed], reference)
    if isinstance(folded, str):
        reason = f"ONNX Runtime does not run the model at batch {fixed}: {folded}"
        raise ModelRejected("cannot import", reason=reason, remedy="export the model again with a dynamic batch")
    opened = free_batch(folded)
    open_batch(opened, fixed)
    if _agrees(opened, _BATCHES, reference):
        return opened, None
    if not _agrees(folded, [fixed], reference):
        reason = f"at batch {fixed} the logits of an image depend on the other images"
        raise ModelRejected("cannot import", reason=reason, remedy="export the model again in evaluation mode")
    return folded, fixed


def _folded(model: onnx.ModelProto, batches: Sequence[int], reference: ThirdPartyReference) -> onnx.ModelProto | str:
    """Return the graph with the arithmetic on shapes computed, or the error if these batches do not run."""
    names = [*shape_tensors(model.graph), *reshaped_tensors(model.graph)]
    found = _run(model, batches, list(dict.fromkeys(names)) or [model.graph.output[0].name], reference)
    if not isinstance(found, str):
        fold_shapes(model, found)
        return model
    return found


def _agrees(model: onnx.ModelProto, batches: Sequence[int], reference: ThirdPartyReference) -> bool:
    """Return whether the graph gives for each batch what the file gives for its images alone."""
    name = model.graph.output[0].name
    found = _run(model, batches, [name], reference)
    if isinstance(found, str):
        return False
    expected_BK = reference(reference.images(max(batches)))
    tolerance = replace(float32_tolerance(expected_BK), sqnr_db=None)  # one image alone may have logits near zero
    return not any(
        values[name].shape[:1] != (batch,)
        or differences(expected_BK[:batch], values[name].reshape(batch, -1), tolerance)
        for batch, values in found.items()
    )


def _run(
    model: onnx.ModelProto, batches: Sequence[int], names: Sequence[str], reference: ThirdPartyReference
) -> Mapping[int, Mapping[str, Array]] | str:
    """Return the tensors at each batch, or the error of the first that does not run."""
    feeds = [reference.feed(reference.images(batch)) for batch in batches]
    try:
        results = probe(with_outputs(model, names), feeds, names)
    except ModelRejected as error:
        return error.reason
    found = {batch: result for batch, result in zip(batches, results, strict=True) if not isinstance(result, str)}
    problems = [result for result in results if isinstance(result, str)]
    return problems[0] if problems else found
