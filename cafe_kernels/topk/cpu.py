"""The C++ backend of exact top-k (csrc/topk.cpp): the index that it searches, and its calls.

It uses torch.get_num_threads() threads. CAFE_KERNELS_ISA (auto, portable, avx2 or avx512) forces a code path.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cafe_kernels import _C
from cafe_kernels.backends import machine

BLOCK = 16  # items side by side, as kBlock of csrc/topk.cpp
SMALLEST, LARGEST = 64, 4096  # items of a group: smaller intents share one, larger ones are cut
CHUNK = 1 << 14  # rows that building looks at together


def unavailable(table: Tensor) -> str | None:
    return None if table.device.type == "cpu" else f"it runs on the CPU, the table is on {table.device}"


def build(table: Tensor, item_intent: Tensor, num_intents: int) -> _C.TopKIndex:
    """The index of a table (V, d) float32 whose item v has intent item_intent[v], int64 (V,)."""
    intent, dim = item_intent.numpy(), table.shape[1]
    order = np.argsort(intent, kind="stable")
    borders, first, last = _groups(np.bincount(intent, minlength=num_intents))
    borders, first, last = _cut(table, order, borders, first, last)
    size = np.diff(borders)
    start = np.concatenate([[0], np.cumsum(-(-size // BLOCK))])
    blocks, panels, quads = int(start[-1]), -(-len(size) // BLOCK), -(-dim // 4)
    start, size, first, last = (x.astype(np.int32) for x in (start, size, first, last))
    centroids, codes = np.empty((panels, dim, BLOCK), np.float32), np.empty((blocks, quads, BLOCK, 4), np.uint8)
    norm, radius, error = (np.empty(n) for n in (len(size), blocks, blocks))
    scale, slot_item = np.empty(blocks * BLOCK, np.float32), np.empty(blocks * BLOCK, np.int32)
    filled = centroids, norm, radius, error, scale, slot_item, codes
    _C.topk_build(table.numpy(), order.astype(np.int32), borders, start, *filled, torch.get_num_threads())
    return _C.TopKIndex(table.numpy(), intent.astype(np.int32), num_intents, start, size, first, last, *filled)


def search(
    index: _C.TopKIndex,
    user: Tensor,
    intent_scores: Tensor | None,
    join: str,
    k: int,
    exclude: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    items, scores = np.empty((len(user), k), np.int64), np.empty((len(user), k), np.float32)
    work = index.search(*_arguments(user, intent_scores, join), k, *_csr(exclude), items, scores, **machine())
    return torch.from_numpy(items), torch.from_numpy(scores), work


def count_above(
    index: _C.TopKIndex,
    user: Tensor,
    intent_scores: Tensor | None,
    join: str,
    answers: Tensor,
    exclude: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[int, int]]:
    counts = np.empty((2, len(user)), np.int64)
    arguments = _arguments(user, intent_scores, join)
    work = index.count_above(*arguments, answers.contiguous().numpy(), *_csr(exclude), counts, **machine())
    return torch.from_numpy(counts), work


def _groups(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of items in the order of intents: their borders (n + 1), and the first and last intent of each."""
    small = sizes < SMALLEST
    before = np.cumsum(np.where(small, sizes, 0)) - np.where(small, sizes, 0)
    alone = np.cumsum(~small)  # changes at every large intent
    key = np.stack([before // SMALLEST, alone, small])
    new = np.ones(len(sizes), bool)
    new[1:] = (key[:, 1:] != key[:, :-1]).any(0)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(sizes)) - 1
    borders = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.append(borders[first], borders[-1])
    keep = np.diff(starts) > 0
    return np.append(starts[:-1][keep], starts[-1]), first[keep], last[keep]


def _cut(
    table: Tensor, order: np.ndarray, borders: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts groups of more than LARGEST items, after ordering them (in place) by distance from their mean."""
    for g in np.flatnonzero(np.diff(borders) > LARGEST):
        part = slice(borders[g], borders[g + 1])
        items = torch.from_numpy(order[part])
        mean = sum(table[x].sum(0) for x in items.split(CHUNK)) / len(items)
        distance = torch.cat([(table[x] - mean).norm(dim=1) for x in items.split(CHUNK)])
        order[part] = items[distance.argsort(descending=True)].numpy()
    parts = -(-np.diff(borders) // LARGEST)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    cut = np.repeat(borders[:-1], parts) + number * LARGEST
    return np.append(cut, borders[-1]), np.repeat(first, parts), np.repeat(last, parts)


def _arguments(user: Tensor, intent_scores: Tensor | None, join: str) -> tuple[Any, Any, bool]:
    scores = None if intent_scores is None else intent_scores.contiguous().numpy()
    return user.contiguous().numpy(), scores, join == "log_sigmoid"


def _csr(exclude: tuple[Tensor, Tensor] | None) -> tuple[Any, Any]:
    if exclude is None:
        return None, None
    return exclude[0].long().contiguous().numpy(), exclude[1].int().contiguous().numpy()
