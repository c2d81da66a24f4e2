"""`vit-edge train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vit_edge.cli.output import Result, bar, command, file_argument, threads_option
from vit_edge.errors import UsageError, require


@command("train")
@file_argument("data")
@click.option("--arch", default="vit_digits_patch8_32", show_default=True, help="Name of the architecture.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the checkpoint.")
@click.option("--epochs", type=int, help="Passes over the training pictures.")
@click.option("--batch-size", type=int, help="Pictures a step.")
@click.option("--learning-rate", type=float, help="Peak learning rate of AdamW.")
@click.option("--seed", type=int, help="Seed of weights, order and augmentation.")
@threads_option()
@click.option("--force", is_flag=True, help="Replace a checkpoint that is there.")
def train(data: Path, out: Path, force: bool, **settings: Any) -> Result:
    """Train a Vision Transformer on the pictures in DATA.

    DATA holds train/<class>/<picture> and test/<class>/<picture> (or val, valid, validation). Writes
    OUT/checkpoint.safetensors. Ctrl-C finishes the step, saves, and exits with 130.

    \b
    Example:
      vit-edge train pictures/ --out run/ --epochs 30
    """
    require("torch", extra="train", what="train")
    require("torchvision", extra="train", what="train")
    from rich.progress import BarColumn, TextColumn

    from vit_edge.train import TrainConfig, TrainProgress
    from vit_edge.train import train as run

    try:
        config = TrainConfig(**{name: value for name, value in settings.items() if value is not None})
    except ValueError as error:
        raise UsageError("cannot train", reason=str(error), remedy="see `vit-edge train -h`") from error

    with bar(BarColumn(), TextColumn("{task.description}")) as drawn:
        task = drawn.add_task("reading the pictures", total=None)

        def report(at: TrainProgress) -> None:
            top1 = "-" if at.top1 is None else f"{at.top1:.1f} %"
            text = f"epoch {at.epoch}/{config.epochs}  loss {at.loss:.3f}  top-1 {top1}  "
            text += f"{at.images_per_s:.0f} images/s  {at.seconds_left:.0f} s left"
            drawn.update(task, description=text, completed=at.step, total=at.num_steps)

        result = run(data, out=out, config=config, force=force, on_progress=report)
    trained = f"{result.num_training_images} training pictures, {result.num_parameters:,} parameters, "
    trained += f"{result.seconds:.0f} s, {result.images_per_s:.0f} images/s"
    right = f"{result.top1:.2f} % of {result.num_images} test pictures are right ({trained})"
    data_shown = [right, f"checkpoint: {result.checkpoint}"]
    return Result(data={**asdict(result), "config": asdict(config)}, shown=data_shown)
