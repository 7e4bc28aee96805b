"""The C++ backend of exact top-k (csrc/topk.cpp): the index that it searches, and its calls.

It uses torch.get_num_threads() threads. CAFE_KERNELS_ISA (auto, portable, avx2 or avx512) forces a code path.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cafe_kernels import _C

BLOCK = 16  # items side by side, as kBlock of csrc/topk.cpp
SMALLEST, LARGEST = 64, 4096  # items of a group: smaller intents share one, larger ones are cut
CHUNK = 1 << 14  # slots that building looks at together


def unavailable(table: Tensor) -> str | None:
    return None if table.device.type == "cpu" else f"it runs on the CPU, the table is on {table.device}"


def build(table: Tensor, item_intent: Tensor, num_intents: int) -> _C.TopKIndex:
    """The index of a table (V, d) float32 whose item v has intent item_intent[v], int64 (V,)."""
    intent = item_intent.numpy()
    order = np.argsort(intent, kind="stable")
    starts, first, last = _groups(np.bincount(intent, minlength=num_intents))
    order = _by_distance(table, order, starts)
    starts, first, last = _cut(starts, first, last)
    order = _by_distance(table, order, starts)  # the parts of an intent have centroids of their own
    size = np.diff(starts)
    blocks = -(-size // BLOCK)
    start = np.concatenate([[0], np.cumsum(blocks)])
    slot_item = np.full(start[-1] * BLOCK, -1, np.int32)
    group_of = np.repeat(np.arange(len(size)), size)
    slot_item[np.arange(len(order)) + (start[:-1] * BLOCK - starts[:-1])[group_of]] = order
    centroids = _centroids(table, order, starts)
    codes, scale, distance, error = _encode(table, slot_item, np.repeat(np.arange(len(size)), blocks * BLOCK), centroids)
    panels = -(-len(size) // BLOCK)
    packed = torch.zeros(panels * BLOCK, table.shape[1])
    packed[: len(size)] = centroids
    return _C.TopKIndex(
        table.numpy(),
        intent.astype(np.int32),
        num_intents,
        start.astype(np.int32),
        size.astype(np.int32),
        first.astype(np.int32),
        last.astype(np.int32),
        packed.view(panels, BLOCK, -1).transpose(1, 2).contiguous().numpy(),
        centroids.double().norm(dim=1).mul(1 + 1e-10).numpy(),
        _descending(distance, start),
        _descending(error, start),
        scale,
        slot_item,
        codes,
    )


def search(
    index: _C.TopKIndex,
    user: Tensor,
    intent_scores: Tensor | None,
    join: str,
    k: int,
    exclude: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    items, scores = np.empty((len(user), k), np.int64), np.empty((len(user), k), np.float32)
    work = index.search(*_arguments(user, intent_scores, join), k, *_csr(exclude), items, scores, **_machine())
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
    work = index.count_above(*arguments, answers.contiguous().numpy(), *_csr(exclude), counts, **_machine())
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


def _cut(starts: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts groups of more than LARGEST items."""
    parts = -(-np.diff(starts) // LARGEST)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    cut = np.repeat(starts[:-1], parts) + number * LARGEST
    return np.append(cut, starts[-1]), np.repeat(first, parts), np.repeat(last, parts)


def _centroids(table: Tensor, order: np.ndarray, starts: np.ndarray) -> Tensor:
    """The mean row of each group, (n, d) float32."""
    group = torch.from_numpy(np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
    sums = torch.zeros(len(starts) - 1, table.shape[1], dtype=torch.float64)
    for chunk in torch.from_numpy(order).split(CHUNK):
        sums.index_add_(0, group[: len(chunk)], table[chunk].double())
        group = group[len(chunk) :]
    return (sums / torch.from_numpy(np.diff(starts))[:, None]).float()


def _by_distance(table: Tensor, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The items of each group, the farthest from its centroid first."""
    centroids = _centroids(table, order, starts)
    group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    distance = np.empty(len(order), np.float32)
    for at in range(0, len(order), CHUNK):
        part = slice(at, at + CHUNK)
        rows = table[torch.from_numpy(order[part])] - centroids[torch.from_numpy(group[part])]
        distance[part] = rows.norm(dim=1).numpy()
    return order[np.lexsort((-distance, group))]


def _encode(
    table: Tensor, slot_item: np.ndarray, group: np.ndarray, centroids: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes of each slot's difference from its centroid, packed for the kernel, with scale, |difference| and the codes' |error|."""
    dim, quads = table.shape[1], -(-table.shape[1] // 4)
    codes = np.full((len(slot_item) // BLOCK, quads, BLOCK, 4), 128, np.uint8)
    scale, distance, error = (np.zeros(len(slot_item), t) for t in (np.float32, np.float64, np.float64))
    for at in range(0, len(slot_item), CHUNK):
        part = slice(at, at + CHUNK)
        items = torch.from_numpy(slot_item[part]).long()
        rows = table[items.clamp(min=0)].double() - centroids[torch.from_numpy(group[part])].double()
        rows[items < 0] = 0
        unit = (rows.abs().amax(1) / 127).float()
        steps = (rows / unit.double().clamp(min=torch.finfo(torch.float64).tiny)[:, None]).round().clamp(-127, 127)
        rest = rows - unit.double()[:, None] * steps
        scale[part], distance[part], error[part] = unit.numpy(), rows.norm(dim=1).numpy(), rest.norm(dim=1).numpy()
        padded = torch.full((len(items), quads * 4), 128, dtype=torch.uint8)
        padded[:, :dim] = (steps + 128).to(torch.uint8)
        codes[at // BLOCK : (at + CHUNK) // BLOCK] = padded.view(-1, BLOCK, quads, 4).transpose(1, 2).numpy()
    return codes, scale, distance, error


def _descending(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """For each block the largest of the slots' `values` in it and the later blocks of its group, rounded up."""
    largest = values.reshape(-1, BLOCK).max(1) if len(values) else np.zeros(0)
    for g in range(len(start) - 1):
        part = slice(start[g], start[g + 1])
        largest[part] = np.maximum.accumulate(largest[part][::-1])[::-1]
    return largest * (1 + 1e-10)


def _arguments(user: Tensor, intent_scores: Tensor | None, join: str) -> tuple[Any, Any, bool]:
    scores = None if intent_scores is None else intent_scores.contiguous().numpy()
    return user.contiguous().numpy(), scores, join == "log_sigmoid"


def _csr(exclude: tuple[Tensor, Tensor] | None) -> tuple[Any, Any]:
    if exclude is None:
        return None, None
    return exclude[0].long().contiguous().numpy(), exclude[1].int().contiguous().numpy()


def _machine() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "isa": os.environ.get("CAFE_KERNELS_ISA", "auto")}
