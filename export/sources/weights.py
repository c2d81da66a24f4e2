"""Weights for a network of any code: prefixes stripped, the head found, what is no weight left out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from vit_edge.conversion.tensor_names import HEAD_NAMES, NOT_WEIGHTS
from vit_edge.conversion.weights_file import find_weights, read_weights
from vit_edge.errors import CheckpointRejected, printable

__all__ = ["fit_weights", "load_weights"]

_NUM_NAMED = 5
_AVERAGED = re.compile(r"ema|averaged", re.IGNORECASE)
_COUNTER = "num_batches_tracked"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    """Tensors by the names of the network, and what was done to get there."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = field(default=())


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file or folder of weights, as `convert` opens it, into a network; raises CheckpointRejected.

    What was left out or renamed is logged. Nothing is loaded partially.
    """
    file = find_weights(Path(path)) if Path(path).is_dir() else path
    fitted = fit_weights(read_weights(file).tensors, network.state_dict(), origin=printable(file))
    network.load_state_dict(dict(fitted.tensors))
    for note in fitted.notes:
        _log.warning("%s: %s", printable(file), note)


def fit_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, origin: str) -> _Fitted:
    """Return the tensors of a file under the names that a network expects; raises CheckpointRejected if one lacks."""
    prefix = _prefix(tensors, expected)
    inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    notes = [f"prefix {prefix!r} stripped from the keys"] if prefix else []
    outside = [key for key in tensors if not key.startswith(prefix)]
    ours = {name: inside.pop(name) for name in expected if name in inside}
    notes += _take_head(ours, inside, expected)
    ours |= {name: tensor for name, tensor in expected.items() if name not in ours and name.endswith(_COUNTER)}
    left = [key for key in outside if NOT_WEIGHTS.fullmatch(key) or _is_copy(key, expected)]
    left += [f"{prefix}{name}" for name in inside if NOT_WEIGHTS.fullmatch(name)]
    unexpected = [key for key in (*outside, *inside) if key not in left and f"{prefix}{key}" not in left]
    _refuse_misfits(ours, expected, unexpected, origin)
    if left:
        notes.append(f"left out, no part of the network: {', '.join(left[:_NUM_NAMED])}{_more(left)}")
    return _Fitted(tensors=ours, notes=tuple(notes))


def _prefix(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return what a wrapper put before the names; of several copies of a network the averaged one, else the first."""
    counts: dict[str, int] = {}
    for key in tensors:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    most = max(counts.values(), default=0)
    # A head under another name, or one that is new, is missing in all of them.
    candidates = [prefix for prefix, count in counts.items() if count == most]
    return next(filter(_AVERAGED.search, candidates), candidates[0] if candidates else "")


def _is_copy(key: str, expected: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor belongs to another copy of the network, such as one without averaging."""
    parts = key.split(".")
    return any(".".join(parts[cut:]) in expected for cut in range(1, len(parts)))


def _take_head(ours: dict[str, Tensor], inside: dict[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Move the head into `ours` if the file has it under another name that heads have; return a note of it."""
    missing = {name.rpartition(".")[0] for name in expected if name not in ours and not name.endswith(_COUNTER)}
    found = {name.rpartition(".")[0] for name in inside if HEAD_NAMES.fullmatch(name)}
    if len(missing) != 1 or len(found) != 1:
        return []
    (target,), (source,) = missing, found
    for end in ("weight", "bias"):
        if f"{source}.{end}" in inside and f"{target}.{end}" in expected:
            ours[f"{target}.{end}"] = inside.pop(f"{source}.{end}")
    return [f"the head {target!r} is {source!r} in the file"]


def _refuse_misfits(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], unexpected: list[str], origin: str
) -> None:
    missing = sorted(expected.keys() - ours.keys())
    problems = [f"{name} is missing" for name in missing][:_NUM_NAMED]
    problems += [f"{name} is not expected" for name in sorted(unexpected)][:_NUM_NAMED]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in ours.items()
        if tensor.shape != expected[name].shape
    ][:_NUM_NAMED]
    if problems:
        reason = f"the weights do not fit the network: {'; '.join(problems)}"
        remedy = "give weights of exactly this architecture"
        raise CheckpointRejected("cannot use the weights", file=origin, reason=reason, remedy=remedy)


def _more(names: list[str]) -> str:
    return f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
