"""Metrics of accuracy, reliance, conflict and sets, and intervals by bootstrap over clusters. Plain numbers in and out."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure, its 95 % interval and how many cases it is of."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    metric: Callable[[npt.NDArray[np.int64]], float], clusters: Sequence[object], *, seed: int = 0
) -> Estimate:
    """`metric` of case indices, its interval by drawing whole clusters (such as all pairs of one voice) with replacement.

    Percentile interval of 1000 draws (Efron 1979); nan where a draw has no value is left out.
    """
    index = np.arange(len(clusters))
    if not len(index):
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    members = [np.flatnonzero([c == name for c in clusters]) for name in dict.fromkeys(clusters)]
    rng = np.random.default_rng(seed)
    draws = [
        metric(np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanpercentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value=float(metric(index)), low=float(low), high=float(high), n=len(index))


def share(hits: Sequence[bool], clusters: Sequence[object]) -> Estimate:
    """How often."""
    values = np.asarray(hits, np.float64)
    return bootstrap(lambda index: float(values[index].mean()), clusters)


def unweighted_recall(truth: Sequence[str], said: Sequence[str]) -> float:
    """UAR: the mean over the true labels of their recalls."""
    right, wanted = np.array([a == b for a, b in zip(truth, said, strict=True)]), np.array(truth)
    return float(np.mean([right[wanted == label].mean() for label in np.unique(wanted)]))


def weighted_f1(truth: Sequence[str], said: Sequence[str]) -> float:
    """F1 of each true label, weighted by how often it is true (sklearn's average="weighted")."""
    wanted, found = np.array(truth), np.array(said)
    total = 0.0
    for label in np.unique(wanted):
        hit = ((wanted == label) & (found == label)).sum()
        total += 2 * hit / ((wanted == label).sum() + (found == label).sum()) * (wanted == label).sum()
    return float(total / len(wanted))


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Probability that a positive's score lies above a negative's, ties half (Mann-Whitney)."""
    above, below = np.asarray(positive, np.float64)[:, None], np.asarray(negative, np.float64)[None]
    return float(((above > below) + 0.5 * (above == below)).mean())


def best_threshold(scores: Array, positive: npt.NDArray[np.bool_]) -> float:
    """The threshold (score >= it: positive) with the best balanced accuracy."""
    candidates = np.unique(scores)
    values = [balanced(scores >= c, positive) for c in candidates]
    return float(candidates[int(np.argmax(values))])


def recalls(said: npt.NDArray[np.bool_], positive: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Recall of the positives and of the negatives."""
    return float(said[positive].mean()), float((~said[~positive]).mean())


def balanced(said: npt.NDArray[np.bool_], positive: npt.NDArray[np.bool_]) -> float:
    """Mean of both recalls: what accuracy would be at 50 % prevalence."""
    return sum(recalls(said, positive)) / 2


def cross_fitted(scores: Array, positive: npt.NDArray[np.bool_], half: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Decisions on each half: by the row of scores [K, n] that ranks best on the other, at the threshold that is best there."""
    said = np.zeros(len(positive), bool)
    for part in (half, ~half):
        row = scores[best_row(scores[:, ~part], positive[~part])]
        said[part] = row[part] >= best_threshold(row[~part], positive[~part])
    return said


def best_row(scores: Array, positive: npt.NDArray[np.bool_]) -> int:
    """The row of scores [K, n] with the highest AUROC."""
    return int(np.argmax([auroc(row[positive], row[~positive]) for row in scores]))


def chance_of_words(voice: Array, face: Array, kinds: Sequence[tuple[int, int]]) -> float:
    """Balanced accuracy of "conflict if the words differ" were both words independent, given each one's confusions.

    voice, face [K, K]: share of word k (column) where the truth is the row's; kinds: true labels of each pair.
    """
    agree = {True: [], False: []}  # type: dict[bool, list[float]]
    for heard, seen in kinds:
        agree[heard == seen].append(float(voice[heard] @ face[seen]))
    return float((np.mean(agree[True]) + 1 - np.mean(agree[False])) / 2)


def confusion(truth: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> Array:
    """[K, K]: rows true labels, columns words; rows without a case are zeros."""
    found = np.zeros((len(labels), len(labels)))
    for a, b in zip(truth, said, strict=True):
        found[labels.index(a), labels.index(b)] += 1
    return np.asarray(found / found.sum(1, keepdims=True).clip(min=1), np.float64)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; nan where a side does not change."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (x, y)]
    if any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Array) -> Array:
    less, equal = values[:, None] > values[None], values[:, None] == values[None]
    return np.asarray(less.sum(1) + (equal.sum(1) - 1) / 2, np.float64)


def slope(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(np.asarray(x, np.float64), np.asarray(y, np.float64), 1)[0])


def set_scores(said: Collection[str], true: Collection[str]) -> tuple[float, float, float]:
    """Open vocabulary: |P and G| / |P|, |P and G| / |G|, their mean (arXiv 2609.37324, equation 39). No word said: 0."""
    common = len(set(said) & set(true))
    accuracy, recall = common / max(len(set(said)), 1), common / max(len(set(true)), 1)
    return accuracy, recall, (accuracy + recall) / 2
