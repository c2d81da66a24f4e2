"""The accuracy bound is exact, and the simple figures are what their names say."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import stats

from vit_edge.metrics import (
    best_certifiable_points,
    compare,
    drop_upper_bound_points,
    images_needed,
    softmax,
    sqnr_db,
)


@pytest.mark.parametrize(("images", "points"), [(550, 0.5432), (360, 0.8287), (1, 95.0), (10, 25.8866)])
def test_without_a_changed_answer_the_bound_is_that_of_zero_events(images: int, points: float) -> None:
    assert drop_upper_bound_points(images, worse=0, better=0) == pytest.approx(points, abs=5e-3)
    assert best_certifiable_points(images) == pytest.approx(points, abs=5e-3)


@pytest.mark.parametrize("worse", [1, 3, 9])
def test_with_losses_only_the_bound_is_at_least_clopper_pearson(worse: int) -> None:
    clopper_pearson = stats.binomtest(worse, 400).proportion_ci(0.90, method="exact").high * 100
    assert drop_upper_bound_points(400, worse=worse, better=0) >= clopper_pearson - 1e-4


@functools.cache
def _bound(images: int, worse: int, better: int) -> float:
    return drop_upper_bound_points(images, worse=worse, better=better)


@pytest.mark.parametrize("images", [8, 14])
@pytest.mark.parametrize(("loss", "gain"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.3, 0.05), (0.45, 0.4), (0.02, 0.3)])
def test_the_bound_covers_the_true_drop_at_least_95_percent_of_the_time(images: int, loss: float, gain: float) -> None:
    covered = 0.0
    for worse in range(images + 1):
        for better in range(images + 1 - worse):
            chance = stats.multinomial.pmf(
                [worse, better, images - worse - better], images, [loss, gain, 1 - loss - gain]
            )
            if chance > 1e-6 and _bound(images, worse, better) >= 100 * (loss - gain) - 1e-6:
                covered += chance
    assert covered >= 0.95


def test_the_bound_grows_with_losses_and_shrinks_with_gains() -> None:
    bounds = [drop_upper_bound_points(300, worse=w, better=3) for w in range(6)]
    assert bounds == sorted(bounds)
    bounds = [drop_upper_bound_points(300, worse=3, better=b) for b in range(6)]
    assert bounds == sorted(bounds, reverse=True)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="not possible"):
        drop_upper_bound_points(10, worse=8, better=3)


def test_the_number_of_images_needed_is_enough_and_not_far_too_many() -> None:
    needed = images_needed(40, worse=0, better=0, max_drop_points=0.5)
    assert needed is not None
    assert drop_upper_bound_points(needed, worse=0, better=0) <= 0.5
    assert 590 <= needed <= 650
    assert images_needed(100, worse=5, better=0, max_drop_points=1.0) is None


def test_compare_counts_what_changed() -> None:
    eye = np.eye(4, dtype=np.float32)
    reference, candidate, labels = eye[[0, 1, 2, 3, 0]], eye[[0, 1, 3, 3, 1]], np.array([0, 1, 2, 0, 1])
    found = compare(reference, candidate, labels)
    assert (found.images, found.worse, found.better, found.num_changed) == (5, 1, 1, 2)
    assert found.reference_top1 == found.candidate_top1 == 60.0
    assert found.drop_points == 0.0
    assert found.agreement == 60.0
    assert found.agreement_interval[0] < 60 < found.agreement_interval[1]
    assert found.mcnemar_p == 1.0


def test_sqnr_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    signal = np.ones((3, 5), dtype=np.float32)
    assert sqnr_db(signal, signal * np.float32(1.1)) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(signal, signal) == float("inf")


def test_softmax_is_stable_and_adds_up_to_one() -> None:
    probabilities = softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(probabilities, [[0.5, 0.5], [0.0, 1.0]])
