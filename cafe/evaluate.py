"""How well a model ranks the item that a user took next: leave-one-out evaluation.

The answer is ranked among candidates by a score. With intents, the joint score of Eq. 10, sigma(r^c) * sigma(r^v), is
kept as log sigma(r^c) + log sigma(r^v) (the model's `join`), each candidate with ITS OWN intent; the item score r^v
alone is reported beside it. What is stored per user is how many candidates score above the answer and how many
exactly like it (see cafe.metrics), so metrics, breakdowns and paired comparisons need no second scoring.

Protocols (who the answer is ranked against):

    aligned   popularity-drawn negatives outside the user's whole history, each with its own intent. The default.
    full      the whole catalog without what the user had before the answer. An item bought again stays in: the answer
              is never left out, nor is it ever counted against itself.
    authors   the candidates of `aligned` as the paper's released code scores them: negatives carry a random OTHER
              intent, never the answer's, so none is credited for sharing it; raw logits are added; ties favour the
              model. It shows how large that artefact is and measures nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from cafe.candidates import Candidates, draw_candidates
from cafe.data.dataset import Dataset, Holdout
from cafe.evaluation import Evaluation
from cafe.models.base import Weights
from cafe.models.sasrec import SASRec
from cafe_kernels import TopKIndex

ARTEFACT = (
    "authors is an artefact, NOT a measure of quality: it gives the answer its true intent and every negative another one, "
    "so whatever knows the answer's intent ranks it high. Compare models by aligned and full."
)
FULL_BYTES_PER_SCORE = 40  # the item logit, its intent's, their join and its temporaries, the comparisons


class Model(Protocol):
    """What evaluation needs of a model: all of cafe.models have it."""

    config: Any  # config.max_len: how many of the newest items of a history the model reads

    def score(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None = None,
        candidate_intents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Raw item and intent logits for what follows each packed history; no candidates: all items, all intents."""

    def join(
        self,
        item_logits: Tensor,
        intent_logits: Tensor | None,
        weights: Weights | None = None,
        protocol: str = "full",
    ) -> Tensor:
        """The joint score; the item logits where there are no intents."""


def evaluate(
    model: Model,
    dataset: Dataset,
    split: str = "test",
    protocol: str = "aligned",
    num_negatives: int = 100,
    seed: int = 0,
    batch_size: int = 256,
    max_users: int | None = None,
    popularity: str = "all",
    tried: Sequence[Weights] = (),
    progress: Callable[[int, int], None] | None = None,
    memory_bytes: int = 1 << 30,
    name: str | None = None,
    preset: str | None = None,
) -> Evaluation:
    """Ranks every user's held-out item.

    Users, candidates and their intents never depend on the model or the batch size, only on the dataset and the other
    arguments; `max_users` users have the candidates that they have in the evaluation of everybody.

    Args:
        model: see `Model`; a torch module is put in eval mode meanwhile and scored where its parameters are.
        split: `valid` or `test`; the test history holds the validation item.
        protocol: `aligned`, `full` or `authors`, see the top of this file.
        num_negatives: for `aligned` and `authors`. Where a small catalog has fewer left, all of them are taken.
        batch_size: users scored at once; `full` takes fewer where `memory_bytes` would not hold their scores.
        max_users: evaluate a random sample of this many users.
        popularity: what the negatives are drawn by, `all` interactions or those of `train`, see cafe.candidates.
        tried: also rank by the joint score with these weights, as scores of `joint_name`; calibration compares them.
        progress: called with (users done, users in all) after each batch.
        name, preset: how to call the model in reports; by default its class and its `config.preset`, if any.

    Raises:
        ValueError: an unknown split, protocol or popularity, nobody to evaluate, scores of another shape, or a NaN
            among them.

    Example:
        >>> import polars as pl
        >>> from types import SimpleNamespace
        >>> from cafe.data.dataset import Sequences
        >>> class Newest:  # a model that prefers the items of larger number
        ...     config = SimpleNamespace(max_len=50)
        ...     def score(self, items, cu_seqlens, candidates=None, candidate_intents=None):
        ...         return torch.arange(4.0).expand(len(cu_seqlens) - 1, 4), None
        ...     def join(self, item_logits, intent_logits, weights=None, protocol="full"):
        ...         return item_logits
        >>> dataset = Dataset(Sequences(np.array([0, 3, 6]), np.array([0, 1, 3, 3, 0, 1], np.int32)),
        ...                   np.array([0, 0, 1, 1], np.int32), pl.Series(["ann", "bo"]), pl.Series(list("abcd")),
        ...                   pl.Series(["tea", "pots"]))
        >>> result = evaluate(Newest(), dataset, protocol="full")
        >>> result.values("mrr").tolist()  # bo's item 1 comes second, after 2: 3 is excluded, she has had it
        [1.0, 0.5]
    """
    candidates = draw_candidates(dataset, split, protocol, num_negatives, seed, max_users, popularity)
    if protocol == "authors":
        warnings.warn(ARTEFACT, stacklevel=2)
    holdout = dataset.holdout(split)
    rows = candidates.rows
    # A model on the CPU that scores by inner products is ranked through an index, which never holds the scores of the catalog;
    # a sharded one (cafe.distributed) everywhere.
    on_cpu = isinstance(model, SASRec) and _device(model).type == "cpu"
    by_index = protocol == "full" and (on_cpu or getattr(model, "sharded", False))
    if protocol == "full" and not by_index:
        batch_size = min(batch_size, memory_bytes // (FULL_BYTES_PER_SCORE * dataset.num_items))
    batch_size = max(batch_size, 1)
    training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        model.eval()
    counts: dict[str, list[Tensor]] = {}
    try:
        with torch.inference_mode():
            index = cast(SASRec, model).index() if by_index else None
            for start in range(0, len(rows), batch_size):
                batch = slice(start, min(start + batch_size, len(rows)))
                for score, pair in _count_batch(
                    model, dataset, holdout, candidates, batch, protocol, tried, index
                ).items():
                    counts.setdefault(score, []).append(pair.cpu())
                if progress is not None:
                    progress(batch.stop, len(rows))
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)
    stacked = {score: torch.cat(pairs, dim=1).numpy() for score, pairs in counts.items()}
    config = getattr(model, "config", None)
    return Evaluation(
        model=name or type(model).__name__,
        preset=preset or getattr(config, "preset", None),
        protocol=protocol,
        split=split,
        dataset=dataset.fingerprint,
        candidates=candidates.digest,
        num_negatives=None if protocol == "full" else num_negatives,
        short=candidates.short,
        popularity=None if protocol == "full" else popularity,
        seed=seed,
        users=holdout.users[rows],
        history_length=holdout.histories.lengths[rows],
        train_frequency=dataset.train_counts()[holdout.answers[rows]],
        greater={score: pair[0] for score, pair in stacked.items()},
        equal={score: np.zeros_like(pair[1]) if protocol == "authors" else pair[1] for score, pair in stacked.items()},
    )


def _count_batch(
    model: Model,
    dataset: Dataset,
    holdout: Holdout,
    candidates: Candidates,
    batch: slice,
    protocol: str,
    tried: Sequence[Weights],
    index: TopKIndex | None,
) -> dict[str, Tensor]:
    """For each score (2, users): how many candidates are above the answer, and how many like it."""
    device = _device(model)
    rows = candidates.rows[batch]
    history = holdout.histories.take(rows, last=model.config.max_len)
    items = torch.from_numpy(history.items.astype(np.int64)).to(device)
    cu_seqlens = torch.from_numpy(history.indptr.astype(np.int32)).to(device)
    users = torch.from_numpy(holdout.users[rows]).to(device)
    if index is not None:
        return _count_by_index(cast(SASRec, model), index, dataset, holdout, rows, items, cu_seqlens, users, tried)
    who: dict[str, Tensor] = {"users": users} if getattr(model, "personal", False) else {}
    if candidates.items is None or candidates.intents is None:
        item, intent = model.score(items, cu_seqlens, **who)
        _check_shapes(item, intent, (len(rows), dataset.num_items), (len(rows), dataset.num_intents))
        columns = holdout.answers[rows].astype(np.int64)
        skip_rows, skip_columns = _seen(holdout, rows, dataset.num_items)
        own_intent = torch.from_numpy(dataset.item_intent.astype(np.int64)).to(device)
        if intent is not None:
            intent = intent[:, own_intent]
    else:
        columns = np.zeros(len(rows), np.int64)
        skip_rows, skip_columns = np.nonzero(candidates.items[batch] < 0)
        ids, intents = (  # a missing negative is scored as the answer once more, and then left out of the counts
            torch.from_numpy(np.where(array < 0, array[:, :1], array).astype(np.int64)).to(device)
            for array in (candidates.items[batch], candidates.intents[batch])
        )
        item, intent = model.score(items, cu_seqlens, candidates=ids, candidate_intents=intents, **who)
        _check_shapes(item, intent, tuple(ids.shape), tuple(ids.shape))
    item = item.float()
    scores = {"item": item}
    if intent is not None:
        intent = intent.float()
        added = (
            protocol == "authors" and getattr(model.config, "join", None) != "item"
        )  # the released code's joint score
        scores["joint"] = item + intent if added else model.join(item, intent, protocol=protocol)
        scores |= {joint_name(weights): model.join(item, intent, weights, protocol) for weights in tried}
    where = [torch.from_numpy(index).to(device) for index in (columns, skip_rows, skip_columns)]
    return {score: count_above(values, *where) for score, values in scores.items()}


def _count_by_index(
    model: SASRec,
    index: TopKIndex,
    dataset: Dataset,
    holdout: Holdout,
    rows: np.ndarray,
    items: Tensor,
    cu_seqlens: Tensor,
    users: Tensor,
    tried: Sequence[Weights],
) -> dict[str, Tensor]:
    """As `_count_batch`, among the whole catalog."""
    state, intent_state = model.states(items, cu_seqlens, users)
    skip_rows, skip_columns = _seen(holdout, rows, dataset.num_items)
    indptr = torch.from_numpy(np.searchsorted(skip_rows, np.arange(len(rows) + 1)))
    exclude = indptr, torch.from_numpy(skip_columns)
    answers = torch.from_numpy(holdout.answers[rows].astype(np.int64))
    terms: dict[str, tuple[Tensor | None, str]] = {"item": (None, "identity")}
    queries = {"item": model.index_query(state, (0.0, 0.0))}
    if intent_state is not None:
        logits = model.intent_logits(intent_state)
        for name, weights in [("joint", None), *((joint_name(pair), pair) for pair in tried)]:
            queries[name], terms[name] = model.index_query(state, weights), model.joint_terms(logits, weights)
    return {
        name: index.count_above(queries[name], answers, intents, join=join, exclude=exclude)
        for name, (intents, join) in terms.items()
    }


def joint_name(weights: Weights) -> str:
    """How the joint score with these weights is called in an Evaluation."""
    return "joint*{}*{}".format(*weights)


def count_above(scores: Tensor, answer: Tensor, skip_rows: Tensor, skip_columns: Tensor) -> Tensor:
    """How many candidates score above the answer, and how many exactly like it.

    The answer's score is read from the same matrix as the candidates', so that no rounding makes or breaks a tie.

    Args:
        scores: (users, candidates).
        answer: (users,) int64, the answer's column.
        skip_rows, skip_columns: int64, distinct positions that do not count; never the answer's.

    Returns:
        (2, users) int64: above, like.

    Raises:
        ValueError: a score is NaN. (It compares false with everything and would pass for a good rank.)
    """
    bad = scores.amax(dim=1).isnan()
    if bad.any():
        raise ValueError(f"the model gave NaN scores to {int(bad.sum())} of {len(bad)} users of a batch: cannot rank")
    own = scores.gather(1, answer[:, None])
    above, like = (relation.sum(dim=1, dtype=torch.int32).long() for relation in (scores > own, scores == own))
    like -= 1  # the answer itself
    skipped, skipped_own = scores[skip_rows, skip_columns], own[skip_rows, 0]
    above.index_add_(0, skip_rows, (skipped > skipped_own).long(), alpha=-1)
    like.index_add_(0, skip_rows, (skipped == skipped_own).long(), alpha=-1)
    return torch.stack([above, like])


def _seen(holdout: Holdout, rows: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of the batch and item of everything each user had before the answer, once each, the answer left out."""
    histories = holdout.histories.take(rows)
    users = np.repeat(np.arange(len(rows)), histories.lengths)
    seen = histories.items.astype(np.int64)
    other = seen != holdout.answers[rows][users]
    pairs = np.unique(users[other] * num_items + seen[other])
    return np.divmod(pairs, num_items)


def _check_shapes(item: Tensor, intent: Tensor | None, *expected: tuple[int, ...]) -> None:
    for kind, logits, shape in zip(("item", "intent"), (item, intent), expected, strict=True):
        if logits is not None and logits.shape != shape:
            raise ValueError(f"the {kind} scores have shape {tuple(logits.shape)}, expected {shape}")


def _device(model: Model) -> torch.device:
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, torch.nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
