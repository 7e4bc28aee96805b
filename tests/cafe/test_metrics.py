"""Metrics against scikit-learn, hand-worked cases and a brute force over tie orders; bootstrap intervals."""

import doctest
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

import cafe.metrics
from cafe.metrics import METRICS, bootstrap_means, expected_metric, interval


def of_one(name, greater, equal):
    return expected_metric(name, np.array([greater]), np.array([equal])).item()


@pytest.mark.parametrize(
    ("greater", "equal", "expected"),
    [
        (0, 0, {"ndcg@1": 1, "ndcg@20": 1, "hr@1": 1, "mrr": 1}),
        (2, 0, {"ndcg@1": 0, "ndcg@5": 0.5, "hr@1": 0, "hr@5": 1, "mrr": 1 / 3}),
        (5, 0, {"ndcg@5": 0, "hr@5": 0, "hr@10": 1, "ndcg@10": 1 / np.log2(7), "mrr": 1 / 6}),
        (0, 1, {"hr@1": 0.5, "ndcg@5": (1 + 1 / np.log2(3)) / 2, "mrr": 0.75}),  # first or second
        (4, 1, {"hr@5": 0.5, "ndcg@5": 0.5 / np.log2(6), "mrr": (1 / 5 + 1 / 6) / 2}),  # fifth or sixth
        (0, 100, {"hr@10": 10 / 101, "mrr": np.mean(1 / np.arange(1, 102))}),  # a constant model: chance
    ],
)
def test_hand_worked_cases(greater, equal, expected):
    assert {name: of_one(name, greater, equal) for name in expected} == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_equals_the_mean_over_all_tie_orders(scores):
    """Column 0 is the answer; every order of the candidates that sorts the scores is equally likely."""
    orders = [o for o in permutations(range(len(scores))) if sorted(scores)[::-1] == [scores[i] for i in o]]
    ranks = np.array([order.index(0) + 1 for order in orders])
    greater, equal = sum(s > scores[0] for s in scores), sum(s == scores[0] for s in scores) - 1
    for k in (1, 2, 5):
        assert of_one(f"hr@{k}", greater, equal) == pytest.approx(np.mean(ranks <= k))
        assert of_one(f"ndcg@{k}", greater, equal) == pytest.approx(np.mean((ranks <= k) / np.log2(ranks + 1)))
    assert of_one("mrr", greater, equal) == pytest.approx(np.mean(1 / ranks))


@pytest.mark.parametrize("k", [1, 5, 10, 20])
@pytest.mark.parametrize("levels", [3, 1000])
def test_ndcg_equals_scikit_learn_ties_included(k, levels):
    scores = np.random.default_rng(k).integers(levels, size=(200, 101)).astype(float)
    relevant = np.zeros_like(scores)
    relevant[:, 0] = 1
    greater, equal = (scores > scores[:, :1]).sum(1), (scores == scores[:, :1]).sum(1) - 1
    assert expected_metric(f"ndcg@{k}", greater, equal).mean() == pytest.approx(ndcg_score(relevant, scores, k=k))


def test_mrr_equals_scikit_learn_without_ties():
    scores = np.random.default_rng(0).random((200, 101))
    relevant = np.zeros(scores.shape, int)
    relevant[:, 0] = 1
    mrr = expected_metric("mrr", (scores > scores[:, :1]).sum(1), np.zeros(200, int))
    assert mrr.mean() == pytest.approx(label_ranking_average_precision_score(relevant, scores))


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "ndcg@-1", "hr@x", "mrr@5", "recall@5", ""])
def test_unknown_metric_is_refused(name):
    with pytest.raises(ValueError, match="unknown metric"):
        of_one(name, 0, 0)


def test_counts_of_a_narrow_type_do_not_overflow():
    counts = np.array([200], np.uint8)
    assert expected_metric("mrr", counts, counts).item() == pytest.approx(np.mean(1 / np.arange(201, 402)))
    assert expected_metric("mrr", [200], [200]).item() == pytest.approx(np.mean(1 / np.arange(201, 402)))


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="negative"):
        of_one("mrr", -1, 0)
    with pytest.raises(ValueError, match="one length"):
        expected_metric("mrr", np.zeros(2, int), np.zeros(3, int))
    assert all(expected_metric(name, np.zeros(0, int), np.zeros(0, int)).shape == (0,) for name in METRICS)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    """600 samples of 100 users from a known distribution. At 95% coverage the number covered is Binomial(600, p) with p
    about .94 (the percentile interval is a little narrow at n=100); outside [.915, .97] has probability under 2%."""
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(600):
        low, high = interval(bootstrap_means(rng.exponential(size=(100, 1)), 400, seed))[:, 0]
        covered += low <= 1 <= high
    assert 0.915 <= covered / 600 <= 0.97


def test_bootstrap_is_paired_and_reproducible():
    values = np.random.default_rng(0).random((50, 1)) @ np.array([[1.0, 2.0]])
    means = bootstrap_means(values, 100, seed=3)
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0])
    np.testing.assert_array_equal(means, bootstrap_means(values, 100, seed=3))
    np.testing.assert_array_equal(bootstrap_means(values), bootstrap_means(values, 1000, seed=0))
    assert not np.array_equal(means, bootstrap_means(values, 100, seed=4))
    with pytest.raises(ValueError, match="no users"):
        bootstrap_means(np.zeros((0, 1)))


def test_bootstrap_spread_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(size=(400, 1))
    spread = bootstrap_means(values, 4000).std()  # its own relative error is about 1 / sqrt(2 * 4000) = 1.1%
    assert spread == pytest.approx(values.std() / 20, rel=0.05)


def test_examples():
    assert doctest.testmod(cafe.metrics).failed == 0
