"""Train a Vision Transformer on an image folder and leave a checkpoint that exports."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2

from vit_edge.checkpoint import Checkpoint, save_checkpoint
from vit_edge.cpu import MOST_THREADS, usable_threads
from vit_edge.data import (
    EVALUATION_SPLITS,
    LabelledImages,
    read_labelled,
    refuse_overlap,
    set_hash,
    stream_pixels,
)
from vit_edge.errors import Interrupted, ResourceExhausted, UsageError
from vit_edge.files import may_write
from vit_edge.image import Preprocessing, pixel_hash
from vit_edge.vit import VisionTransformer, variant

__all__ = ["CHECKPOINT_NAME", "TrainConfig", "TrainProgress", "TrainResult", "train"]

CHECKPOINT_NAME = "checkpoint.safetensors"
_MAX_DECODED_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What one run does; raises ValueError on values that make no sense.

    The defaults are for a small network on a small set: AdamW with warm-up and cosine decay, and pictures turned and
    moved a little (never mirrored: a digit has a handedness). On the digits: 98 % of 360 test images in about a minute
    on two cores.
    """

    arch: str = "vit_digits_patch8_32"
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1
    label_smoothing: float = 0.1
    max_gradient_norm: float = 1.0
    rotate_degrees: float = 5.0
    shift_fraction: float = 0.04
    scale_fraction: float = 0.05
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must lie between 0 and 1")
        for name in ("warmup_fraction", "label_smoothing", "shift_fraction", "scale_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads is {self.threads}; it must lie between 1 and {MOST_THREADS}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2^63)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """Where a run stands after one more batch; `top1` is of the last evaluation, in percent."""

    step: int
    num_steps: int
    epoch: int
    loss: float
    top1: float | None
    images_per_s: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run gives."""

    checkpoint: Path
    top1: float
    num_images: int
    num_training_images: int
    num_parameters: int
    seconds: float
    images_per_s: float


def train(
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    config: TrainConfig | None = None,
    force: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train on the `train` split of `data`, judge on its test split, and write `out`/checkpoint.safetensors.

    The checkpoint is that of the last step: the test images choose nothing. Raises DataRejected, UsageError, and
    Interrupted after SIGINT or SIGTERM, when the step was finished and the checkpoint written.
    """
    run = _Run(data, config or TrainConfig())
    with _locked(Path(out), force=force) as target:
        run.prepare()
        started = time.monotonic()
        finished = run.fit(on_progress)
        seconds = time.monotonic() - started
        top1 = run.evaluate()
        save_checkpoint(target, run.checkpoint(top1=top1))
    if not finished:
        reason = f"stopped by a signal after {run.step} of {run.num_steps} steps"
        raise Interrupted("training stopped", file=target, reason=reason, remedy="the weights so far are saved")
    return TrainResult(
        checkpoint=target,
        top1=top1,
        num_images=run.test.num_images,
        num_training_images=run.training.num_images,
        num_parameters=sum(p.numel() for p in run.model.parameters()),
        seconds=seconds,
        images_per_s=run.images_done / seconds,
    )


@dataclass(slots=True)
class _Split:
    """One split in memory: uint8 [images, 3, height, width], labels, and the hash of the set."""

    images: Tensor
    labels: Tensor
    hashes: dict[str, Path] = field(default_factory=dict)


class _Run:
    def __init__(self, data: str | os.PathLike[str], config: TrainConfig) -> None:
        self.config, self.step, self.images_done = config, 0, 0
        self.training = read_labelled(data, splits=("train",), divided=True)
        class_names = self.training.class_names
        self.test = read_labelled(data, splits=EVALUATION_SPLITS, class_names=class_names, divided=True)
        try:
            self.vit_config = variant(config.arch, num_classes=len(self.training.class_names))
        except ValueError as error:
            raise UsageError("cannot train", reason=str(error), remedy="see `vit-edge train -h`") from error
        self.preprocessing = Preprocessing(
            resize=min(self.vit_config.image_size),
            crop=self.vit_config.image_size,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    def prepare(self) -> None:
        """Decode the pictures and make the network."""
        self.train_split, self.test_split = (_load(images, self.preprocessing) for images in (self.training, self.test))
        refuse_overlap(list(self.train_split.hashes), self.test_split.hashes)
        torch.set_num_threads(self.config.threads or usable_threads())
        torch.manual_seed(self.config.seed)
        self.model = VisionTransformer(self.vit_config)
        self.num_steps = self.config.epochs * math.ceil(len(self.train_split.labels) / self.config.batch_size)

    def fit(self, on_progress: Callable[[TrainProgress], None] | None) -> bool:
        """Run every step; returns False where a signal stopped it after a finished step."""
        optimiser = _optimiser(self.model, self.config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        started, top1 = time.monotonic(), None
        with _stop_requested() as stop:
            for epoch in range(self.config.epochs):
                self.model.train()
                for batch in torch.split(torch.randperm(len(self.train_split.labels)), self.config.batch_size):
                    loss = self._train_step(batch, optimiser)
                    schedule.step()
                    self.step += 1
                    self.images_done += len(batch)
                    if on_progress:
                        on_progress(self._progress(epoch, loss, top1, time.monotonic() - started))
                    if stop():
                        return self.step == self.num_steps
                top1 = self.evaluate()
        return True

    @torch.inference_mode()
    def evaluate(self) -> float:
        """Return the top-1 on the test split, in percent."""
        self.model.eval()
        answers = [
            self.model(self._normalise(batch)).argmax(dim=1) for batch in torch.split(self.test_split.images, 64)
        ]
        return float((torch.cat(answers) == self.test_split.labels).double().mean() * 100)

    def checkpoint(self, *, top1: float) -> Checkpoint:
        evaluation = {
            "data_sha256": set_hash(list(self.test_split.hashes)),
            "num_images": self.test.num_images,
            "top1": top1,
            "engine": "torch",
        }
        training = {
            "config": asdict(self.config),
            "data_sha256": set_hash(list(self.train_split.hashes)),
            "num_images": self.training.num_images,
            "step": self.step,
            "num_steps": self.num_steps,
            "torch": torch.__version__,
        }
        return Checkpoint(
            name=self.config.arch,
            model=self.model.eval(),
            preprocessing=self.preprocessing,
            labels=self.training.class_names,
            evaluation=evaluation,
            training=training,
        )

    def _train_step(self, batch: Tensor, optimiser: torch.optim.Optimizer) -> float:
        images = torch.stack([self._augment(self.train_split.images[i]) for i in batch])
        logits = self.model(self._normalise(images))
        loss = functional.cross_entropy(
            logits, self.train_split.labels[batch], label_smoothing=self.config.label_smoothing
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        optimiser.step()
        return float(loss.detach())

    def _augment(self, image: Tensor) -> Tensor:
        c = self.config
        transform = v2.RandomAffine(
            degrees=c.rotate_degrees,
            translate=(c.shift_fraction, c.shift_fraction),
            scale=(1 - c.scale_fraction, 1 + c.scale_fraction),
            interpolation=InterpolationMode.BILINEAR,
        )
        out: Tensor = transform(image)
        return out

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.preprocessing.mean, self.preprocessing.std))
        return (images.float() / 255 - mean) / std

    def _rate(self, step: int) -> float:
        warmup = max(1, int(self.config.warmup_fraction * self.num_steps))
        done = min(1.0, step / self.num_steps)
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))

    def _progress(self, epoch: int, loss: float, top1: float | None, seconds: float) -> TrainProgress:
        return TrainProgress(
            step=self.step,
            num_steps=self.num_steps,
            epoch=epoch + 1,
            loss=loss,
            top1=top1,
            images_per_s=self.images_done / seconds,
            seconds_left=seconds / self.step * (self.num_steps - self.step),
        )


def _load(images: LabelledImages, preprocessing: Preprocessing) -> _Split:
    needed = images.num_images * 3 * math.prod(preprocessing.crop)
    if needed > _MAX_DECODED_BYTES:
        reason = (
            f"{images.num_images:,} pictures need {needed:,} bytes decoded; at most {_MAX_DECODED_BYTES:,} are used"
        )
        raise ResourceExhausted("cannot train", reason=reason, remedy="train on fewer pictures")
    loaded = list(stream_pixels(images.paths, preprocessing))
    return _Split(
        images=torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) for _, pixels in loaded]),
        labels=torch.tensor([images.labels[position] for position, _ in loaded]),
        hashes={pixel_hash(pixels): images.paths[position] for position, pixels in loaded},
    )


def _optimiser(model: VisionTransformer, config: TrainConfig) -> torch.optim.Optimizer:
    # Norms, biases and positions are not decayed: pulling them to zero is no simpler a function.
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in ("pos_embed", "cls_token")]
    kept = [p for name, p in model.named_parameters() if p.ndim <= 1 or name in ("pos_embed", "cls_token")]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


@contextlib.contextmanager
def _locked(folder: Path, *, force: bool) -> Iterator[Path]:
    """Yield the checkpoint's path in `folder`, which no second run can use meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError("cannot train into", file=folder, reason=reason, remedy="choose another --out") from error
    target = may_write(folder / CHECKPOINT_NAME, force=force)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield target
    except Timeout as error:
        reason = "another training run is using the folder"
        raise UsageError("cannot train into", file=folder, reason=reason, remedy="choose another --out") from error


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question to ask between steps; the second stops at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere nothing is caught
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
