"""What attention needs to beat convolution on few images: same data, same minutes, same augmentation.

    python benchmarks/attention_vs_convolution.py CIFAR_FOLDER --minutes 6 --pretrained DEIT.safetensors

A small Vision Transformer and torchvision's ResNet-18 adapted to 32x32 train from scratch, one after the other, each
for the same minutes of training (evaluation is not counted); the learning rate follows the minutes. A pretrained
Vision Transformer, where one is given, is fine-tuned for the same minutes on the same images. Writes curves to
docs/images/attention_vs_convolution.png and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision
from matplotlib.figure import Figure
from support.results import machine, write_section
from torch import nn

from vit_edge.checkpoint import load_checkpoint
from vit_edge.data import Splits, read_splits
from vit_edge.image import Preprocessing
from vit_edge.machine.cpu import usable_threads
from vit_edge.progress import silent
from vit_edge.training.batches import SplitImages, TrainingBatches, load_split
from vit_edge.training.loop import Loop
from vit_edge.training.optimisation import learning_rate
from vit_edge.training.recipe import Recipe
from vit_edge.vit import VisionTransformer, ViTConfig

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "attention_vs_convolution.png"
SMALL = Preprocessing(resize=32, crop=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# For all alike. The rates below did best of 3e-4, 1e-3 and 3e-3 (pretrained: 1e-4, 2e-4, 5e-4) in a fifth of the
# minutes, evaluated on a tenth of the training images (`--try-rates`).
COMMON = Recipe(
    epochs=10_000, batch_size=64, weight_decay=0.05, warmup_fraction=0.05, crop_area=0.4, flip_probability=0.5,
    rand_augment_operations=1, rand_augment_magnitude=9, label_smoothing=0.1, validation_fraction=0.1,
)  # fmt: skip
_RATE_STEPS = 1_000_000


@dataclass(slots=True)
class Contestant:
    """A network, how it learns, and what it reached when."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    recipe: Recipe
    minutes: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    epochs: float = 0.0

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class TimedLoop(Loop):
    """A loop whose learning rate follows the share of its minutes that is gone."""

    done = 0.0

    @property
    def rate(self) -> float:
        return learning_rate(int(self.done * _RATE_STEPS), _RATE_STEPS, self.recipe)


def resnet18_for_32_pixels(num_classes: int) -> nn.Module:
    """Return ResNet-18 with a 3x3 first convolution and without the first pooling, as is usual for CIFAR."""
    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def small_vit(num_classes: int) -> nn.Module:
    """Return a Vision Transformer of 2.7 million parameters that cuts 32x32 pixels into 64 patches."""
    return VisionTransformer(
        ViTConfig(
            image_size=(32, 32), patch_size=(4, 4), width=192, depth=6, num_heads=3, mlp_width=768,
            num_classes=num_classes,
        )
    )  # fmt: skip


def pretrained(path: Path, num_classes: int) -> tuple[nn.Module, Preprocessing]:
    """Return a checkpoint's network with a new head, and the preprocessing it was trained with."""
    checkpoint = load_checkpoint(path)
    model = VisionTransformer(replace(checkpoint.model.config, num_classes=num_classes))
    weights = {k: v for k, v in checkpoint.model.state_dict().items() if not k.startswith("head")}
    model.load_state_dict(weights, strict=False)
    return model, checkpoint.preprocessing


def compete(contestant: Contestant, splits: Splits, *, minutes: float, judge_every: float) -> None:
    """Train for the minutes and note the accuracy on the way; the last figure is that on the test images."""
    print(f"{contestant.name}: {contestant.num_parameters:,} parameters", flush=True)
    images = load_split(splits.train, contestant.preprocessing, cropped=False, stage="", progress=silent)
    assert splits.test is not None
    test = load_split(splits.test, contestant.preprocessing, cropped=True, stage="", progress=silent)
    batches = TrainingBatches(images, contestant.recipe, num_classes=len(splits.train.class_names))
    loop = TimedLoop(contestant.model, batches, device=torch.device("cpu"))
    spent, judged = 0.0, 0.0
    stream = batches.from_step(0, workers=0)
    while spent < minutes * 60:
        begun = time.monotonic()
        loop.train_step(*next(stream))
        spent += time.monotonic() - begun
        loop.done = min(1.0, spent / (minutes * 60))
        if spent - judged >= judge_every * 60 and spent < minutes * 60:
            judged = spent
            note(contestant, loop, test, spent)
    note(contestant, loop, test, spent)
    contestant.epochs = loop.step / batches.steps_per_epoch


def note(contestant: Contestant, loop: Loop, test: SplitImages, spent: float) -> None:
    top1 = loop.evaluate(test).top1
    contestant.minutes.append(spent / 60)
    contestant.top1.append(top1)
    print(f"  {spent / 60:5.1f} minutes, {loop.step} steps: {top1:.1f} %", flush=True)


def draw(contestants: list[Contestant], num_images: int) -> None:
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for contestant in contestants:
        axis.plot(contestant.minutes, contestant.top1, marker=".", label=contestant.name)
    axis.set(xlabel="minutes of training", ylabel="test top-1, %", title=f"CIFAR-10, {num_images:,} training images")
    axis.grid(alpha=0.3)
    axis.legend()
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, metadata={"Software": None})


def report(contestants: list[Contestant], splits: Splits, minutes: float, seed: int) -> str:
    assert splits.test is not None
    images = f"{splits.train.num_images:,} training and {splits.test.num_images:,} test images of 32x32"
    asked = f"{minutes:g} minutes of training each (`--minutes {minutes:g} --seed {seed}`)"
    lines = [
        f"{images}, {asked}, {machine()}, torch {torch.__version__}.",
        "",
        "| network | parameters | epochs in the minutes | learning rate | test top-1 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.name} | {c.num_parameters:,} | {c.epochs:.1f} | {c.recipe.learning_rate:g} | {c.top1[-1]:.1f} % |"
        for c in contestants
    ]
    return "\n".join([*lines, "", "![test accuracy against minutes](images/attention_vs_convolution.png)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--pretrained", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs=3, default=(3e-4, 1e-3, 1e-4), metavar="RATE")
    parser.add_argument("--try-rates", action="store_true", help="print validation accuracies and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_threads())
    fraction = COMMON.validation_fraction if arguments.try_rates else 0.0
    splits = read_splits(arguments.data, validation_fraction=fraction, seed=arguments.seed)
    if arguments.try_rates:
        splits = replace(splits, test=splits.validation)
    num_classes = len(splits.train.class_names)
    torch.manual_seed(arguments.seed)
    entries = [
        ("small ViT, from scratch", small_vit(num_classes), SMALL, arguments.rates[0]),
        ("ResNet-18, from scratch", resnet18_for_32_pixels(num_classes), SMALL, arguments.rates[1]),
    ]
    if arguments.pretrained:
        entries.append(
            (
                "ViT pretrained on ImageNet, fine-tuned",
                *pretrained(arguments.pretrained, num_classes),
                arguments.rates[2],
            )
        )
    contestants = [
        Contestant(name, model, preprocessing, replace(COMMON, learning_rate=rate, seed=arguments.seed))
        for name, model, preprocessing, rate in entries
    ]
    for contestant in contestants:
        compete(contestant, splits, minutes=arguments.minutes, judge_every=arguments.minutes / 8)
    if not arguments.try_rates:
        draw(contestants, splits.train.num_images)
        write_section("attention", report(contestants, splits, arguments.minutes, arguments.seed))


if __name__ == "__main__":
    main()
