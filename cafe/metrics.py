"""Ranking metrics of one answer among candidates, and bootstrap intervals over users.

`greater` counts the candidates scored strictly above the answer, `equal` those scored exactly like it. Under random
tie-breaking the answer's rank is uniform on greater+1 .. greater+equal+1, so a metric f(rank) is expected to be

    E f = 1/(equal+1) * sum of f(r), r = greater+1 .. greater+equal+1, = (F(greater+equal+1) - F(greater)) / (equal+1)

with F the cumulative sum of f. The metric is averaged, not the rank: f is not linear, and only this average gives a
constant model exactly the score of chance. With one answer a user, f is

    ndcg@k: 1/log2(rank+1) if rank <= k else 0        hr@k: 1 if rank <= k else 0        mrr: 1/rank
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CUTOFFS = (1, 5, 10, 20)
METRICS = (*(f"ndcg@{k}" for k in CUTOFFS), *(f"hr@{k}" for k in CUTOFFS), "mrr")

Floats = NDArray[np.float64]


def expected_metric(name: str, greater: NDArray[np.integer], equal: NDArray[np.integer]) -> Floats:
    """The expected value of one metric for every user, ties broken at random.

    Args:
        name: `ndcg@k`, `hr@k` (any k >= 1) or `mrr`.
        greater: (users,) integers, candidates scored strictly above the answer.
        equal: (users,) integers, candidates scored exactly like the answer, the answer itself not counted.

    Returns:
        (users,) float64.

    Raises:
        ValueError: an unknown metric, a negative count, or shapes that differ.

    >>> import numpy as np
    >>> expected_metric("hr@1", np.array([0, 3, 0]), np.array([0, 0, 3]))  # first, fourth, one of four in a tie
    array([1.  , 0.  , 0.25])
    """
    greater, equal = np.asarray(greater, dtype=np.int64), np.asarray(equal, dtype=np.int64)
    if greater.shape != equal.shape or greater.ndim != 1:
        raise ValueError(f"greater and equal must be two vectors of one length, got {greater.shape} and {equal.shape}")
    if greater.size == 0:
        return np.zeros(0)
    if min(greater.min(), equal.min()) < 0:
        raise ValueError("greater and equal are counts: they cannot be negative")
    last = greater + equal + 1
    cumulative = np.concatenate([[0.0], np.cumsum(_metric_of_rank(name, np.arange(1, last.max() + 1)))])
    return (cumulative[last] - cumulative[greater]) / (equal + 1)


def _metric_of_rank(name: str, rank: NDArray[np.integer]) -> Floats:
    kind, _, cutoff = name.partition("@")
    if name == "mrr":
        return 1.0 / rank
    if kind not in ("ndcg", "hr") or not cutoff.isdecimal() or int(cutoff) < 1:
        raise ValueError(f"unknown metric {name!r}: give ndcg@k, hr@k (k >= 1) or mrr")
    gain = 1.0 / np.log2(rank + 1) if kind == "ndcg" else np.ones(len(rank))
    return np.where(rank <= int(cutoff), gain, 0.0)


def bootstrap_means(values: Floats, resamples: int = 1000, seed: int = 0) -> Floats:
    """The column means of `values` under resampling of its rows (the ordinary bootstrap over users).

    All columns see the same resamples, so differences and ratios of columns are paired.

    Args:
        values: (users, columns) float64.
        resamples: how many times the users are drawn with replacement.
        seed: the same seed and number of users give the same resamples.

    Returns:
        (resamples, columns) float64.

    >>> bootstrap_means(np.ones((5, 2)), resamples=3).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    users = len(values)
    if users == 0:
        raise ValueError("cannot bootstrap over no users")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(users, size=users, dtype=np.int32) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=users).astype(np.float64) @ values for draw in draws]) / users


def interval(samples: Floats, level: float = 0.95) -> Floats:
    """The percentile interval of bootstrap `samples` along axis 0: (2, ...) float64, low then high.

    >>> interval(np.arange(101.0), level=0.9).round(6).tolist()
    [5.0, 95.0]
    """
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
