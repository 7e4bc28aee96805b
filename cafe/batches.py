"""Training batches: packed sequences with their negatives, made by a thread while the model computes.

Everything random is a function of (seed, epoch) or (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from cafe.config import Config
from cafe.data.dataset import Dataset, Sequences
from cafe.models import MODELS
from cafe.models.base import Batch
from cafe_kernels import AliasSampler

T = TypeVar("T")
DRAWS_A_STEP = 2**32  # each step draws negatives from its own stretch of the sampler's stream


class Batches:
    """The training set as numbered batches: `batches(rows, step)`, of which an epoch has len(batches)."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config, self.item_intent = config, dataset.item_intent
        self.kind, self.num_users, self.num_items = MODELS[config.model], dataset.num_users, dataset.num_items
        self.train = dataset.train()
        self.rows = np.flatnonzero(self.train.lengths >= 2)  # a sequence of one item has nothing to predict
        if len(self.rows) == 0:
            raise ValueError("nothing to train on: every user has fewer than two interactions before the held-out ones")
        counts = dataset.train_counts()
        weights = np.ones(dataset.num_items) if config.negatives_alpha == 0 else counts
        self.items = AliasSampler(weights, alpha=config.negatives_alpha or 1.0)
        self.log_q = None
        if config.loss == "softmax":
            with np.errstate(divide="ignore"):  # items without training interactions are never drawn, nor a positive
                self.log_q = np.log(self.items.probabilities * config.negatives).astype(np.float32)
        self.seen = _undrawable_emptied(
            replace(dataset, sequences=self.train).sorted_histories(), np.flatnonzero(self.items.probabilities > 0)
        )
        self.intents, self.seen_intents = None, None
        if config.model == "cafe" and config.intent_loss == "bce":
            self.intents = AliasSampler(np.ones(dataset.num_intents))
            by_intent = replace(
                dataset,
                sequences=Sequences(self.train.indptr, dataset.item_intent[self.train.items]),
                item_ids=dataset.intent_ids,
            )
            self.seen_intents = _undrawable_emptied(by_intent.sorted_histories(), np.arange(dataset.num_intents))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.config.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, shuffled by (seed, epoch)."""
        return np.random.default_rng([self.config.seed, epoch]).permutation(self.rows)

    def __call__(self, rows: np.ndarray, step: int, before: int = 0) -> Batch:
        """The batch of sequences `rows`; `step` is the number of the training step, which fixes its negatives.

        before: how many tokens of the step come before these where `rows` are a part of its sequences (cafe.distributed); then the
            negatives are this part of the step's. Not for a cloze or a personal model, whose inputs are drawn too."""
        config, random = self.config, np.random.default_rng([self.config.seed, step, 1])
        sequences = self.train.take(rows, last=config.max_len + (not self.kind.cloze))
        # Inputs are all but each sequence's last item, positives all but its first; of a cloze all, and those that are hidden.
        lengths = sequences.lengths - (not self.kind.cloze)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        sequence, targets, users = np.repeat(np.arange(len(rows)), lengths), None, None
        negatives: np.ndarray
        if self.kind.cloze:
            inputs, targets = sequences.items, self._hidden(random, cu_seqlens, sequence)
            positives, asked = inputs[targets], sequence[targets]
        else:
            first, last = (np.ones(len(sequences.items), bool) for _ in range(2))
            first[sequences.indptr[1:] - 1] = False
            last[sequences.indptr[:-1]] = False
            inputs, positives, asked = sequences.items[first], sequences.items[last], sequence
        if self.kind.personal:  # stochastic shared embeddings
            users = np.where(
                random.random(len(rows)) < config.sse_user, random.integers(self.num_users, size=len(rows)), rows
            )
            other = random.integers(self.num_items, size=len(inputs))
            inputs = np.where(random.random(len(inputs)) < config.sse_item, other, inputs)
        of = rows[asked]  # each positive's user
        draw: dict[str, Any] = {
            "seed": config.seed,
            "offset": step * DRAWS_A_STEP,
        }  # draw j of token t is at offset + t K + j
        ignore = None
        if config.loss == "full":
            negatives = np.arange(self.num_items)
        elif config.negatives_shared == "batch":
            negatives = self.items.sample((config.negatives,), **draw)
            ignore = torch.from_numpy(self._had(rows, negatives))
        else:
            at = draw | {"offset": draw["offset"] + before * config.negatives}
            negatives = self.items.sample_excluding(self.seen.indptr, self.seen.items, of, config.negatives, **at)
        intent_negatives = None
        if self.intents is not None and self.seen_intents is not None:
            drawn = self.intents.sample_excluding(
                self.seen_intents.indptr,
                self.seen_intents.items,
                of,
                1,
                seed=config.seed + 1,
                offset=draw["offset"] + before,
            )
            intent_negatives = _long(drawn)
        return Batch(
            items=_long(inputs),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=int(lengths.max()),
            sequence=_long(sequence),
            targets=None if targets is None else _long(targets),
            users=None if users is None else _long(users),
            positives=_long(positives),
            negatives=_long(negatives),
            ignore=ignore,
            negative_log_q=None if self.log_q is None else torch.from_numpy(self.log_q[negatives]),
            positive_log_q=None if self.log_q is None else torch.from_numpy(self.log_q[positives]),
            intent_negatives=intent_negatives,
            step=step,
        )

    def _hidden(self, random: np.random.Generator, cu_seqlens: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """The tokens of a cloze, ascending: a share of all, or each row's last alone; at least one of each row."""
        last_only = random.random(len(cu_seqlens) - 1) < self.config.mask_last
        hidden = (random.random(len(sequence)) < self.config.mask_prob) & ~last_only[sequence]
        none = np.add.reduceat(hidden, cu_seqlens[:-1], dtype=np.int64) == 0
        hidden[cu_seqlens[1:][none] - 1] = True
        return np.flatnonzero(hidden)

    def _had(self, rows: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        """bool (rows, negatives): which negatives are in the training history of which row."""
        had = np.zeros((len(rows), len(negatives)), bool)
        order = np.argsort(negatives, kind="stable")
        histories = self.seen.take(rows)
        start = np.searchsorted(negatives, histories.items, "left", sorter=order)
        count = np.searchsorted(negatives, histories.items, "right", sorter=order) - start
        row = np.repeat(np.repeat(np.arange(len(rows)), histories.lengths), count)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        had[row, order[np.repeat(start, count) + within]] = True
        return had


def prefetch(make: Callable[[int], T], numbers: range, depth: int = 4) -> Iterator[T]:
    """`make(i)` for each number in order, computed ahead by a thread; its errors are raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in numbers:
                if stop.is_set():
                    return
                put((make(number), None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="cafe-batches")
    thread.start()
    try:
        for _ in numbers:
            entry, error = ready.get()
            if error is not None:
                raise error
            yield entry  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _undrawable_emptied(histories: Sequences, drawable: np.ndarray) -> Sequences:
    """Empties the rows that hold every drawable number: such a user's negatives are drawn from all, but for the positive."""
    is_drawable = np.zeros(max(histories.items.max(initial=-1), drawable.max(initial=-1)) + 1, bool)
    is_drawable[drawable] = True
    held = np.add.reduceat(np.append(is_drawable[histories.items], 0), histories.indptr[:-1])
    held[histories.lengths == 0] = 0
    lengths = np.where(held == len(drawable), 0, histories.lengths)
    if (lengths == histories.lengths).all():
        return histories
    keep = np.repeat(lengths > 0, histories.lengths)
    return Sequences(np.concatenate([[0], np.cumsum(lengths)]), histories.items[keep])


def _long(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
