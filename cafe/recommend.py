"""Top-k items for histories: the joint score over the whole catalog (Eq. 10) without what the user has had."""

import re
import reprlib
import warnings
from collections.abc import Iterable, Sized
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cafe.data.dataset import Dataset
from cafe.models import Model
from cafe.models.sasrec import SASRec
from cafe.runs import load_run
from cafe_kernels import TopKIndex

BYTES = 256 << 20  # for the scores of one batch of users
INDEX_AFTER = 64  # users; building the index takes about as long as scoring the whole catalog for so many


@dataclass(frozen=True)
class Recommendation:
    """What one user is recommended.

    items: item ids, best first; intents: the intent id of each; scores: the joint score of each, to rank within this list.
    top_intents: (intent id, probability) of the intents that the model expects next, for a model with intents.
    popular: True where the history had no known item, and popular items are given instead.
    """

    items: list[Any]
    intents: list[Any]
    scores: list[float]
    top_intents: list[tuple[Any, float]]
    popular: bool


class Recommender:
    """A trained model with the ids of its catalog.

    Example:
        >>> Recommender.load("runs/cafe").recommend([["i20", "i21"]], k=3)[0].items  # doctest: +SKIP
        ['i2061', 'i17', 'i903']
    """

    def __init__(self, model: Model, dataset: Dataset) -> None:
        self.model, self.dataset = model.eval(), dataset
        self._served = 0
        self._indexed_model: list[tuple[int, int]] = []

    @classmethod
    def load(cls, run: str | Path, data: str | Path | None = None) -> "Recommender":
        """The best checkpoint of a run folder; `data` where its prepared dataset is now, if it was moved."""
        return cls(*load_run(run, data))

    @cached_property
    def _item_number(self) -> dict[Any, int]:
        return {item: number for number, item in enumerate(self.dataset.item_ids.to_list())}

    @cached_property
    def _user_number(self) -> dict[Any, int]:
        return {user: number for number, user in enumerate(self.dataset.user_ids.to_list())}

    @cached_property
    def _counts(self) -> Tensor:
        return torch.from_numpy(np.bincount(self.dataset.sequences.items, minlength=self.dataset.num_items)).float()

    @cached_property
    def _index(self) -> TopKIndex:
        assert isinstance(self.model, SASRec)
        return self.model.index()

    def history_of(self, user: Any) -> list[Any]:
        """The item ids of a user of the dataset, oldest first; an unknown user is a ValueError."""
        number = self._user_number.get(_as_type(user, self.dataset.user_ids))
        if number is None:
            example = self.dataset.user_ids[0]
            raise ValueError(
                f"user {user!r} is not in the dataset (ids look like {example!r}): give a --history instead"
            )
        return [self.dataset.item_ids[int(item)] for item in self.dataset.sequences[number]]

    def recommend(
        self,
        histories: Seq[Seq[Any]],
        k: int = 10,
        batch_size: int = 256,
        users: Seq[Any] | None = None,
        filter_viewed: bool = True,
    ) -> list[Recommendation]:
        """The k best unseen items for each history (item ids, oldest first), those of equal score in the catalog's order.

        Unknown ids are skipped with a warning; a history with none left gets popular items. Fewer than k items come back
        where the catalog has no more unseen ones.

        Args:
            users: each history's user id, read by SSE-PT alone; one that the dataset does not know, or None, is the mean user.
            filter_viewed: False recommends the items of a history, too.

        Raises:
            ValueError: k is no whole number or not positive; a text, or one history where a list of them was expected; not one
                user a history; scores that are not finite.
        """
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise ValueError(f"k={k!r}: expected a whole number, at least 1")
        if isinstance(histories, str) or any(isinstance(x, str) or not isinstance(x, Iterable) for x in histories):
            raise ValueError(
                f"histories={reprlib.repr(histories)}: expected a list of histories, each a list of item ids, as in "
                f"[['i20', 'i21']]"
            )
        if users is not None and (
            isinstance(users, str) or not isinstance(users, Sized) or len(users) != len(histories)
        ):
            raise ValueError(
                f"users={reprlib.repr(users)}: expected one user id for each of {len(histories)} histories"
            )
        names = [None] * len(histories) if users is None else users
        who = torch.tensor([self._user_number.get(_as_type(name, self.dataset.user_ids), -1) for name in names]).long()
        known = [
            [self._item_number.get(_as_type(item, self.dataset.item_ids)) for item in history] for history in histories
        ]
        unknown = [
            item
            for history, ids in zip(histories, known, strict=True)
            for item, i in zip(history, ids, strict=True)
            if i is None
        ]
        if unknown:
            warnings.warn(f"{len(unknown)} unknown item ids skipped, the first is {unknown[0]!r}", stacklevel=2)
        rows = [np.array([i for i in ids if i is not None], np.int64) for ids in known]
        self._served += len(rows)
        if not self._indexed:
            batch_size = max(1, min(batch_size, BYTES // (8 * self.dataset.num_items)))
        answers: list[Recommendation] = []
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            answers += self._batch(rows[batch], who[batch], min(k, self.dataset.num_items), filter_viewed)
        return answers

    @property
    def _indexed(self) -> bool:
        return self._served >= INDEX_AFTER and isinstance(self.model, SASRec) and not self.model.item_intent.is_cuda

    @torch.inference_mode()
    def _batch(self, histories: list[np.ndarray], users: Tensor, k: int, filter_viewed: bool) -> list[Recommendation]:
        best, items = (x.repeat(len(histories), 1) for x in _best(self._counts[None], k))
        intents: dict[int, Tensor] = {}
        read = [row for row, history in enumerate(histories) if len(history)]
        if read:
            newest = [torch.from_numpy(histories[row][-self.model.config.max_len :]) for row in read]
            cu_seqlens = torch.tensor([0, *np.cumsum([len(h) for h in newest])], dtype=torch.int32)
            seen = [torch.from_numpy(histories[row][: None if filter_viewed else 0]) for row in read]
            best_of = self._search if self._indexed else self._score
            best[read], items[read], intent = best_of(torch.cat(newest), cu_seqlens, users[read], seen, k)
            if intent is not None:
                intents = dict(zip(read, intent.softmax(-1), strict=True))
        answers = []
        for row in range(len(histories)):
            fits = best[row] > -torch.inf
            numbers = items[row][fits].tolist()
            top = intents[row].topk(min(3, self.dataset.num_intents)) if row in intents else None
            answers.append(
                Recommendation(
                    items=[self.dataset.item_ids[i] for i in numbers],
                    intents=[self.dataset.intent_ids[int(self.dataset.item_intent[i])] for i in numbers],
                    scores=[round(value, 5) for value in best[row][fits].tolist()],
                    top_intents=[]
                    if top is None
                    else [
                        (self.dataset.intent_ids[i], round(p, 4))
                        for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                    ],
                    popular=row not in intents and not len(histories[row]),
                )
            )
        return answers

    def _search(
        self, history: Tensor, cu_seqlens: Tensor, users: Tensor, seen: list[Tensor], k: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores and items of the k best by the index, and the intents' logits."""
        assert isinstance(self.model, SASRec)
        now = [(id(x), x._version) for x in (*self.model.parameters(), *self.model.buffers()) if not x.is_inference()]
        if now != self._indexed_model:  # it was trained on, or replaced
            vars(self).pop("_index", None)
            self._indexed_model = now
        state, intent_state = self.model.states(history, cu_seqlens, users)
        intent = None if intent_state is None else self.model.intent_logits(intent_state)
        scores, join = self.model.joint_terms(intent)
        exclude = torch.tensor([0, *np.cumsum([len(items) for items in seen])]), torch.cat(seen)
        found = self._index.search(self.model.index_query(state), k, scores, join=join, exclude=exclude)
        return found.scores, found.items, intent

    def _score(
        self, history: Tensor, cu_seqlens: Tensor, users: Tensor, seen: list[Tensor], k: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same by scoring the whole catalog."""
        scores, intent = self.model.score(history, cu_seqlens, users=users)
        if intent is not None:
            scores = self.model.join(scores, intent[:, self.model.item_intent])
        for row, items in enumerate(seen):
            scores[row, items] = -torch.inf
        return *_best(scores, k), intent


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row and where they are, equal ones in order of place: as TopKIndex has it."""
    best = scores.topk(k).values
    if not bool((best < torch.inf).all()):
        raise ValueError("the model's scores are not finite: cannot rank by them; was its training finished?")
    places = []
    for row, least in zip(scores, best[:, -1], strict=True):
        enough = (row >= least).nonzero()[:, 0]
        places.append(enough[row[enough].sort(descending=True, stable=True).indices[:k]])
    return best, torch.stack(places)


def _as_type(value: Any, ids: pl.Series) -> Any:
    """`value` as the ids have it, or None: the command line gives text where a dataset may have numbers."""
    if isinstance(value, str) and ids.dtype.is_integer():
        return int(value) if re.fullmatch("0|-?[1-9][0-9]{0,19}", value) else None
    return str(value) if ids.dtype == pl.String and value is not None else value
