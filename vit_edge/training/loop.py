"""One optimiser step, and one evaluation, of any classifier on any device, alone or among other processes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from vit_edge.image import Preprocessing
from vit_edge.training.batches import SplitImages, TrainingBatches, evaluation_batches, seed_of
from vit_edge.training.optimisation import (
    MovingAverage,
    Teacher,
    learning_rate,
    make_optimiser,
    set_learning_rate,
    training_loss,
)
from vit_edge.training.processes import Processes
from vit_edge.vit import VisionTransformer

__all__ = ["Evaluation", "Loop"]

_DROPOUT = 3  # kinds 0 to 2 are those of vit_edge.batches
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers on a split: `confusion[true class, answer]` counts images, `loss` is the mean cross-entropy."""

    confusion: Tensor
    loss: float

    @property
    def num_images(self) -> int:
        """Return how many images were evaluated."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Return the share of right answers in percent."""
        return float(self.confusion.diagonal().sum()) / self.num_images * 100


class _Heads(nn.Module):
    """The logits of every head, through `forward`: what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCYX: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, VisionTransformer):
            return self.model.forward_heads(images_BCYX)
        return (self.model(images_BCYX),)


class Loop:
    """The state of a run: weights, optimiser, moving average, and how many steps are done.

    `step` finished steps and the recipe's seed are all there is to the randomness of the next one.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: TrainingBatches,
        *,
        device: torch.device,
        processes: Processes | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.recipe, self.batches, self.device = batches.recipe, batches, device
        self.processes, self.teacher, self.step = processes or Processes(), teacher, 0
        self.model = model.to(device)
        self._sums = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
        self.optimiser = make_optimiser(self.model, self.recipe)
        self.average = MovingAverage(self.model, self.recipe.ema_decay) if self.recipe.ema_decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.recipe.precision == "float16")
        heads: nn.Module = _Heads(self.model)
        if self.processes.world_size > 1:
            heads = DistributedDataParallel(heads)
        self._heads: Any = torch.compile(heads) if self.recipe.compile else heads
        self._mean, self._std = _normalisation(batches.split_images.preprocessing, device)

    @property
    def num_steps(self) -> int:
        """Return how many steps the whole run has."""
        return len(self.batches)

    @property
    def rate(self) -> float:
        """Return the learning rate of the next step, that of the head."""
        return learning_rate(self.step, self.num_steps, self.recipe)

    def train_step(self, images: Tensor, targets: Tensor) -> float:
        """Take one optimiser step on this process's part of the batch; returns the mean loss over the whole batch."""
        self._training_mode()
        set_learning_rate(self.optimiser, self.rate)
        # Dropout of this step: another on each process, the same whenever the step is taken again.
        torch.manual_seed(seed_of(self.recipe.seed, _DROPOUT, self.step, self.processes.rank))
        self.optimiser.zero_grad()
        batch_size = self.batches.size(self.step)
        total = torch.zeros((), dtype=self._sums, device=self.device)
        parts = self.recipe.accumulation_steps
        pieces = list(zip(torch.tensor_split(images, parts), torch.tensor_split(targets, parts), strict=True))
        for number, (some_images, some_targets) in enumerate(pieces):
            total += self._backward(some_images, some_targets, batch_size, last=number == len(pieces) - 1)
        self.scaler.unscale_(self.optimiser)
        if self.recipe.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update(self.model)
        self.step += 1
        return float(self.processes.sum(total)) / batch_size

    @torch.no_grad()
    def evaluate(self, split_images: SplitImages, *, model: nn.Module | None = None) -> Evaluation:
        """Return how `model`, or what a checkpoint would hold now, answers on a split; float32, over all processes."""
        model = (model or self.averaged()).eval()
        num_classes = len(split_images.images.class_names)
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=self._sums, device=self.device)
        mean, std = _normalisation(split_images.preprocessing, self.device)
        rank, world_size = self.processes.rank, self.processes.world_size
        for batch in evaluation_batches(split_images, rank=rank, world_size=world_size):
            images, labels = (tensor.to(self.device) for tensor in batch)
            logits = model((images.float() / 255 - mean) / std)
            loss += functional.cross_entropy(logits, labels, reduction="sum").to(self._sums)
            cells = labels * num_classes + logits.argmax(dim=1)
            confusion += torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)
        confusion, loss = self.processes.sum(confusion), self.processes.sum(loss)
        return Evaluation(confusion.cpu(), float(loss) / max(1, int(confusion.sum())))

    def averaged(self) -> nn.Module:
        """Return the network that a checkpoint would hold: the moving average where the recipe keeps one."""
        if self.average is None:
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average.state)
        return model

    def _training_mode(self) -> None:
        self.model.train()
        if self.recipe.freeze_backbone:  # dropout belongs to what learns
            self.model.eval()

    def _backward(self, images: Tensor, targets: Tensor, batch_size: int, *, last: bool) -> Tensor:
        """Add the gradients of one piece; returns the sum of its losses."""
        images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        precision = _DTYPES.get(self.recipe.precision)
        if not last and isinstance(self._heads, DistributedDataParallel):
            with self._heads.no_sync():
                return self._forward_and_backward(images, targets, batch_size, precision)
        return self._forward_and_backward(images, targets, batch_size, precision)

    def _forward_and_backward(
        self, images: Tensor, targets: Tensor, batch_size: int, precision: torch.dtype | None
    ) -> Tensor:
        taught = self.teacher(images) if self.teacher else None
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            heads = self._heads((images.float() / 255 - self._mean) / self._std)
        loss = training_loss(tuple(head.float() for head in heads), targets, taught, self.recipe)
        # Processes average their gradients: times their number, that is the sum over the batch, whoever has how many.
        scaled = self.scaler.scale(loss * (self.processes.world_size / batch_size))
        scaled.backward()  # type: ignore[no-untyped-call]
        return loss.detach().to(self._sums)


def _normalisation(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return mean, std
