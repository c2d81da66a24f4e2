"""Train a Vision Transformer on an image folder and leave checkpoints that export; stopped runs go on exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vit_edge.errors import Interrupted, UsageError
from vit_edge.files import is_file
from vit_edge.progress import Progress, silent
from vit_edge.training.interrupt import stop_requested
from vit_edge.training.processes import Processes, choose_device, joined
from vit_edge.training.recipe import RECIPES, Recipe
from vit_edge.training.run import Run, TrainOptions, TrainProgress, TrainResult
from vit_edge.training.run_folder import RunFolder, opened

__all__ = ["TrainOptions", "TrainProgress", "TrainResult", "train"]


def train(
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    options: TrainOptions | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
    progress: Progress = silent,
) -> TrainResult:
    """Train on `data` and leave best and last checkpoint, state, log and images in the folder `out`.

        >>> train("images", out="run2", recipe=RECIPES["scratch-small"].changed({"epochs": 1}))
        <TrainResult run2/best.safetensors, epoch 1: ... % of ... test images, ... s>

    The validation images choose the best epoch; if there are test images, it is evaluated on them once at the end.
    Raises DataRejected, UsageError, EngineUnavailable, and Interrupted after SIGINT or SIGTERM, when the step was
    finished and everything saved. Under torchrun each process calls this, and one of them writes.
    """
    options = options or TrainOptions()
    recipe = recipe or RECIPES["finetune" if options.source else "scratch-small"]
    _refuse_to_replace_the_start(Path(out), options)
    processes = Processes.from_environment()
    device = choose_device(options.device, processes)
    torch.set_num_threads(options.threads or processes.threads)
    with joined(processes, device), _folder(Path(out), options, processes) as folder:
        run = Run(data, folder, recipe=recipe, options=options, processes=processes, device=device)
        run.prepare(progress)
        with stop_requested() as stop:
            finished = run.fit(stop, on_progress, progress)
        if not finished:
            reason = f"stopped by a signal after {run.loop.step} of {run.loop.num_steps} steps"
            remedy = "the weights so far are saved; run it again with --resume to go on"
            raise Interrupted("training stopped", file=folder.last, reason=reason, remedy=remedy)
        return run.finish(progress)


def _refuse_to_replace_the_start(out: Path, options: TrainOptions) -> None:
    for given in (options.source, options.teacher):
        if not options.resume and is_file(given) and Path(given).resolve().parent == out.resolve():  # type: ignore[arg-type]
            reason, remedy = "it lies in --out, where the new run replaces it", "choose another --out"
            raise UsageError("cannot train from", file=given, reason=reason, remedy=remedy)


@contextmanager
def _folder(path: Path, options: TrainOptions, processes: Processes) -> Iterator[RunFolder]:
    """Yield the run's folder to every process once the one that writes has locked it."""
    if not processes.is_writer:
        processes.wait()
        yield RunFolder(path)
        return
    with opened(path, resume=options.resume, force=options.force) as folder:
        processes.wait()
        yield folder
