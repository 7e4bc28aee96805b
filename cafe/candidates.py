"""Whom to evaluate and against which candidates: fixed by (dataset, split, seed) and shared by all models compared.

The users of a split are put in one shuffled order and the negatives drawn along it, so the first `max_users` of them
are a random sample of the users, and each has the negatives she has when everybody is evaluated.

Negatives are drawn by popularity, without replacement, outside the user's WHOLE history, both held-out items included.
Popularity is how often all interactions have an item, held-out ones included (`all`, the default, as in the paper's
released code), or how often training has it (`train`). Either way an item of count 0 is never a negative, and both
favour a model that ranks rare items first, because answers are rarer than negatives. With `train` this is extreme on
sparse data: an item that training never saw can only be the answer. Where many answers are such (bucket "0" of the
breakdown), read `full` first, which has no such bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from cafe.data.dataset import Dataset, Sequences
from cafe_kernels import AliasSampler

PROTOCOLS = ("aligned", "full", "authors")
PAIRED_INTENTS = 3  # that the pairing of `authors` needs: the answer's, a negative's own and another
POPULARITIES = ("all", "train")


@dataclass(frozen=True, eq=False)
class Candidates:
    """The users of an evaluation and what each answer is ranked against.

    Attributes:
        rows: (users,) int64, rows of `dataset.holdout(split)`, ascending.
        items: (users, 1 + negatives) int32, the answer in column 0; -1 where the catalog had no more negatives.
            None for the whole catalog.
        intents: int32 like `items`, the intent each candidate is scored with; -1 where `items` is. None with `items`.
    """

    rows: NDArray[np.int64]
    items: NDArray[np.int32] | None
    intents: NDArray[np.int32] | None

    @property
    def short(self) -> int:
        """How many users have fewer negatives than asked for."""
        return 0 if self.items is None else int((self.items < 0).any(axis=1).sum())

    @property
    def digest(self) -> str:
        """A hash: two evaluations may be compared only where it is the same."""
        hasher = blake2b(digest_size=16)
        for array in (self.rows, self.items, self.intents):
            hasher.update(b"-" if array is None else array.tobytes())
        return hasher.hexdigest()


def draw_candidates(
    dataset: Dataset,
    split: str = "test",
    protocol: str = "aligned",
    num_negatives: int = 100,
    seed: int = 0,
    max_users: int | None = None,
    popularity: str = "all",
) -> Candidates:
    """The candidates of a protocol (see `cafe.evaluate.evaluate`).

    Raises:
        ValueError: an unknown protocol, split or popularity, no user to evaluate, counts below 1, or for `authors`
            fewer than three intents.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if popularity not in POPULARITIES:
        raise ValueError(f"popularity {popularity!r}: expected one of {', '.join(POPULARITIES)}")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    if max_users is not None and max_users < 1:
        raise ValueError(f"max_users must be at least 1, got {max_users}")
    holdout = dataset.holdout(split)
    if len(holdout) == 0:
        raise ValueError(f"the {split} split has no users: a user needs at least 3 interactions to be evaluated")
    streams = np.random.SeedSequence([seed, ("valid", "test").index(split)]).spawn(3)
    rows = np.random.default_rng(streams[0]).permutation(len(holdout))[:max_users]
    order = np.argsort(rows)
    if protocol == "full":
        return Candidates(rows[order], None, None)

    interactions = dataset.train() if popularity == "train" else dataset.sequences
    negatives = draw_negatives(
        np.bincount(interactions.items, minlength=dataset.num_items),
        dataset.sorted_histories(),
        holdout.users[rows],
        num_negatives,
        int(streams[1].generate_state(1)[0]),
    )
    items = np.concatenate([holdout.answers[rows, None], negatives], axis=1)
    intents = np.where(items < 0, -1, dataset.item_intent[items])
    if protocol == "authors":
        rng = np.random.default_rng(streams[2])
        intents[:, 1:] = np.where(items[:, 1:] < 0, -1, other_intents(intents, dataset.num_intents, rng))
    return Candidates(rows[order], items[order], intents[order])


def draw_negatives(
    weights: NDArray[np.integer], histories: Sequences, users: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int32]:
    """`count` distinct items for each user, outside her sorted history, drawn by `weights` without replacement.

    A user for whom fewer than `count` items of positive weight are left gets all of them, then -1.

    Returns:
        (users, count) int32.
    """
    drawable = np.flatnonzero(weights)
    own = histories.take(users)
    positive = np.concatenate([[0], np.cumsum(weights[own.items] > 0)])
    left = len(drawable) - (positive[own.indptr[1:]] - positive[own.indptr[:-1]])
    negatives = np.full((len(users), count), -1, dtype=np.int32)
    for row in np.flatnonzero(left <= count).tolist():
        rest = np.setdiff1d(drawable, own[row], assume_unique=True)
        negatives[row, : len(rest)] = rest
    many = np.flatnonzero(left > count)
    if len(many):
        negatives[many] = AliasSampler(weights).sample_distinct(
            histories.indptr, histories.items, users[many], count, seed
        )
    return negatives


def other_intents(intents: NDArray[np.integer], num_intents: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The released code's pairing: for each negative a random intent, neither the answer's nor its own.

    Args:
        intents: (users, 1 + negatives), the true intent of the answer (column 0) and of each negative.

    Returns:
        (users, negatives) int64, uniform over the intents that are left.
    """
    if num_intents < PAIRED_INTENTS:
        raise ValueError(f"the authors' pairing needs at least {PAIRED_INTENTS} intents, the dataset has {num_intents}")
    low, high = np.minimum(intents[:, :1], intents[:, 1:]), np.maximum(intents[:, :1], intents[:, 1:])
    drawn = rng.integers(num_intents - 1 - (low < high))  # numbers the intents left, in ascending order
    drawn += drawn >= low  # ... and steps over the one or two that are not
    drawn += (drawn >= high) & (low < high)
    return drawn
