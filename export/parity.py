"""Proof that the exported file is the network: PyTorch's logits against the engines', at batches never traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vit_edge.artifact import ModelFile
from vit_edge.errors import VerificationFailed
from vit_edge.image import Pixels, Preprocessing
from vit_edge.metrics import sqnr_db
from vit_edge.runtime.engine import EngineOptions, Logits, make_engine
from vit_edge.runtime.golden import Tolerance, differences

__all__ = ["BATCHES", "FLOAT32_TOLERANCE", "Parity", "check_parity", "reference_logits"]

BATCHES = (1, 2, 3, 7, 16)
# Engines order their sums differently; a logit of 10 may differ by 0.01 and no more. The answer must be the same
# wherever the two largest logits are farther apart than rounding can bridge.
FLOAT32_TOLERANCE = Tolerance(absolute=1e-4, relative=1e-3, top1_gap=2e-4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How near one engine comes to PyTorch at one batch size."""

    engine: str
    batch_size: int
    max_difference: float
    sqnr_db: float
    top1_equal: int


def reference_logits(model: nn.Module, preprocessing: Preprocessing) -> Callable[[Pixels], Logits]:
    """Return PyTorch's float32 logits as a function of uint8 [batch, height, width, 3]."""

    def run(images_NHWC: Pixels) -> Logits:
        with torch.inference_mode():
            logits_BK: Logits = model(torch.from_numpy(preprocessing.normalise(images_NHWC))).numpy()
        return logits_BK

    return run


def check_parity(
    model: ModelFile, reference: Callable[[Pixels], Logits], *, images_NHWC: Pixels, engines: Sequence[str]
) -> list[Parity]:
    """Return the figures of every engine and batch; raises VerificationFailed where one is beyond the tolerance."""
    results = []
    for name in engines:
        with closing(make_engine(name, model.data, EngineOptions())) as engine:
            for size in BATCHES:
                batch = np.resize(images_NHWC, (size, *images_NHWC.shape[1:]))  # repeats the images as often as needed
                results.append(_compare(name, reference(batch), _run(engine.run, batch, name)))
    return results


def _run(run: Callable[[Pixels], Logits], batch: Pixels, engine: str) -> Logits:
    try:
        return run(batch)
    except Exception as error:  # each engine has its own exceptions, some without a base
        reason = f"{engine} fails at batch {len(batch)}: {' '.join(str(error).split())[:300]}"
        remedy = "the batch must stay free: no shape of the forward pass may depend on it"
        raise VerificationFailed("the exported graph does not run", reason=reason, remedy=remedy) from error


def _compare(engine: str, expected: Logits, found: Logits) -> Parity:
    problems = differences(expected, found, FLOAT32_TOLERANCE)
    if problems:
        reason = f"{engine} at batch {len(expected)}: {'; '.join(problems)}"
        remedy = "nothing was written; report it with the checkpoint, or try another version of the engine"
        raise VerificationFailed("the exported graph is not the network", reason=reason, remedy=remedy)
    return Parity(
        engine=engine,
        batch_size=len(expected),
        max_difference=float(np.abs(expected - found).max()),
        sqnr_db=sqnr_db(expected, found),
        top1_equal=int(np.sum(expected.argmax(axis=1) == found.argmax(axis=1))),
    )
