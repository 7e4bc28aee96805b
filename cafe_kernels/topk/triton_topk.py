"""The Triton backend of exact top-k: the best score of every block of items, then the few blocks that matter exactly.

1. `_block_best` scores tiles of users and items in float32 and keeps each block's best score: (B, V / ITEMS), nothing larger.
2. Of k + e blocks with the largest best score (e: items excluded for the user) at least k hold an item that may be returned, so the
   k-th best score is at least the least of these best scores less their error, and no block whose best is below that by more than
   the error again can hold one of the k. The error is bounded as in csrc/topk.cpp.
3. `_exact` scores the blocks that are left as reference.py defines it, in float64; what follows is the reference's.

Without atomics, so the numbers do not depend on scheduling, and the answer is that of the other backends to the bit. It runs in
Triton's interpreter on the CPU where TRITON_INTERPRET=1 was set before triton was imported, slowly and only to be tested.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.launched import launched
from cafe_kernels.topk.reference import JOINS, exclusion_pairs

ITEMS, USERS, STEP = 128, 32, 32  # of a tile, and entries of a row that are multiplied at once
LAUNCH = {"num_warps": 4, "num_stages": 2}
BYTES = 256 << 20  # for exact scores and for block bests


@launched(i32="users items intents blocks")
def _block_best(  # type: ignore[no-untyped-def]
    user, table, item_intent, intent_scores, best, users, items, intents, blocks,
    DIM: tl.constexpr, HAS_INTENTS: tl.constexpr, SIGMOID: tl.constexpr,
    USERS: tl.constexpr, ITEMS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    u = tl.program_id(1) * USERS + tl.arange(0, USERS)
    v = block * ITEMS + tl.arange(0, ITEMS)
    score = tl.zeros((USERS, ITEMS), tl.float32)
    for start in range(0, DIM, STEP):
        i = start + tl.arange(0, STEP)
        left = tl.load(user + u[:, None] * DIM + i[None, :], (u < users)[:, None] & (i < DIM)[None, :], 0.0)
        right = tl.load(
            table + v.to(tl.int64)[None, :] * DIM + i[:, None], (v < items)[None, :] & (i < DIM)[:, None], 0.0
        )
        score = tl.dot(left, right, score, input_precision="ieee")
    if SIGMOID:
        score = tl.minimum(score, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(score)))
    if HAS_INTENTS:
        intent = tl.load(item_intent + v, v < items, 0)
        at = intent_scores + u.to(tl.int64)[:, None] * intents + intent[None, :]
        score += tl.load(at, (u < users)[:, None] & (v < items)[None, :], 0.0)
    score = tl.where((v < items)[None, :], score, float("-inf"))
    tl.store(best + u.to(tl.int64) * blocks + block, tl.max(score, 1), u < users)


@launched(i32="items width")
def _exact(  # type: ignore[no-untyped-def]
    user, table, chosen, dots, items, width, DIM: tl.constexpr, ITEMS: tl.constexpr
):  # fmt: skip
    """dots[u, b] = the dot products in float64 of user u with the items of block chosen[u, b]."""
    u = tl.program_id(1).to(tl.int64)
    place = u * width + tl.program_id(0)
    v = tl.load(chosen + place) * ITEMS + tl.arange(0, ITEMS)
    lane = tl.arange(0, 8)
    sums = tl.zeros((ITEMS, 8), tl.float64)
    for start in range(0, DIM, 8):
        i = start + lane
        left = tl.load(user + u * DIM + i, i < DIM, 0.0).to(tl.float64)
        right = tl.load(table + v[:, None] * DIM + i[None, :], (v < items)[:, None] & (i < DIM)[None, :], 0.0)
        sums += left[None, :] * right.to(tl.float64)
    sums = tl.sum(tl.reshape(sums, (ITEMS, 2, 4)), 1)
    sums = tl.sum(tl.reshape(sums, (ITEMS, 2, 2)), 1)
    tl.store(dots + place * ITEMS + tl.arange(0, ITEMS), tl.sum(sums, 1))


INTERPRETED = not isinstance(_exact, triton.JITFunction)


def unavailable(table: Tensor) -> str | None:
    if table.is_cuda or INTERPRETED:
        return None
    return f"it runs on a GPU, the table is on {table.device}; TRITON_INTERPRET=1 in the environment interprets it there, slowly"


def search(
    user: Tensor,
    table: Tensor,
    item_intent: Tensor,
    intent_scores: Tensor | None,
    join: str,
    k: int,
    exclude: tuple[Tensor, Tensor] | None,
    largest_norm: float,
) -> tuple[Tensor, Tensor]:
    """As reference.search; largest_norm: of a row of the table."""
    items = torch.full((len(user), k), -1, dtype=torch.int64, device=user.device)
    scores = torch.full((len(user), k), -torch.inf, device=user.device)
    rows, columns = exclusion_pairs(exclude, len(user))
    excluded = torch.bincount(rows, minlength=len(user)).to(user.device)
    blocks = -(-len(table) // ITEMS)
    batch = max(1, BYTES // (4 * max(1, blocks)))
    for at in range(0, len(user) if blocks else 0, batch):
        part = slice(at, at + batch)
        mine = None if intent_scores is None else intent_scores[part].contiguous()
        best = _best(user[part].contiguous(), table, item_intent, mine, join)
        norm = user[part].double().norm(dim=1) * largest_norm
        most = 0 if mine is None else mine.abs().amax(1).double()
        error = (table.shape[1] + 8) * 2**-23 * norm + 2**-22 * (norm + most) + 4e-6
        ordered = best.double().sort(dim=1, descending=True).values
        sure = (k - 1 + excluded[part]).clamp(max=blocks)[:, None]  # past the end: all blocks
        low = torch.nn.functional.pad(ordered, (0, 1), value=-torch.inf).gather(1, sure)[:, 0]
        counts = (ordered >= (low - 2 * error)[:, None]).sum(1)
        chosen = best.argsort(dim=1, descending=True, stable=True)
        together = max(1, BYTES // (32 * ITEMS * int(counts.max())))  # users whose exact scores fit
        for first in range(0, len(best), together):
            run = slice(first, min(len(best), first + together))
            everyone = slice(at + run.start, at + run.stop)
            here = (rows >= everyone.start) & (rows < everyone.stop)
            _merge(
                user[everyone].contiguous(), table, item_intent, None if mine is None else mine[run], join,
                chosen[run, : int(counts[run].max())].sort(dim=1).values.contiguous(),
                (rows[here] - everyone.start, columns[here]), items[everyone], scores[everyone],
            )  # fmt: skip
    return items, scores


def _best(user: Tensor, table: Tensor, item_intent: Tensor, intent_scores: Tensor | None, join: str) -> Tensor:
    blocks = -(-len(table) // ITEMS)
    best = user.new_empty(len(user), blocks)
    given = best if intent_scores is None else intent_scores
    _block_best[(blocks, -(-len(user) // USERS))](
        user, table, item_intent, given, best, len(user), len(table), given.shape[1], blocks,
        DIM=table.shape[1], HAS_INTENTS=intent_scores is not None, SIGMOID=join == "log_sigmoid",
        USERS=USERS, ITEMS=ITEMS, STEP=STEP, **LAUNCH,
    )  # fmt: skip
    return best


def _merge(
    user: Tensor, table: Tensor, item_intent: Tensor, intent_scores: Tensor | None, join: str, chosen: Tensor,
    excluded: tuple[Tensor, Tensor], items: Tensor, scores: Tensor,
) -> None:  # fmt: skip
    """Fills the k best of the chosen blocks, (B, n) ascending."""
    dots = torch.empty(*chosen.shape, ITEMS, dtype=torch.float64, device=user.device)
    _exact[chosen.shape[1], len(user)](
        user, table, chosen, dots, len(table), chosen.shape[1], DIM=table.shape[1], ITEMS=ITEMS, **LAUNCH
    )
    ids = (chosen[:, :, None] * ITEMS + torch.arange(ITEMS, device=user.device)).flatten(1)
    joint = JOINS[join](dots.flatten(1))
    if intent_scores is not None:
        joint = joint + intent_scores.gather(1, item_intent[ids.clamp(max=len(table) - 1)]).double()
    values = joint.float()
    rows, columns = (x.to(user.device) for x in excluded)
    taken = rows * len(table) + columns
    own = torch.arange(len(user), device=user.device)[:, None] * len(table) + ids
    values[(ids >= len(table)) | torch.isin(own, taken)] = -torch.inf
    best, where = values.sort(dim=1, descending=True, stable=True)
    n = min(items.shape[1], best.shape[1])
    scores[:, :n] = best[:, :n]
    items[:, :n] = ids.gather(1, where[:, :n]).masked_fill(best[:, :n] == -torch.inf, -1)


def compile_cases() -> list[dict[str, Any]]:
    """What triton.compile needs to know of each kernel, for compilation without a GPU."""
    types = {"user": "*fp32", "table": "*fp32", "item_intent": "*i64", "intent_scores": "*fp32", "best": "*fp32",
             "chosen": "*i64", "dots": "*fp64"}  # fmt: skip
    tile = {"USERS": USERS, "ITEMS": ITEMS, "STEP": STEP}
    cases = [
        ("topk_block_best", _block_best, {"DIM": dim, "HAS_INTENTS": joint, "SIGMOID": joint, **tile})
        for dim in (64, 128)
        for joint in (False, True)
    ] + [("topk_exact", _exact, {"DIM": dim, "ITEMS": ITEMS}) for dim in (64, 128)]
    return [
        {
            "name": f"{name} d{constants['DIM']}" + (" joint" if constants.get("HAS_INTENTS") else ""),
            "kernel": kernel,
            "signature": {x: "constexpr" if x in constants else types.get(x, "i32") for x in kernel.arg_names},
            "constexprs": constants,
            "dtype": "fp32",
            **LAUNCH,
        }
        for name, kernel, constants in cases
    ]
