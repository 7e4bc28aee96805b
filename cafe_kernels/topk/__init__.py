"""Exact top-k over a catalog by the joint score of CAFE (Eq. 10), reading as little of it as the bounds allow.

    score(v) = fl32(intent_scores[intent(v)] + g(user . E_v)),   g(x) = x or log sigma(x)

The answer is unique and the same on every backend: see reference.py for what a score is, down to the bit, and csrc/topk.cpp for
the bounds. An index is built once for a table; the functions build one for a call.
"""

from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cafe_kernels.backends import choose_backend
from cafe_kernels.topk import cpu, reference

__all__ = ["TopK", "TopKIndex", "joint_topk", "topk_inner_product"]

MODULES = {"cpu": "cpu", "triton": "triton_topk"}
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
LARGEST_SCORE = 1e37  # |user| |item|: beyond it float32 may overflow


def backend_module(name: str) -> ModuleType:
    """Imported when needed: triton is not everywhere."""
    return import_module(f"cafe_kernels.topk.{MODULES[name]}")


class TopK(NamedTuple):
    """items: int64 (B, k), k at most max(1, V), best first, and -1 where there are no more; scores: float32, likewise, there -inf.
    scored: the share of all pairs of user and item that were scored at all (1 for brute force); exact: the share that was scored in
    full precision."""

    items: Tensor
    scores: Tensor
    scored: float
    exact: float


class TopKIndex:
    """A table of items with what a search needs: order by intent, centroids, radii and 8-bit codes. It is built once for a checkpoint.

    The table is not copied. A search after torch changed it is refused (what writes through numpy goes unnoticed). The rest takes
    V * (d + 12) bytes and d / 16 bytes for an item.

    Args:
        table: (V, d) float32, finite.
        item_intent: int64 (V,), each item's intent; None where there are none.
        num_intents: C; default the largest intent + 1.
        backend: "reference", "cpu", "triton"; None chooses: CAFE_KERNELS_BACKEND, else the fastest that can run.

    Raises:
        ValueError: wrong shapes or dtypes, numbers that are not finite, intents outside 0 to C - 1.

    Example:
        >>> index = TopKIndex(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 1, 1]))
        >>> index.search(torch.tensor([[1.0]]), k=2, intent_scores=torch.tensor([[0.0, -5.0]])).items
        tensor([[0, 1]])
    """

    def __init__(
        self,
        table: Tensor,
        item_intent: Tensor | None = None,
        num_intents: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        if table.dim() != 2 or table.dtype != torch.float32 or not 1 <= table.shape[1] <= 32768:
            raise ValueError(f"table must be float32 (V, 1 to 32768), got {table.dtype} {tuple(table.shape)}")
        if item_intent is None:
            item_intent = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        if item_intent.shape != (len(table),) or item_intent.dtype != torch.int64:
            raise ValueError(
                f"item_intent must be int64 ({len(table)},), got {item_intent.dtype} {tuple(item_intent.shape)}"
            )
        least, most = (int(x) for x in item_intent.aminmax()) if len(table) else (0, 0)
        self.num_intents = most + 1 if num_intents is None else num_intents
        if least < 0 or most >= self.num_intents:
            raise ValueError(f"item_intent must be in [0, {self.num_intents}), found {least} to {most}")
        table = table.detach()
        self.largest_norm = max(
            (float(rows.norm(dim=1).amax()) for rows in table.split(1 << 16) if len(rows)), default=0.0
        )
        if not self.largest_norm < torch.inf:
            raise ValueError("the table has numbers that are not finite, or too large for float32: cannot rank by it")
        self.table, self.item_intent = table.contiguous(), item_intent.contiguous()
        self._versions = self._version_now()
        self.backend = choose_backend(backend, backend_module, table)

    def _version_now(self) -> list[int]:
        """What torch counts up at every change in place; inference tensors have no count."""
        return [0 if x.is_inference() else x._version for x in (self.table, self.item_intent)]

    @cached_property
    def _codes(self) -> Any:
        return cpu.build(self.table, self.item_intent, self.num_intents)

    def search(
        self,
        user: Tensor,
        k: int,
        intent_scores: Tensor | None = None,
        *,
        join: str = "identity",
        exclude: tuple[Tensor, Tensor] | None = None,
    ) -> TopK:
        """The k best items of each user.

        Args:
            user: (B, d) float32.
            intent_scores: (B, C) float32, what an item's intent adds to its score; None adds nothing.
            join: g of the item's own score, "identity" or "log_sigmoid".
            exclude: (indptr, indices), integers (B + 1,) and (n,): the items user b may not get are indices[indptr[b]:indptr[b + 1]].

        Raises:
            ValueError: wrong shapes or dtypes, numbers that are not finite, scores beyond 1e37, a table that changed.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        k = max(1, min(k, len(self.table)))
        user, intent_scores = user.detach(), None if intent_scores is None else intent_scores.detach()
        self._check(user, intent_scores, join, exclude)
        if self.backend == "cpu":
            items, scores, work = cpu.search(self._codes, user, intent_scores, join, k, exclude)
            pairs = max(1, len(user) * len(self.table))
            return TopK(items, scores, work[0] / pairs, work[1] / pairs)
        if self.backend == "triton":
            triton_search, norm = backend_module("triton").search, self.largest_norm
            items, scores = triton_search(user, self.table, self.item_intent, intent_scores, join, k, exclude, norm)
        else:
            items, scores = reference.search(user, self.table, self.item_intent, intent_scores, join, k, exclude)
        return TopK(items, scores, 1.0, 1.0)

    def count_above(
        self,
        user: Tensor,
        answers: Tensor,
        intent_scores: Tensor | None = None,
        *,
        join: str = "identity",
        exclude: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """How many items score above each user's answer, and how many others exactly like it: int64 (2, B), the answer's exact rank.

        Args:
            answers: int64 (B,), items of the table; an answer is never excluded. The rest as for `search`.

        Example:
            >>> index = TopKIndex(torch.tensor([[1.0], [3.0], [3.0]]))
            >>> index.count_above(torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1])).tolist()
            [[2, 0], [0, 1]]
        """
        user, intent_scores = user.detach(), None if intent_scores is None else intent_scores.detach()
        self._check(user, intent_scores, join, exclude)
        if answers.shape != user.shape[:1] or answers.dtype != torch.int64:
            raise ValueError(f"answers must be int64 ({len(user)},), got {answers.dtype} {tuple(answers.shape)}")
        if len(answers) and not (int(answers.min()) >= 0 and int(answers.max()) < len(self.table)):
            raise ValueError(f"answers must be items 0 to {len(self.table) - 1}")
        if self.backend == "cpu":
            return cpu.count_above(self._codes, user, intent_scores, join, answers, exclude)[0]
        return reference.count_above(user, self.table, self.item_intent, intent_scores, join, answers, exclude)

    def _check(
        self, user: Tensor, intent_scores: Tensor | None, join: str, exclude: tuple[Tensor, Tensor] | None
    ) -> None:
        dim = self.table.shape[1]
        if self._version_now() != self._versions:
            raise ValueError("the table or item_intent was changed after the index was built: build a new TopKIndex")
        if join not in reference.JOINS:
            raise ValueError(f"unknown join {join!r}: expected {' or '.join(reference.JOINS)}")
        for name, x, shape in (
            ("user", user, (len(user), dim)),
            ("intent_scores", intent_scores, (len(user), self.num_intents)),
        ):
            if x is None:
                continue
            if x.shape != shape or x.dtype != torch.float32 or x.device != self.table.device:
                raise ValueError(
                    f"{name} must be float32 {shape} on {self.table.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
                )
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name} has numbers that are not finite: cannot rank by it")
        for name, largest in (
            ("|user| |item|", float(user.double().norm(dim=1).amax()) * self.largest_norm if len(user) else 0.0),
            (
                "|intent_scores|",
                float(intent_scores.abs().amax()) if intent_scores is not None and intent_scores.numel() else 0.0,
            ),
        ):
            if largest > LARGEST_SCORE:
                raise ValueError(f"{name} is up to {largest:.3g}: scores beyond {LARGEST_SCORE:g} overflow float32")
        if exclude is None:
            return
        indptr, indices = exclude
        if (
            indptr.shape != (len(user) + 1,)
            or indptr.dtype not in INTEGERS
            or indices.dim() != 1
            or indices.dtype not in INTEGERS
        ):
            raise ValueError(
                f"exclude must be (indptr, indices), integers ({len(user) + 1},) and (n,), "
                f"got {indptr.dtype} {tuple(indptr.shape)} and {indices.dtype} {tuple(indices.shape)}"
            )
        if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
            raise ValueError(f"exclude's indptr must ascend from 0 to its {len(indices)} indices")
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < len(self.table)):
            raise ValueError(f"exclude's indices must be items 0 to {len(self.table) - 1}")


def joint_topk(
    user: Tensor,
    table: Tensor,
    intent_scores: Tensor,
    intent_indptr: Tensor,
    k: int,
    *,
    join: str = "log_sigmoid",
    exclude: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> TopK:
    """The k best items by intent_scores[intent(v)] + g(user . E_v), for one call; build a `TopKIndex` for several.

    Args:
        user: (B, d) float32.
        table: (V, d) float32, stored by intent: intent c has the rows intent_indptr[c] to intent_indptr[c + 1].
        intent_scores: (B, C) float32, for Eq. 10 the log sigmoid of the intent's logits.
        intent_indptr: int64 (C + 1,).
        join: g, "log_sigmoid" (Eq. 10) or "identity".
        exclude: (indptr, indices), see `TopKIndex.search`.

    Example:
        >>> table = torch.tensor([[1.0], [3.0], [2.0]])
        >>> joint_topk(torch.ones(1, 1), table, torch.tensor([[-0.1, -4.0]]), torch.tensor([0, 1, 3]), k=2).items
        tensor([[0, 1]])
    """
    if intent_indptr.dtype not in INTEGERS:
        raise ValueError(f"intent_indptr must be integers (C + 1,), got {intent_indptr.dtype}")
    sizes = intent_indptr.diff()
    if intent_indptr.dim() != 1 or not len(sizes) or int(intent_indptr[0]) != 0 or bool((sizes < 0).any()):
        raise ValueError(f"intent_indptr must ascend from 0, (C + 1,), got shape {tuple(intent_indptr.shape)}")
    if int(intent_indptr[-1]) != len(table):
        raise ValueError(f"intent_indptr must end at the {len(table)} rows of the table, got {int(intent_indptr[-1])}")
    item_intent = torch.repeat_interleave(torch.arange(len(sizes), device=table.device), sizes)
    index = TopKIndex(table, item_intent, len(sizes), backend=backend)
    return index.search(user, k, intent_scores, join=join, exclude=exclude)


def topk_inner_product(
    user: Tensor,
    table: Tensor,
    k: int,
    *,
    exclude: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> TopK:
    """The k largest inner products user . E_v, for one call.

    Example:
        >>> topk_inner_product(torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]]), k=1).scores
        tensor([[6.]])
    """
    return TopKIndex(table, backend=backend).search(user, k, exclude=exclude)
