"""Brute-force joint top-k in plain PyTorch: what a score is, and which items are the best.

    score(v) = fl32(intent_scores[intent(v)] + g(user . E_v)),   g(x) = x ("identity") or log sigma(x) ("log_sigmoid", Eq. 10)

All but the last rounding is in float64, and the dot product has one order: the product of entries i goes into sum i mod 8, and
the eight sums are folded in halves. (A product of two float32 is exact in float64, so fused multiply-adds change nothing.) Equal
float32 scores are ordered by item id, smaller first. Two implementations can differ only through their float64 logarithm, where
its last bit decides a rounding to float32: one score in some 10^8, by one unit in the last place.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

JOINS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "log_sigmoid": logsigmoid}
BYTES = 64 << 20


def scores(user: Tensor, table: Tensor, item_intent: Tensor, intent_scores: Tensor | None, join: str) -> Tensor:
    """All scores: user (B, d), table (V, d), item_intent int64 (V,), intent_scores (B, C) or None; returns (B, V) float32."""
    out = torch.empty(len(user), len(table), dtype=torch.float32, device=user.device)
    user, table = (pad(x.double(), (0, -x.shape[1] % 8)) for x in (user, table))
    rows = max(1, BYTES // (64 * max(1, len(table))))
    for start in range(0, len(user), rows):
        batch = slice(start, start + rows)
        sums = user.new_zeros(len(user[batch]), len(table), 8)
        for i in range(0, user.shape[1], 8):
            sums += user[batch, None, i : i + 8] * table[None, :, i : i + 8]
        for half in (4, 2, 1):
            sums = sums[..., :half] + sums[..., half : 2 * half]
        joint = JOINS[join](sums[..., 0])
        if intent_scores is not None:
            joint = joint + intent_scores[batch].double()[:, item_intent]
        out[batch] = joint.float()
    return out


def exclusion_pairs(exclude: tuple[Tensor, Tensor] | None, users: int) -> tuple[Tensor, Tensor]:
    """The CSR (indptr, indices) as users and items, int64 on the CPU."""
    if exclude is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    indptr, indices = (x.cpu().long() for x in exclude)
    return torch.repeat_interleave(torch.arange(users), indptr.diff()), indices


def exclusion(exclude: tuple[Tensor, Tensor] | None, users: int, items: int) -> Tensor:
    """The same as a mask, bool (users, items)."""
    mask = torch.zeros(users, items, dtype=torch.bool)
    mask[exclusion_pairs(exclude, users)] = True
    return mask


def search(
    user: Tensor,
    table: Tensor,
    item_intent: Tensor,
    intent_scores: Tensor | None,
    join: str,
    k: int,
    exclude: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Items int64 (B, k), best first, and their scores float32 (B, k); -1 and -inf where there are no more."""
    values = scores(user, table, item_intent, intent_scores, join)
    values[exclusion(exclude, len(user), len(table)).to(values.device)] = -torch.inf
    best, items = values.sort(dim=1, descending=True, stable=True)
    best, items = (pad(x[:, :k], (0, max(0, k - len(table)))) for x in (best, items))
    none = (best == -torch.inf) | (torch.arange(k, device=best.device) >= len(table))
    return items.masked_fill(none, -1), best.masked_fill(none, -torch.inf)


def count_above(
    user: Tensor,
    table: Tensor,
    item_intent: Tensor,
    intent_scores: Tensor | None,
    join: str,
    answers: Tensor,
    exclude: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """How many items that are not excluded score above each user's answer, and how many others exactly like it: int64 (2, B)."""
    values = scores(user, table, item_intent, intent_scores, join)
    own = values.gather(1, answers[:, None])
    counts = ~exclusion(exclude, len(user), len(table)).to(values.device)
    counts.scatter_(1, answers[:, None], False)
    return torch.stack([((values > own) & counts).sum(1), ((values == own) & counts).sum(1)])
