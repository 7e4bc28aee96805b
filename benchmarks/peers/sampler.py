"""AliasSampler against RecBole's popularity sampler: building the table, and drawing for users outside their histories.

    python -m benchmarks.peers.env recbole benchmarks.peers.sampler       # writes results/peers_sampler.json

RecBole's `AbstractSampler` keeps the alias table in two dicts and draws in a Python loop; its `sample_by_key_ids` tests each draw against a
Python set. It gets the interactions as it wants them, a list with an entry for each. One thread, process CPU seconds, in turns in one
process; every call draws for other users. Both exclude 50-long histories and draw 50 for each of 64 users, 3,200 in all.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from recbole.sampler.sampler import AbstractSampler

from benchmarks.common import quartiles, write
from cafe_kernels import AliasSampler

USERS, HISTORY, K, ROWS = 2_000, 50, 50, 64
OURS, PEER = "AliasSampler", "RecBole AbstractSampler"
ROUNDS = 5


class Popularity(AbstractSampler):
    """RecBole's sampler over given interactions; the rest is its own."""

    def __init__(self, interactions: np.ndarray, histories: np.ndarray) -> None:
        self.interactions, self.histories = interactions, histories
        super().__init__("popularity", alpha=1.0)

    def _get_candidates_list(self) -> list[int]:
        return self.interactions.tolist()

    def get_used_ids(self) -> np.ndarray:
        return np.array([set(history) for history in self.histories.tolist()])


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return call(), time.process_time() - began


def measure(v: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = rng.permutation((np.arange(v) + 1.0) ** -0.75)
    interactions = np.concatenate([np.arange(v), AliasSampler(weights).sample((2 * v,), seed=1)])
    histories = np.sort(AliasSampler(weights).sample((USERS, HISTORY), seed=2), axis=1)
    indptr, indices = np.arange(USERS + 1) * HISTORY, histories.ravel()
    ours, built = timed(lambda: AliasSampler(np.bincount(interactions, minlength=v), num_threads=1))
    theirs, their_built = timed(lambda: Popularity(interactions, histories))
    out = np.empty((ROWS, K), np.int32)
    times: dict[str, list[float]] = {OURS: [], PEER: []}
    for number in range(ROUNDS + 1):
        rows = rng.choice(USERS, ROWS, replace=False)
        for name, call in (
            (OURS, partial(ours.sample_excluding, indptr, indices, rows, K, 1, number * out.size, out)),
            (PEER, partial(theirs.sample_by_key_ids, rows, K)),
        ):
            drawn, seconds = timed(call)
            times[name].append(seconds)
            drawn = out if name == OURS else drawn.numpy().reshape(K, ROWS).T
            assert not any(np.isin(drawn[row], histories[user]).any() for row, user in enumerate(rows))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    return {
        "draw": {
            "median_seconds": medians,
            "quartiles": {name: quartiles(taken[1:]) for name, taken in times.items()},
            "ratio": medians[PEER] / medians[OURS],
        },
        "build": {"median_seconds": {OURS: built, PEER: their_built}, "ratio": their_built / built},
    }


def main() -> None:
    cases = {}
    for v in (10_000, 200_000):
        cases[f"V={v}"] = measure(v)
        for what, found in cases[f"V={v}"].items():
            print(f"V = {v:,}, {what}: {found['median_seconds']}, {PEER} / ours = {found['ratio']:.0f}", flush=True)
    record = {"ours": [OURS], "threads": 1, "clock": "process CPU time", "draws": ROWS * K, "cases": cases}
    print(f"written: {write('peers_sampler', record, packages=['recbole'])}")


if __name__ == "__main__":
    main()
