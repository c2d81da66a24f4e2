"""Which output of a classifier made elsewhere are its logits, and at which batches it runs: found out by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from vit_edge.errors import ModelRejected, UsageError
from vit_edge.export.graph.editing import with_outputs
from vit_edge.export.onnx_import.cleanup import free_batch, prune
from vit_edge.export.onnx_import.interface import Output
from vit_edge.export.onnx_import.reference import ThirdPartyReference
from vit_edge.export.onnx_import.sandbox import probe
from vit_edge.export.onnx_import.shape_folding import fold_shapes, open_batch, reshaped_tensors, shape_tensors
from vit_edge.export.parity.parity import float32_tolerance
from vit_edge.runtime.checks.golden import differences

__all__ = ["choose_output", "settle_batch"]

Array: TypeAlias = npt.NDArray[Any]

_BATCHES = (1, 2, 3)


def choose_output(
    model: onnx.ModelProto, reference: ThirdPartyReference, told: str | None, num_labels: int, notes: list[str]
) -> Output:
    """Return the output told, or the first [batch, classes]; `reference` answers with it from then on.

    A Softmax that makes it is left out: the runtime makes probabilities of logits itself. Raises UsageError where the
    labels do not fit, ModelRejected where there is no such output.
    """
    names = [value.name for value in model.graph.output]
    if told is not None and told not in names:
        reason = f"it has no output {told!r}; it has {', '.join(names)}"
        raise UsageError("cannot take the network", reason=reason, remedy="name one of these")
    batch, values = reference.values([told] if told else names)
    fitting = [name for name, value in values.items() if _is_logits(value, batch)]
    if not fitting:
        shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values.items())
        reason = f"no output is float32 [batch, classes] at batch {batch}: {shapes}"
        raise ModelRejected("cannot take the network", reason=reason, remedy="export an image classifier")
    name = min(fitting, key=lambda name: (values[name].ndim, names.index(name)))
    num_classes = values[name].size // batch
    if num_classes != num_labels:
        reason = f"{num_labels} labels for {num_classes} classes"
        raise UsageError("cannot take the network", reason=reason, remedy="give one label for each class, in order")
    if len(names) > 1:
        notes.append(f"of its outputs {', '.join(names)}, {name} is taken for the logits")
    found = Output(name=name, rank=values[name].ndim, num_classes=num_classes)
    found = _before_softmax(model, found, values[name].reshape(batch, -1), notes)
    reference.answer_with(found.name)
    return found


def _is_logits(value: Array, batch: int) -> bool:
    is_flat = value.ndim >= 2 and value.shape[0] == batch and value.size == batch * value.shape[1]
    return value.dtype == np.float32 and is_flat


def _before_softmax(model: onnx.ModelProto, output: Output, values_BK: Array, notes: list[str]) -> Output:
    """Return what a last Softmax over the classes reads; say so, or say that the output looks like probabilities."""
    maker = next((node for node in model.graph.node if output.name in node.output), None)
    if maker is not None and maker.op_type == "Softmax":
        axis = next((attribute.i for attribute in maker.attribute if attribute.name == "axis"), -1)
        if output.rank == 2 and axis in (-1, 1):
            notes.append("its last operator, Softmax, is left out: what is read are the logits before it")
            return Output(name=maker.input[0], rank=2, num_classes=output.num_classes)
    if values_BK.shape[1] > 1 and values_BK.min() >= 0 and np.allclose(values_BK.sum(axis=1), 1, atol=1e-3):
        notes.append("its output are probabilities, not logits: margins and SQNR are theirs")
    return output


def settle_batch(
    model: onnx.ModelProto, output: Output, reference: ThirdPartyReference
) -> tuple[onnx.ModelProto, int | None]:
    """Return the graph up to the logits, shapes folded, and None where any batch runs, else the batch it is fixed at.

    Any is taken to run where 1, 2 and 3 give what each image gives alone. Raises ModelRejected where nothing does.
    """
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=output.name))
    prune(model.graph)
    found = _folded(free_batch(model), _BATCHES, reference)
    if not isinstance(found, str) and _answers(found, _BATCHES, reference):
        return found, None
    fixed = reference.entry.fixed or 1
    folded = _folded(free_batch(model, fixed=fixed), [fixed], reference)
    if isinstance(folded, str):
        reason = f"ONNX Runtime does not run it at batch {fixed}: {folded}"
        raise ModelRejected("cannot take the network", reason=reason, remedy="export it again with a free batch")
    opened = free_batch(folded)
    open_batch(opened, fixed)
    if _answers(opened, _BATCHES, reference):
        return opened, None
    if not _answers(folded, [fixed], reference):
        reason = f"at batch {fixed} its answers depend on the other images"
        raise ModelRejected("cannot take the network", reason=reason, remedy="export it again in evaluation mode")
    return folded, fixed


def _folded(model: onnx.ModelProto, batches: Sequence[int], reference: ThirdPartyReference) -> onnx.ModelProto | str:
    """Return the graph with the arithmetic on shapes computed, or why it does not run at these batches."""
    names = [*shape_tensors(model.graph), *reshaped_tensors(model.graph)]
    found = _run(model, batches, list(dict.fromkeys(names)) or [model.graph.output[0].name], reference)
    if not isinstance(found, str):
        fold_shapes(model, found)
        return model
    return found


def _answers(model: onnx.ModelProto, batches: Sequence[int], reference: ThirdPartyReference) -> bool:
    """Return whether the graph answers each batch as the file answers its images alone."""
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
    """Return the tensors at each batch, or why one cannot be run."""
    feeds = [reference.feed(reference.images(batch)) for batch in batches]
    try:
        results = probe(with_outputs(model, names), feeds, names)
    except ModelRejected as error:
        return error.reason
    found = {batch: result for batch, result in zip(batches, results, strict=True) if not isinstance(result, str)}
    problems = [result for result in results if isinstance(result, str)]
    return problems[0] if problems else found
