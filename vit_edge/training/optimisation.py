"""How weights change: parameter groups, the learning rate of each step, the moving average, the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_edge.training.recipe import Recipe

__all__ = ["MovingAverage", "Teacher", "learning_rate", "make_optimiser", "set_learning_rate", "training_loss"]

# No decay for what is no direction in space: tokens and positions; norms and biases are left out by their rank.
_TOKENS = ("pos_embed", "cls_token", "dist_token", "reg_token")
_ADAM_BETA1 = 0.9


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases, tokens and positions are not decayed.

    With `layer_decay` d, a parameter of block i of n learns at d^(n - i) of the rate, the embedding at d^(n + 1), the
    head at the whole rate (arXiv:2106.08254). Each group keeps its factor as "rate_factor".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if recipe.freeze_backbone and not name.startswith("head"):
            parameter.requires_grad_(False)
            continue
        decay = recipe.weight_decay if parameter.ndim > 1 and name not in _TOKENS else 0.0
        factor = recipe.layer_decay ** _layers_from_head(name, model)
        groups.setdefault((factor, decay), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor}
        for (factor, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=recipe.learning_rate, betas=(_ADAM_BETA1, recipe.adam_beta2))


def _layers_from_head(name: str, model: nn.Module) -> int:
    depth = sum(1 for child in getattr(model, "blocks", ()))
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return depth - int(block[1])
    return 0 if name.startswith(("head", "norm.")) else depth + 1


def learning_rate(step: int, num_steps: int, recipe: Recipe) -> float:
    """Return the rate of the step that follows `step` finished ones: linear warm-up, then a cosine to zero."""
    warmup = max(1, int(recipe.warmup_fraction * num_steps))
    done = min(1.0, step / num_steps)
    return recipe.learning_rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate_factor"]


class MovingAverage:
    """An exponential moving average of a model's state; early steps count more, so that the start is forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights by 1 - min(decay, (1 + n) / (10 + n)) after n updates."""
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, tensor in model.state_dict().items():
            self.state[name].lerp_(tensor, weight)

    def load(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from an average that was saved."""
        self.num_updates = num_updates
        for name, tensor in self.state.items():
            tensor.copy_(state[name])


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network to learn from, with its own normalisation; `order` puts its classes into the student's order."""

    model: nn.Module
    mean: Tensor
    std: Tensor
    size: tuple[int, int]
    order: Tensor
    sha256: str | None  # of the file that it came from

    @torch.no_grad()
    def __call__(self, images_BCYX: Tensor) -> Tensor:
        """Return logits [B, K] for images in [0, 255], resized to the teacher's input where it differs."""
        images_BCYX = (images_BCYX.float() / 255 - self.mean) / self.std
        if images_BCYX.shape[2:] != self.size:
            images_BCYX = functional.interpolate(images_BCYX, self.size, mode="bicubic", antialias=True)
        logits_BK: Tensor = self.model(images_BCYX)[:, self.order]
        return logits_BK


def training_loss(heads: tuple[Tensor, ...], targets: Tensor, taught: Tensor | None, recipe: Recipe) -> Tensor:
    """Return the sum over the images of the loss: labels for the first head, the teacher for the last.

    Hard distillation takes the teacher's answer as a label, soft distillation the Kullback-Leibler divergence at a
    temperature, times its square (arXiv:2012.12877, equations 2 and 3). Without a second head both meet in the first.
    """
    labelled = functional.cross_entropy(heads[0], targets, label_smoothing=recipe.label_smoothing, reduction="sum")
    if taught is None:
        for head in heads[1:]:
            labelled = labelled + functional.cross_entropy(
                head, targets, label_smoothing=recipe.label_smoothing, reduction="sum"
            )
        return labelled / len(heads)
    if recipe.distillation == "hard":
        distilled = functional.cross_entropy(heads[-1], taught.argmax(dim=1), reduction="sum")
    else:
        temperature = recipe.distillation_temperature
        student, teacher = (functional.log_softmax(logits / temperature, dim=1) for logits in (heads[-1], taught))
        distilled = functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
    return (1 - recipe.distillation_weight) * labelled + recipe.distillation_weight * distilled
