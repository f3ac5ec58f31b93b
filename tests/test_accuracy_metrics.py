"""Metrics on numbers that can be checked by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy_metrics as metrics


def test_recall_and_f1() -> None:
    truth, said = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    assert metrics.unweighted_recall(truth, said) == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.weighted_f1(truth, said) == pytest.approx((3 * 0.8 + 1 * 2 / 3) / 4)


def test_auroc_counts_ties_half() -> None:
    assert metrics.auroc([1, 1], [0, 1]) == 0.75
    assert metrics.auroc([0], [1]) == 0.0


def test_balanced_accuracy_does_not_depend_on_prevalence() -> None:
    said, positive = np.array([True, True, False, True]), np.array([True, True, True, False])
    assert metrics.recalls(said, positive) == (pytest.approx(2 / 3), 0.0)
    assert metrics.balanced(said, positive) == pytest.approx(1 / 3)


def test_a_threshold_is_not_chosen_on_what_it_decides() -> None:
    scores = np.array([0.1, 0.9, 0.6, 0.2])
    positive = np.array([False, True, False, True])
    half = np.array([True, True, False, False])
    # The first half's best threshold is 0.9, the second's is 0.2 or 0.6 (both 0.5): the lowest of the best is taken.
    assert metrics.cross_fitted(scores[None], positive, half).tolist() == [False, True, False, False]


def test_spearman_and_slope() -> None:
    assert metrics.spearman([0, 1, 2], [5, 7, 100]) == pytest.approx(1)
    assert metrics.spearman([0, 1, 2, 3], [1, 1, 0, 0]) == pytest.approx(-2 / math.sqrt(5))
    assert math.isnan(metrics.spearman([0, 1], [1, 1]))
    assert metrics.slope([0, 1, 2], [1, 3, 5]) == pytest.approx(2)


def test_independent_words() -> None:
    perfect, coin = np.eye(2), np.full((2, 2), 0.5)
    kinds = [(0, 0), (1, 1), (0, 1)]
    assert metrics.chance_of_words(perfect, perfect, kinds) == 1
    assert metrics.chance_of_words(coin, perfect, kinds) == 0.5
    assert metrics.confusion(["a", "a"], ["a", "b"], ["a", "b"]).tolist() == [[0.5, 0.5], [0, 0]]


def test_sets() -> None:
    assert metrics.set_scores({"sad", "angry"}, {"sad"}) == (0.5, 1.0, 0.75)
    assert metrics.set_scores(set(), {"sad"}) == (0, 0, 0)


def test_intervals_draw_clusters() -> None:
    hits = [True] * 50 + [False] * 50
    alone, joined = metrics.share(hits, range(100)), metrics.share(hits, [i // 50 for i in range(100)])
    assert (alone.value, alone.n) == (0.5, 100) and 0.35 < alone.low < 0.45 and 0.55 < alone.high < 0.65
    assert (joined.low, joined.high) == (0, 1)
    assert math.isnan(metrics.share([], []).value)
