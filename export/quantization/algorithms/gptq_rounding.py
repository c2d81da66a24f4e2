"""Which way each weight is rounded: so that the product's outputs on calibration images stay nearest.

Rounding each weight to the nearest step minimises the error of the weights; what counts is the error of the outputs,
the quadratic form of the inputs' second moments. GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1) rounds one input
after another and lets the later ones make up for the error; sweeps of coordinate descent then go on from there (as in
QuantEase, arXiv:2309.01885), each of which can only lower it.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import linalg

from vit_edge.export.quantization.qdq.integers import QuantizedWeight

__all__ = ["output_error", "round_weights"]

Matrix: TypeAlias = npt.NDArray[np.float64]

# Share of the mean second moment that is added to each input: inputs that hardly vary must not be trusted to make up.
_DAMPING = 0.01
_BLOCK = 64
# A scale below the largest weight clips it, and gives all others finer steps.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def round_weights(weight_IO: Matrix, moments_II: Matrix, *, bits: int, sweeps: int) -> QuantizedWeight:
    """Return int8 weights and a scale for each output, chosen for inputs of these second moments, X^T X."""
    largest = 2 ** (bits - 1) - 1
    damped_II = moments_II + np.eye(len(moments_II)) * max(_DAMPING * float(np.diag(moments_II).mean()), 1e-12)
    scales_O = _scales(weight_IO, damped_II, largest)
    steps_IO = weight_IO / scales_O
    integers_IO = _gptq(steps_IO, damped_II, largest)
    for _ in range(sweeps):
        if not _descend(integers_IO, steps_IO, damped_II, largest):
            break
    return QuantizedWeight(integers=integers_IO.astype(np.int8), scales=scales_O.astype(np.float32))


def output_error(difference_IO: Matrix, moments_II: Matrix) -> Matrix:
    """Return the summed squared error of each output, [out], that a difference of the weights causes."""
    error_O: Matrix = np.einsum("io,io->o", difference_IO, moments_II @ difference_IO)
    return error_O


def _scales(weight_IO: Matrix, moments_II: Matrix, largest: int) -> Matrix:
    """Return for each output the scale, of a few, whose nearest rounding errs least; exact in float32."""
    whole_O = np.maximum(np.abs(weight_IO).max(axis=0) / largest, 1e-8)
    tried = [np.float32(whole_O * shrink).astype(np.float64) for shrink in _SHRINKS]
    errors = [
        output_error(weight_IO - np.clip(np.rint(weight_IO / s_O), -largest, largest) * s_O, moments_II)
        for s_O in tried
    ]
    best_O = np.argmin(np.stack(errors), axis=0)
    found_O: Matrix = np.stack(tried)[best_O, np.arange(len(best_O))]
    return found_O


def _gptq(steps_IO: Matrix, moments_II: Matrix, largest: int) -> Matrix:
    """Return whole numbers: inputs of the largest moment first, the rest of the error spread over those to come."""
    order_I = np.argsort(-np.diag(moments_II), kind="stable")
    remaining_IO = steps_IO[order_I].copy()
    inverse_II = linalg.cho_solve(linalg.cho_factor(moments_II[np.ix_(order_I, order_I)]), np.eye(len(order_I)))
    upper_II = linalg.cholesky(inverse_II, lower=False)
    rounded_IO = np.empty_like(remaining_IO)
    for start in range(0, len(order_I), _BLOCK):
        stop = min(start + _BLOCK, len(order_I))
        errors_BO = np.empty((stop - start, remaining_IO.shape[1]))
        for i in range(start, stop):
            rounded_IO[i] = np.clip(np.rint(remaining_IO[i]), -largest, largest)
            errors_BO[i - start] = (remaining_IO[i] - rounded_IO[i]) / upper_II[i, i]
            remaining_IO[i + 1 : stop] -= np.outer(upper_II[i, i + 1 : stop], errors_BO[i - start])
        remaining_IO[stop:] -= upper_II[start:stop, stop:].T @ errors_BO
    integers_IO = np.empty_like(rounded_IO)
    integers_IO[order_I] = rounded_IO
    return integers_IO


def _descend(integers_IO: Matrix, steps_IO: Matrix, moments_II: Matrix, largest: int) -> bool:
    """Set each input's integers to the best for all others as they are, in place; return whether any changed."""
    gradient_IO = moments_II @ (integers_IO - steps_IO)
    changed = False
    for i in range(len(moments_II)):
        best_O = np.clip(np.rint(integers_IO[i] - gradient_IO[i] / moments_II[i, i]), -largest, largest)
        step_O = best_O - integers_IO[i]
        if step_O.any():
            changed = True
            integers_IO[i] = best_O
            gradient_IO += np.outer(moments_II[:, i], step_O)
    return changed
