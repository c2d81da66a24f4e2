"""One training run: its images, its loop, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vit_edge
from vit_edge.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vit_edge.data import LabelledImages, Rejections, read_splits, refuse_overlap, set_hash
from vit_edge.errors import UsageError
from vit_edge.files import sha256_hex, write_atomic
from vit_edge.progress import Progress
from vit_edge.training.batches import SplitImages, TrainingBatches, load_split
from vit_edge.training.loop import Evaluation, Loop
from vit_edge.training.plots import draw_confusion, draw_curves
from vit_edge.training.processes import Processes
from vit_edge.training.recipe import Recipe
from vit_edge.training.run_folder import RunFolder
from vit_edge.training.snapshot import load_state, save_state
from vit_edge.training.starting import Start, make_teacher
from vit_edge.vit import VisionTransformer

__all__ = ["Run", "TrainOptions", "TrainProgress", "TrainResult"]

# A state is written at the end of an epoch when the last one is older than this, and whenever a run stops.
_SAVE_EVERY_S = 30.0
# matplotlib's import and two images, measured on one core of a Zen 5.
_DRAWING_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Where and from what a run starts; what it does is the recipe's.

    Either `arch`, a name of `vit_edge.vit.VARIANTS`, or `source`, a checkpoint to go on from. `teacher` is a checkpoint
    to distil from. `workers` processes make batches ahead.
    """

    arch: str | None = None
    source: str | os.PathLike[str] | None = None
    image_size: tuple[int, int] | None = None
    teacher: str | os.PathLike[str] | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    resume: bool = False
    allow_drift: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """Where a run stands after one more batch; `top1` is of the last validation, in percent."""

    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    loss: float
    top1: float | None
    learning_rate: float
    images_per_s: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class TrainResult:
    """What a finished run gives; `top1`, in percent, is of the split named, by the best checkpoint."""

    checkpoint: Path
    last_checkpoint: Path
    split: str | None
    top1: float | None
    num_images: int
    validation_top1: float | None
    best_epoch: int
    num_training_images: int
    num_parameters: int
    head_replaced: bool
    device: str
    seconds: float
    images_per_s: float

    def __repr__(self) -> str:
        right = f"{self.top1:.2f} % of {self.num_images} {self.split} images" if self.split else "not evaluated"
        return f"<TrainResult {self.checkpoint}, epoch {self.best_epoch}: {right}, {self.seconds:.0f} s>"


class Run:
    """One run: its images, its loop, and what it writes."""

    def __init__(
        self,
        data: str | os.PathLike[str],
        folder: RunFolder,
        *,
        recipe: Recipe,
        options: TrainOptions,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.folder, self.recipe, self.options, self.processes = folder, recipe, options, processes
        self.start = Start.of(options.arch, options.source, image_size=options.image_size)
        fraction, seed = recipe.validation_fraction, recipe.seed
        self.splits = read_splits(data, validation_fraction=fraction, seed=seed)
        names = self.start.class_names(self.splits.train.class_names)
        if names != self.splits.train.class_names:
            self.splits = read_splits(data, validation_fraction=fraction, seed=seed, class_names=names)
        self.model, self.head_replaced = self.start.model(names, recipe)
        self.teacher = make_teacher(options.teacher, names, recipe, device)
        self.class_names, self.device = names, device
        # What a stopped run has to remember besides the loop's own state.
        self.memory: dict[str, Any] = {"top1": None, "best_top1": None, "best_loss": None, "best_epoch": 0}
        self.seconds, self.images_done = 0.0, 0
        self.evaluation_s, self.num_evaluated = 0.0, 0

    def prepare(self, progress: Progress) -> None:
        """Decode the images, put the loop together, and go to where a stopped run was."""
        self._load_images(progress)
        batches = TrainingBatches(
            self.training,
            self.recipe,
            num_classes=len(self.class_names),
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        self.loop = Loop(
            self.model, batches, device=self.device, processes=self.processes, teacher=self.teacher
        )  # fmt: skip
        if self.options.resume:
            state, allow_drift = self.folder.state, self.options.allow_drift
            self.memory = load_state(state, self.loop, identity=self._identity(), allow_drift=allow_drift)
        self.processes.wait()
        if not self.processes.is_writer:
            return
        if self.options.resume:
            self.folder.forget_after(self.loop.step)
        else:
            self.folder.clear()
        write_atomic(self.folder.config, self._config().encode())
        described = json.dumps(self.start.preprocessing.to_dict(), indent=1) + "\n"
        write_atomic(self.folder.preprocessing, described.encode())

    def fit(
        self, stop: Callable[[], bool], on_progress: Callable[[TrainProgress], None] | None, progress: Progress
    ) -> bool:
        """Run every step; returns False where a signal stopped it after a finished step."""
        first, begun, saved = self.loop.step, time.monotonic(), time.monotonic()
        workers = self.options.workers if self.options.workers is not None else _default_workers(self.processes)
        with self._tensorboard() as board:
            for images, targets in self.loop.batches.from_step(first, workers=workers):
                loss = self._step(images, targets, board)
                self.seconds = time.monotonic() - begun
                progress("training", self.loop.step, self.loop.num_steps)
                if on_progress and self.processes.is_writer:
                    on_progress(self._progress(loss, first))
                at_end = self.loop.step == self.loop.num_steps
                stopped = self._agreed(stop()) and not at_end
                if self.loop.step % self.loop.batches.steps_per_epoch == 0:
                    self._end_epoch(board)
                    stale = self._agreed(time.monotonic() - saved > _SAVE_EVERY_S)
                    if stale or at_end:
                        self._save()
                        saved = time.monotonic()
                if stopped:
                    self._save()
                    return False
        return True

    def finish(self, progress: Progress) -> TrainResult:
        """Evaluate the best checkpoint once, on the test split where there is one, and write what remains."""
        best = load_checkpoint(self.folder.best)
        split, split_images = ("test", self.test) if self.test else ("validation", self.validation)
        progress(f"evaluating on the {split} images", 0, 1)
        evaluated = self.loop.evaluate(split_images, model=best.model.to(self.device)) if split_images else None
        self.processes.wait()
        progress("drawing the curves", 0, 1)
        if evaluated and split_images and self.processes.is_writer:
            evaluation = self._evaluation(split, split_images, evaluated)
            save_checkpoint(self.folder.best, replace(best, evaluation=evaluation))
            title = f"{split}: {evaluated.top1:.1f} % of {evaluated.num_images}"
            draw_confusion(self.folder.confusion, evaluated.confusion, self.class_names, title=title)
        if self.processes.is_writer:
            draw_curves(self.folder.curves, self.folder.events("step"), self.folder.events("epoch"))
        progress("drawing the curves", 1, 1)
        return TrainResult(
            checkpoint=self.folder.best,
            last_checkpoint=self.folder.last,
            split=split if evaluated else None,
            top1=evaluated.top1 if evaluated else None,
            num_images=evaluated.num_images if evaluated else 0,
            validation_top1=self.memory["best_top1"],
            best_epoch=self.memory["best_epoch"],
            num_training_images=self.training.images.num_images,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            head_replaced=self.head_replaced,
            device=str(self.device),
            seconds=self.seconds,
            images_per_s=self.images_done / max(self.seconds, 1e-9),
        )

    def _load_images(self, progress: Progress) -> None:
        splits = (self.splits.train, self.splits.validation, self.splits.test)
        rejections = Rejections(sum(images.num_images for images in splits if images))

        def load(name: str, images: LabelledImages | None, *, cropped: bool = True) -> SplitImages | None:
            if images is None:
                return None
            return load_split(
                images,
                self.start.preprocessing,
                cropped=cropped,
                stage=f"reading {name} images",
                progress=progress,
                rejections=rejections,
            )

        training = load("training", self.splits.train, cropped=self.recipe.crop_area is None)
        assert training is not None
        self.validation = load("validation", self.splits.validation)
        self.test = load("test", self.splits.test)
        rejections.conclude()
        if self.validation:
            # An image that is there twice must not be learned from and chosen by.
            apart = training.without(self.validation.hashes)
            if len(apart.hashes) < len(training.hashes):
                shared = len(training.hashes) - len(apart.hashes)
                _log.warning("%d training images are also validation images; they are not trained on", shared)
            training = apart
        if self.test:
            learned = [*training.hashes, *(self.validation.hashes if self.validation else ())]
            refuse_overlap(learned, self.test.by_hash(), used_for="training")
        self.training = training

    def _step(self, images: torch.Tensor, targets: torch.Tensor, board: Any) -> float:
        rate, size = self.loop.rate, self.loop.batches.size(self.loop.step)
        loss = self.loop.train_step(images, targets)
        if not math.isfinite(loss):
            reason = f"the loss of step {self.loop.step} is {loss}"
            remedy = "lower learning_rate, or take --set precision=float32; the last checkpoint is untouched"
            raise UsageError("training diverged", reason=reason, remedy=remedy)
        self.images_done += size
        values = {"loss": loss, "learning_rate": rate}
        self.folder.note("step", {"step": self.loop.step, **values})
        for name, value in values.items():
            board.add_scalar(f"training/{name}", value, self.loop.step)
        return loss

    def _validate(self) -> Evaluation | None:
        if not self.validation:
            return None
        begun = time.monotonic()
        evaluated = self.loop.evaluate(self.validation)
        self.evaluation_s += time.monotonic() - begun
        self.num_evaluated += evaluated.num_images
        return evaluated

    def _end_epoch(self, board: Any) -> None:
        evaluated = self._validate()
        epoch = self.loop.step // self.loop.batches.steps_per_epoch
        top1, loss = (evaluated.top1, evaluated.loss) if evaluated else (None, None)
        values = {"step": self.loop.step, "epoch": epoch, "top1": top1, "validation_loss": loss}
        self.folder.note("epoch", values)
        if evaluated:
            board.add_scalar("validation/top1", top1, self.loop.step)
            board.add_scalar("validation/loss", loss, self.loop.step)
        _log.info("epoch %d of %d: %s", epoch, self.recipe.epochs, values)
        self.memory["top1"] = top1
        best = self.memory["best_top1"]
        if evaluated and best is not None and (best, -self.memory["best_loss"]) >= (evaluated.top1, -evaluated.loss):
            return
        self.memory |= {"best_top1": top1, "best_loss": loss, "best_epoch": epoch}
        if self.processes.is_writer:
            save_checkpoint(self.folder.best, self._checkpoint(evaluated))

    def _save(self) -> None:
        """Write state, last checkpoint and log; the state last, so that what it knows of is there."""
        if not self.processes.is_writer:
            return
        save_checkpoint(self.folder.last, self._checkpoint(None))
        self.folder.flush()
        self.folder.keep_previous_state()
        save_state(self.folder.state, self.loop, identity=self._identity(), memory=self.memory)

    def _checkpoint(self, evaluated: Evaluation | None) -> Checkpoint:
        model = self.loop.averaged()
        assert isinstance(model, VisionTransformer)
        source = self.start.source
        training = {
            "recipe": asdict(self.recipe),
            "data_sha256": set_hash(self.training.hashes),
            "num_images": self.training.images.num_images,
            "step": self.loop.step,
            "num_steps": self.loop.num_steps,
            "processes": self.processes.world_size,
            "torch": torch.__version__,
        }
        evaluation = (
            self._evaluation("validation", self.validation, evaluated) if self.validation and evaluated else None
        )
        return Checkpoint(
            name=self.start.name,
            model=model.eval(),
            preprocessing=self.start.preprocessing,
            labels=self.class_names,
            license=source.license if source else None,
            base_model=source.name if source else None,
            evaluation=evaluation,
            training=training,
            assumed=tuple(a for a in source.assumed if a != "labels" or not self.head_replaced) if source else (),
        )

    def _evaluation(self, split: str, split_images: SplitImages, evaluated: Evaluation) -> dict[str, Any]:
        return {
            "split": split,
            "data_sha256": set_hash(split_images.hashes),
            "num_images": evaluated.num_images,
            "top1": evaluated.top1,
            "engine": "torch",
        }

    def _identity(self) -> dict[str, Any]:
        """Return what has to be equal for a stopped run to go on as if it had not stopped."""
        return {
            "recipe": asdict(self.recipe),
            "network": self.model.config.to_dict(),
            "source_sha256": self.start.source.sha256 if self.start.source else None,
            "preprocessing": self.start.preprocessing.to_dict(),
            "classes": list(self.class_names),
            "teacher_sha256": self.teacher.sha256 if self.teacher else None,
            "training_images": _in_order(self.training),
            "validation_images": _in_order(self.validation) if self.validation else None,
            "processes": self.processes.world_size,
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def _config(self) -> str:
        """Return the recipe and what the run started from, as `--recipe` and `--resume` read them."""
        options = self.options
        size = "x".join(map(str, options.image_size)) if options.image_size else None
        given = {"arch": options.arch, "source": options.source, "image_size": size, "teacher": options.teacher}
        start = {name: os.fspath(value) for name, value in given.items() if value is not None}
        head = f"# vit-edge {vit_edge.__version__}, torch {torch.__version__}\n"
        return head + self.recipe.to_toml(start=start)

    def _progress(self, loss: float, first: int) -> TrainProgress:
        return TrainProgress(
            step=self.loop.step,
            num_steps=self.loop.num_steps,
            epoch=math.ceil(self.loop.step / self.loop.batches.steps_per_epoch),
            num_epochs=self.recipe.epochs,
            loss=loss,
            top1=self.memory["top1"],
            learning_rate=self.loop.rate,
            images_per_s=self.images_done / max(self.seconds, 1e-9),
            seconds_left=self._seconds_left(self.loop.step - first),
        )

    def _seconds_left(self, num_steps: int) -> float:
        """Return an estimate that includes the validations, the test and the drawing, after `num_steps` steps."""
        step_s = (self.seconds - self.evaluation_s) / num_steps
        # Before the first validation: a forward pass is about a third of a step.
        guessed_s = step_s / self.recipe.batch_size / 3
        image_s = self.evaluation_s / self.num_evaluated if self.num_evaluated else guessed_s
        steps_left = self.loop.num_steps - self.loop.step
        epochs_left = self.recipe.epochs - (self.loop.step - 1) // self.loop.batches.steps_per_epoch
        validated, tested = (len(split.hashes) if split else 0 for split in (self.validation, self.test))
        images_left = epochs_left * validated + (tested or validated)
        return step_s * steps_left + image_s * images_left + _DRAWING_S

    def _agreed(self, wish: bool) -> bool:
        """Return whether any process wishes it: all have to do the same."""
        wishes = torch.tensor([int(wish)], device=self.device if self.processes.world_size > 1 else "cpu")
        return bool(self.processes.sum(wishes).item())

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        if not self.processes.is_writer:
            yield _Nobody()
            return
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.folder.tensorboard), purge_step=self.loop.step + 1)
        try:
            yield board
        finally:
            board.close()


def _in_order(split_images: SplitImages) -> str:
    """Return a hash of the images with their labels, in order: another order gives other batches."""
    lines = (f"{digest} {label}" for digest, label in zip(split_images.hashes, split_images.images.labels, strict=True))
    return sha256_hex("\n".join(lines).encode())


class _Nobody:
    """Takes what a process that does not write would tell."""

    def add_scalar(self, *_: object) -> None: ...


def _default_workers(processes: Processes) -> int:
    # On two cores a worker takes from the network what it saves it; on more, half of them decode.
    return 0 if processes.threads <= 2 else processes.threads // 2
