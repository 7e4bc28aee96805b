"""The C++ backend of the sampled losses (csrc/losses.cpp): float32 and bfloat16 tables on the CPU.

It uses up to torch.get_num_threads() threads, fewer for little work; the numbers do not depend on how many.
The environment variable CAFE_KERNELS_ISA (auto, portable, avx2 or avx512) forces a code path.
"""

import torch
from torch import Tensor

from cafe_kernels import _C
from cafe_kernels.backends import array, machine
from cafe_kernels.losses.ops import parts_of


def unavailable(h: Tensor, table: Tensor) -> str | None:
    if h.device.type != "cpu":
        return f"it runs on the CPU, h is on {h.device}"
    if table.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes tables of float32 and bfloat16, got {table.dtype}; use backend='reference'"
    if h.dtype == torch.float64:
        return "it computes in float32, h is float64; use backend='reference'"
    return None


def forward(
    h: Tensor,
    table: Tensor,
    intents: Tensor | None,
    item_intent: Tensor | None,
    positives: Tensor,
    negatives: Tensor,
    sequence: Tensor | None,
    ignore: Tensor | None,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    weights: Tensor | None,
    kind: str,
    positive_weight: float,
    negative_weight: float,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    losses = h.new_empty(len(h))
    dh, coefficients, negative_rows = gradients or (None, None, None)
    given = {
        "h": h, "table": table, "intents": intents, "item_intent": item_intent, "positives": positives,
        "negatives": negatives, "sequence": sequence, "ignore": ignore, "positive_log_q": positive_log_q,
        "negative_log_q": negative_log_q, "weights": weights, "losses": losses, "dh": dh, "coefficients": coefficients,
        "negative_rows": negative_rows,
    }  # fmt: skip
    total = _C.sampled_loss(
        **{name: array(x) for name, x in given.items()},
        softmax=kind == "softmax",
        positive_weight=positive_weight,
        negative_weight=negative_weight,
        parts=parts_of(h, negatives, sequence),
        **machine(),
    )
    return losses, h.new_tensor(total)


def table_gradient(
    scale: Tensor,
    h: Tensor,
    shape: torch.Size,
    ids: Tensor,
    coefficients: Tensor,
    negative_rows: Tensor,
    dense: bool,
    item_intent: Tensor | None,
    intents_shape: torch.Size | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    factor = scale.item()
    if dense and intents_shape is None:
        return ids[:0], _sum(ids, shape[0], h, coefficients, negative_rows, factor, dense=True)[1], None
    distinct, rows = _sum(ids, shape[0], h, coefficients, negative_rows, factor, dense=False)
    dintents = None
    if item_intent is not None and intents_shape is not None:
        none, groups = h[:0], item_intent[distinct]
        dintents = _sum(groups, intents_shape[0], none, coefficients[:0], rows, 1.0, dense=True)[1]
    if dense:
        return ids[:0], rows.new_zeros(shape).index_copy_(0, distinct, rows), dintents
    return distinct, rows, dintents


def _sum(
    ids: Tensor, limit: int, h: Tensor, coefficients: Tensor, rows: Tensor, scale: float, dense: bool
) -> tuple[Tensor, Tensor]:
    """The distinct ids and their rows' sums, or (dense) a row for each of `limit`."""
    order, distinct = torch.empty_like(ids, dtype=torch.int32), torch.empty_like(ids)
    starts = ids.new_empty(len(ids) + 1)
    count = _C.sort_ids(array(ids), limit, array(order), array(distinct), array(starts))
    out = h.new_zeros(limit, h.shape[1]) if dense else h.new_empty(count, h.shape[1])
    given = {"h": h, "coefficients": coefficients, "rows": rows, "out": out, "targets": distinct if dense else None}
    arrays = {name: array(x) for name, x in given.items()}
    _C.sum_segments(array(order), array(starts), count, scale=scale, **arrays, **machine())
    return distinct[:count], out
