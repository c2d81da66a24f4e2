"""The activation that ends a torch classifier: found by running it, and left out of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vit_edge.model_file.tasks import Activation

__all__ = ["logits_of"]

_ATEN = torch.ops.aten
_ACTIVATIONS: dict[Any, Activation] = {
    _ATEN._softmax: "softmax",
    _ATEN.softmax: "softmax",
    _ATEN._log_softmax: "softmax",
    _ATEN.log_softmax: "softmax",
    _ATEN.sigmoid: "sigmoid",
}


def logits_of(module: nn.Module, images_NCHW: Tensor) -> tuple[Any, Activation | None]:
    """Return the output of a module before the softmax or sigmoid that ends it, and that activation or None."""
    with _Recorder() as recorder:
        found = module(images_NCHW)
    if not isinstance(found, Tensor):
        return found, None
    for activation, logits, output in reversed(recorder.calls):
        if output.data_ptr() == found.data_ptr() and output.shape == found.shape:
            return logits, activation
    return found, None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keep input and output of each softmax and sigmoid over two axes; a logarithm behind one belongs to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Activation, Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        activation = _ACTIVATIONS.get(func.overloadpacket)
        if func.overloadpacket == _ATEN.log and self.calls and self.calls[-1][2] is args[0]:
            self.calls.append((self.calls[-1][0], self.calls[-1][1], result))
        elif activation is not None and result.ndim == 2 and (activation == "sigmoid" or args[1] in (1, -1)):
            self.calls.append((activation, args[0], result))
        return result
