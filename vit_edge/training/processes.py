"""One training run over one process or many: what torchrun says, and the few sums that processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from vit_edge.errors import EngineUnavailable
from vit_edge.machine.cpu import usable_threads

__all__ = ["Processes", "choose_device", "joined"]


@dataclass(frozen=True, slots=True)
class Processes:
    """One process among those of the run; alone unless torchrun started it (RANK, WORLD_SIZE, LOCAL_RANK)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """Return what torchrun says."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0, 1), strict=True)))

    @property
    def is_writer(self) -> bool:
        """Return whether this process writes files and shows progress: exactly one does."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """Return this process's share of the threads that the machine grants."""
        return max(1, usable_threads() // self.local_world_size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on each; exact for whole numbers."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            distributed.barrier()


@contextmanager
def joined(processes: Processes, device: torch.device) -> Iterator[None]:
    """Connect the processes for the time of the block: nccl between GPUs, gloo between CPUs."""
    if processes.world_size == 1:
        yield
        return
    distributed.init_process_group(backend="nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def choose_device(name: str, processes: Processes) -> torch.device:
    """Return the device of this process; "auto" is a GPU where there is one. Raises EngineUnavailable."""
    present = ["cpu"]
    present += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        name = present[1] if len(present) > 1 else "cpu"
    if name.split(":")[0] == "cuda" and processes.world_size > 1:
        name = f"cuda:{processes.local_rank}"
    if name not in present and not (name == "cuda" and "cuda:0" in present):
        reason = f"there is no device {name!r}; there is {', '.join(present)}"
        raise EngineUnavailable("cannot train", reason=reason, remedy="choose one of these with --device")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
