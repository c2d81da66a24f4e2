"""`vit-edge train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vit_edge.cli.output import Result, command, parse_size, progress_bar, read_value, threads_option
from vit_edge.cli.progress_display import show_detail
from vit_edge.errors import UsageError, require
from vit_edge.progress import duration
from vit_edge.training.recipe import CONFIG_NAME, RECIPES, Recipe, load_recipe, load_start


@command("train")
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for checkpoints, state, log and images.")
@click.option("--arch", help="Train this architecture from scratch  [default: vit_digits_patch8_32].")
@click.option("--from", "source", type=click.Path(path_type=Path), help="Go on from this checkpoint instead.")
@click.option("--recipe", help=f"{', '.join(RECIPES)}, or a TOML file  [default: finetune with --from, scratch-small].")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a field of the recipe; repeats.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--batch-size", type=int, help="Images an optimiser step, over all devices.")
@click.option("--learning-rate", type=float, help="Peak learning rate of AdamW.")
@click.option("--seed", type=int, help="Seed of weights, order and augmentation.")
@click.option("--image-size", metavar="N|HxW", help="Train at another resolution; positions are resampled.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Checkpoint to distil from.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, mps, or auto.")
@threads_option()
@click.option("--workers", type=click.IntRange(0, 256), help="Processes that make batches  [default: half the CPUs].")
@click.option("--resume", is_flag=True, help="Go on with the stopped run in --out.")
@click.option("--allow-drift", is_flag=True, help="Resume although the recipe, images or versions are others.")
@click.option("--force", is_flag=True, help="Replace a run that is there.")
@click.option("--show-recipe", is_flag=True, help="Print the recipe as TOML and stop.")
def train(
    data: Path | None,
    out: Path | None,
    recipe: str | None,
    changes: tuple[str, ...],
    image_size: str | None,
    show_recipe: bool,
    epochs: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    seed: int | None,
    **options: Any,
) -> Result:
    """Train a Vision Transformer on the images in DATA, from scratch or from a checkpoint.

    DATA holds <class>/<image>, or train/<class>/<image> with test and validation, or labels.csv
    (file,label), or metadata.csv (file_name,label). Where no validation split is given, a tenth of the training
    images is held out; it chooses the best epoch. Test images are evaluated once, at the end.

    Writes best and last checkpoint, the state to resume from, config.toml, metrics.jsonl, TensorBoard events and
    images to OUT. Ctrl-C finishes the step, saves, and exits with 130. `torchrun -m vit_edge train ...` trains in
    several processes.

    \b
    Examples:
      vit-edge train images/ --out run/
      vit-edge train images/ --from deit.safetensors --recipe finetune \\
        --epochs 20 --out run/
      vit-edge train --show-recipe --recipe deit > mine.toml
    """
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    if out is not None and options["resume"]:
        recipe, options, image_size = _as_it_was(out / CONFIG_NAME, recipe, options, image_size)
    chosen = _recipe(recipe or ("finetune" if options["source"] else "scratch-small"), changes, given)
    if show_recipe:
        return Result(data={"recipe": asdict(chosen)}, shown=[chosen.to_toml().rstrip()])
    if data is None or out is None:
        missing = "DATA" if data is None else "--out"
        raise UsageError("cannot train", reason=f"{missing} is not given", remedy="vit-edge train DATA --out RUN")
    size = parse_size(image_size) if image_size else None
    return _train(data, out, chosen, {**options, "image_size": size})


def _as_it_was(
    config: Path, recipe: str | None, options: dict[str, Any], image_size: str | None
) -> tuple[str | None, dict[str, Any], str | None]:
    """Fill what is not given from the stopped run's own configuration."""
    if not config.exists():
        return recipe, options, image_size
    start = load_start(config)
    if options["arch"] is None and options["source"] is None:
        options = {**options, "arch": start.get("arch"), "source": start.get("source")}
        image_size = image_size or start.get("image_size")
    teacher = options["teacher"] or start.get("teacher")
    return recipe or str(config), {**options, "teacher": teacher}, image_size


def _train(data: Path, out: Path, recipe: Recipe, options: dict[str, Any]) -> Result:
    for module in ("torch", "torchvision", "safetensors", "filelock", "matplotlib", "tensorboard", "tomli_w"):
        require(module, extra="train", what="train")
    from vit_edge.train import TrainOptions, TrainProgress
    from vit_edge.train import train as run
    from vit_edge.training.processes import Processes

    def describe(at: TrainProgress) -> None:
        if at.step == at.num_steps:  # the stage is over
            return
        top1 = "" if at.top1 is None else f", top-1 {at.top1:.1f} %"
        left = f", {duration(at.seconds_left)} left"
        show_detail(f"epoch {at.epoch}/{at.num_epochs}, loss {at.loss:.3f}{top1}{left}")

    with progress_bar() as progress:
        chosen = TrainOptions(**options)
        result = run(data, out=out, recipe=recipe, options=chosen, on_progress=describe, progress=progress)
    if not Processes.from_environment().is_writer:  # one process of many speaks
        click.get_current_context().exit(0)
    return Result(data={**asdict(result), "recipe": asdict(recipe)}, shown=_shown(result))


def _shown(result: Any) -> list[str]:
    trained = f"{result.num_training_images} training images, {result.num_parameters:,} parameters, "
    trained += f"{result.seconds:.0f} s, {result.images_per_s:.0f} images/s on {result.device}"
    lines = [f"checkpoint: {result.checkpoint} (epoch {result.best_epoch}); the last one: {result.last_checkpoint}"]
    if result.head_replaced:
        lines.insert(0, "the head was replaced: the images have other classes than the checkpoint")
    summary = f"{result.top1:.2f} % of {result.num_images} {result.split} images are right" if result.split else ""
    return [f"{summary or 'no evaluation images were left'} ({trained})", *lines]


def _recipe(name: str, changes: tuple[str, ...], given: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UsageError("cannot train", reason=f"--set {change} has no =", remedy="write --set NAME=VALUE")
        values[key.strip().replace("-", "_")] = read_value(text)
    values |= {key: value for key, value in given.items() if value is not None}
    try:
        return load_recipe(name).changed(values)
    except ValueError as error:
        remedy = "see `vit-edge train --show-recipe`"
        raise UsageError("cannot train", reason=str(error), remedy=remedy) from error
