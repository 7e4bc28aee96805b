"""Sampled losses in plain PyTorch: the truth that the fast backends are tested against. Any float dtype, float64 included.

With s = h_t . E[positive] - log q and s_k = h_t . E[negative k] - log q_k, token t has the loss

    softmax   log(e^s + sum_k e^s_k) - s                 (log-Q correction: Bengio & Senecal 2008; the q of bce are 1)
    bce       a softplus(-s) + b sum_k softplus(s_k)     (Eq. 9: a = b = 1; gBCE: see cafe_kernels.losses.gbce)

E[v] = table[v], or table[v] + intents[item_intent[v]]. A negative that equals the positive, or is ignored, counts for nothing.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, softplus


def sampled_loss(
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
    kind: str,
    positive_weight: float,
    negative_weight: float,
    sparse_grad: bool,
) -> Tensor:
    """The loss of each token, (T,). The arguments are those of cafe_kernels.losses, checked; kind is "softmax" or "bce"."""
    dtype = torch.promote_types(h.dtype, table.dtype)
    h = h.to(dtype)
    distinct, place = torch.unique(torch.cat([positives, negatives.flatten()]), return_inverse=True)
    rows = embedding(distinct, table, sparse=sparse_grad).to(dtype)
    if intents is not None and item_intent is not None:
        rows = rows + embedding(item_intent[distinct], intents).to(dtype)
    positive = (h * rows[place[: len(h)]]).sum(-1)
    negative_rows, ids, log_q = rows[place[len(h) :]].unflatten(0, negatives.shape), negatives, negative_log_q
    if negatives.dim() == 1:
        negative = h @ negative_rows.T
    else:
        if sequence is not None:
            negative_rows, ids = negative_rows[sequence], ids[sequence]
            log_q = None if log_q is None else log_q[sequence]
        negative = (negative_rows @ h.unsqueeze(-1)).squeeze(-1)
    if positive_log_q is not None and log_q is not None:
        positive, negative = positive - positive_log_q, negative - log_q
    hidden = ids == positives[:, None]
    if ignore is not None:
        hidden = hidden | (ignore if sequence is None else ignore[sequence])
    negative = negative.masked_fill(hidden, float("-inf"))
    if kind == "softmax":
        first = torch.zeros_like(positives)
        return cross_entropy(torch.cat([positive[:, None], negative], 1), first, reduction="none")
    return positive_weight * softplus(-positive) + negative_weight * softplus(negative).sum(1)
