"""What a run starts from: a named architecture with fresh weights, or a checkpoint; and whom it may learn from."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from vit_edge.checkpoint import Checkpoint
from vit_edge.convert import open_source
from vit_edge.errors import UsageError
from vit_edge.image import Preprocessing
from vit_edge.training.optimisation import Teacher
from vit_edge.training.recipe import Recipe
from vit_edge.vit import VisionTransformer, ViTConfig, variant

__all__ = ["Start", "make_teacher"]

DEFAULT_ARCH = "vit_digits_patch8_32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The network before the first step; `source` is the checkpoint that its weights come from, if any."""

    name: str
    config: ViTConfig
    preprocessing: Preprocessing
    source: Checkpoint | None = None

    @classmethod
    def of(
        cls, arch: str | None, source: str | os.PathLike[str] | None, *, image_size: tuple[int, int] | None
    ) -> Start:
        """Return the start that the user named; raises UsageError."""
        if arch is not None and source is not None:
            reason = "an architecture and a checkpoint are given"
            raise UsageError("cannot train", reason=reason, remedy="give --arch or --from, not both")
        if source is not None:
            opened = open_source(source, image_size=image_size)
            return cls(name=opened.name, config=opened.model.config, preprocessing=opened.preprocessing, source=opened)
        try:
            config = variant(arch or DEFAULT_ARCH, num_classes=1)
            config = replace(config, image_size=image_size or config.image_size)
        except ValueError as error:
            raise UsageError("cannot train", reason=str(error), remedy="see `vit-edge train -h`") from error
        preprocessing = Preprocessing(
            resize=max(config.image_size), crop=config.image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        )
        return cls(name=arch or DEFAULT_ARCH, config=config, preprocessing=preprocessing)

    def class_names(self, found: tuple[str, ...]) -> tuple[str, ...]:
        """Return the classes of the data in the order of the checkpoint's head, where they are the same ones."""
        if self.source and set(self.source.labels) == set(found):
            return self.source.labels
        return found

    def model(self, class_names: tuple[str, ...], recipe: Recipe) -> tuple[VisionTransformer, bool]:
        """Return the network for these classes, and whether the checkpoint's head had to be replaced."""
        config = replace(
            self.config,
            num_classes=len(class_names),
            dropout=recipe.dropout,
            stochastic_depth=recipe.stochastic_depth,
        )
        torch.manual_seed(recipe.seed)
        model = VisionTransformer(config)
        if self.source is None:
            return model, False
        weights = self.source.model.state_dict()
        replaced = class_names != self.source.labels
        if replaced:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head")}
        unloaded = model.load_state_dict(weights, strict=False)
        assert not unloaded.unexpected_keys, unloaded
        assert all(replaced and name.startswith("head") for name in unloaded.missing_keys), unloaded
        return model, replaced


def make_teacher(
    path: str | os.PathLike[str] | None, class_names: tuple[str, ...], recipe: Recipe, device: torch.device
) -> Teacher | None:
    """Return the teacher that the recipe's distillation asks for; raises UsageError where one of them is missing."""
    if (path is None) != (recipe.distillation == "none"):
        reason = f"distillation is {recipe.distillation!r} and {'no' if path is None else 'a'} teacher is given"
        remedy = "give both: --teacher CKPT and --set distillation=hard (or soft)"
        raise UsageError("cannot train", reason=reason, remedy=remedy)
    if path is None:
        return None
    teacher = open_source(path)
    if set(teacher.labels) != set(class_names):
        reason = f"the teacher has {len(teacher.labels)} classes, and not the same as the images ({len(class_names)})"
        raise UsageError("cannot learn from the teacher", file=path, reason=reason, remedy="fine-tune it first")
    mean, std = (
        torch.tensor(v, device=device).view(3, 1, 1) for v in (teacher.preprocessing.mean, teacher.preprocessing.std)
    )
    order = torch.tensor([teacher.labels.index(name) for name in class_names], device=device)
    return Teacher(teacher.model.eval().to(device), mean, std, teacher.model.config.image_size, order, teacher.sha256)
