"""What a stopped run needs to go on as if it had not stopped: weights, optimiser, average; tensors and JSON only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from vit_edge.errors import UsageError
from vit_edge.tensor_file import read_tensors, rejected, write_tensors
from vit_edge.training.loop import Loop

__all__ = ["load_state", "save_state"]

_KEY = "vit_edge.state"
_NUM_NAMED = 10


def save_state(
    path: str | os.PathLike[str], loop: Loop, *, identity: Mapping[str, Any], memory: Mapping[str, Any]
) -> None:
    """Write the state of `loop` with the run's `identity` (what must be equal to go on) and its `memory`."""
    tensors = {f"model.{name}": tensor for name, tensor in loop.model.state_dict().items()}
    if loop.average:
        tensors |= {f"average.{name}": tensor for name, tensor in loop.average.state.items()}
    parameters = _parameters(loop)
    for index, values in loop.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{parameters[index]}.{name}": tensor for name, tensor in values.items()}
    header = {
        "step": loop.step,
        "average_updates": loop.average.num_updates if loop.average else 0,
        "scaler": loop.scaler.state_dict(),
        "identity": identity,
        "memory": memory,
    }
    write_tensors(path, key=_KEY, header=header, tensors=tensors)


def load_state(
    path: str | os.PathLike[str], loop: Loop, *, identity: Mapping[str, Any], allow_drift: bool
) -> dict[str, Any]:
    """Put `loop` where the state was saved and return its memory.

    Raises CheckpointRejected on a damaged file, UsageError that shows the differences where the identity is another
    one, unless `allow_drift`.
    """
    header, tensors, _ = read_tensors(path, key=_KEY)
    differences = sorted(_differences(header["identity"], json.loads(json.dumps(identity))))  # JSON has no tuples
    if differences and not allow_drift:
        named = "; ".join(differences[:_NUM_NAMED])
        reason = f"the run is not the one that was stopped: {named}"
        remedy = "give what it was started with, or --allow-drift to go on all the same"
        raise UsageError("cannot resume", file=path, reason=reason, remedy=remedy)
    try:
        _restore(loop, header, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"the weights are of another network ({str(error)[:200]})"
        raise rejected(path, reason, "start again in another folder") from error
    memory: dict[str, Any] = header["memory"]
    return memory


def _restore(loop: Loop, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    loop.model.load_state_dict(_under("model.", tensors))
    if loop.average:
        loop.average.load(_under("average.", tensors), header["average_updates"])
    state: dict[int, dict[str, Tensor]] = {}
    parameters = _parameters(loop)
    for name, tensor in _under("optimiser.", tensors).items():
        parameter, _, value = name.rpartition(".")
        state.setdefault(parameters.index(parameter), {})[value] = tensor
    # Groups and rates are the recipe's; only what the optimiser has gathered comes from the file.
    loop.optimiser.load_state_dict({"state": state, "param_groups": loop.optimiser.state_dict()["param_groups"]})
    if header["scaler"]:
        loop.scaler.load_state_dict(header["scaler"])
    loop.step = header["step"]


def _parameters(loop: Loop) -> list[str]:
    """Return the names of the parameters in the optimiser's order, which is that of the recipe's groups."""
    names = {id(parameter): name for name, parameter in loop.model.named_parameters()}
    return [names[id(parameter)] for group in loop.optimiser.param_groups for parameter in group["params"]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {str(old)[:80]}, is {str(new)[:80]}"
