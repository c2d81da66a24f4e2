"""What the logits of a model file are for: one class of several, several labels at once, or values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

__all__ = ["ACTIVATION_OF", "Activation", "Task", "binary_labels", "settled_task"]

# What turns logits into probabilities: one class of several, several classes at once, or nothing.
Activation: TypeAlias = Literal["softmax", "sigmoid", "none"]
# "binary" is a network of one logit: the file has two, zero and that one, whose softmax is its sigmoid. All else about
# it is a classifier of two classes.
Task: TypeAlias = Literal["classification", "binary", "multi-label", "regression"]
# A classifier may have any: independent probabilities of CLIP-like networks, or values whose meaning is not known.
ACTIVATION_OF: dict[Task, tuple[Activation, ...]] = {
    "classification": get_args(Activation),
    "binary": ("softmax",),
    "multi-label": ("sigmoid",),
    "regression": ("none",),
}


def settled_task(declared: Activation | None, found: Activation | None, num_values: int) -> Task | None:
    """Return what a network is for whose activation is declared or was found at its end; None if one logit has none.

    `found` is "none" if the network ends in probabilities that cannot be taken out: that is no regression.
    """
    activation = declared or found
    if num_values == 1:
        return "binary" if activation == "sigmoid" else "regression" if declared == "none" else None
    if activation == "sigmoid":
        return "multi-label"
    return "regression" if declared == "none" and found is None else "classification"


def binary_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of a network of one logit, that of the zero first: `not x` if there is only one name."""
    return (f"not {labels[0]}", labels[0]) if len(labels) == 1 else tuple(labels)
