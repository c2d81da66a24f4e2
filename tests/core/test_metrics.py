"""The accuracy bound is exact, and the simple figures are what their names say."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import stats

from vit_edge.metrics import (
    NO_CLASS,
    UNKNOWN,
    agreement_lower_bound,
    agreement_upper_bound,
    best_certifiable_agreement,
    best_certifiable_points,
    compare,
    compare_answers,
    drop_upper_bound_points,
    fewest_images,
    fewest_images_for_agreement,
    images_needed,
    images_needed_for_agreement,
    join_answers,
    pair_answers,
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


def _noisy(images: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(images, classes)).astype(np.float32)
    candidate = reference + rng.normal(scale=0.2, size=reference.shape).astype(np.float32)
    return reference, candidate, rng.integers(classes, size=images)


def test_top5_is_there_where_there_are_more_than_five_classes() -> None:
    reference, candidate, labels = _noisy(200, 9)
    found = compare(reference, candidate, labels)
    rank = (candidate > candidate[np.arange(200), labels][:, None]).sum(axis=1)
    assert found.candidate_top5 == pytest.approx((rank < 5).mean() * 100)
    assert found.reference_top5 != found.candidate_top5
    five = compare(reference[:, :5], candidate[:, :5], labels % 5)
    assert five.reference_top5 is five.candidate_top5 is None


def test_answers_in_batches_are_those_of_all_at_once() -> None:
    reference, candidate, labels = _noisy(200, 9)
    parts = [pair_answers(reference[i : i + 16], candidate[i : i + 16]) for i in range(0, 200, 16)]
    joined, whole = compare_answers(join_answers(parts), labels), compare(reference, candidate, labels)
    assert joined.sqnr_db == pytest.approx(whole.sqnr_db) == pytest.approx(sqnr_db(reference, candidate))
    assert joined.worse == whole.worse > 0
    margins = np.sort(reference, axis=1)[:, -1] - np.sort(reference, axis=1)[:, -2]
    np.testing.assert_allclose(join_answers(parts).reference_margin_B, margins, rtol=1e-6)


def test_labels_of_the_changed_images_are_enough_and_a_missing_one_counts_as_lost() -> None:
    reference, candidate, labels = _noisy(200, 9)
    answers = pair_answers(reference, candidate)
    full, flips = compare_answers(answers, labels), compare_answers(answers, np.where(answers.changed, labels, UNKNOWN))
    for name in ("worse", "better", "drop_points", "drop_upper_bound_points", "mcnemar_p", "agreement", "sqnr_db"):
        assert getattr(flips, name) == getattr(full, name), name
    assert full.reference_top1 is not None
    assert flips.reference_top1 is None
    none = compare_answers(answers, np.full(200, UNKNOWN))
    assert none.worse == none.unlabelled == none.num_changed == full.num_changed > 0
    assert none.drop_upper_bound_points > full.drop_upper_bound_points
    other = compare_answers(answers, np.full(200, NO_CLASS))
    assert (other.worse, other.better, other.unlabelled) == (0, 0, 0)


@pytest.mark.parametrize(("images", "changed"), [(550, 0), (550, 5), (40, 1), (3, 3)])
def test_the_agreement_bounds_are_clopper_pearsons(images: int, changed: int) -> None:
    low = stats.beta.ppf(0.05, images - changed, changed + 1) * 100 if changed < images else 0.0
    high = stats.beta.ppf(0.95, images - changed + 1, changed) * 100 if changed else 100.0
    assert agreement_lower_bound(images, changed=changed) == pytest.approx(low)
    assert agreement_upper_bound(images, changed=changed) == pytest.approx(high)


def test_the_fewest_images_are_enough_and_one_less_is_not() -> None:
    for points, expected in ((0.5, 598), (1.0, 299), (7.3, 40)):
        fewest = fewest_images(max_drop_points=points)
        assert fewest == expected
        assert best_certifiable_points(fewest) <= points < best_certifiable_points(fewest - 1)
        assert drop_upper_bound_points(fewest, worse=0, better=0) <= points
    for percent, expected in ((99, 299), (99.5, 598)):
        fewest = fewest_images_for_agreement(percent)
        assert fewest == expected
        assert best_certifiable_agreement(fewest) >= percent > best_certifiable_agreement(fewest - 1)
    assert fewest_images_for_agreement(100) is None


def test_the_images_needed_for_an_agreement_certify_it_at_the_rate_seen() -> None:
    needed = images_needed_for_agreement(200, changed=1, min_agreement=99)
    assert needed is not None
    assert agreement_lower_bound(needed, changed=round(needed / 200)) >= 99
    assert 900 < needed < 2000
    assert images_needed_for_agreement(200, changed=2, min_agreement=99) is None


def test_sqnr_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    signal = np.ones((3, 5), dtype=np.float32)
    assert sqnr_db(signal, signal * np.float32(1.1)) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(signal, signal) == float("inf")


def test_softmax_is_stable_and_adds_up_to_one() -> None:
    probabilities = softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(probabilities, [[0.5, 0.5], [0.0, 1.0]])
