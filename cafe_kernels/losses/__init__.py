"""Losses over one positive and a few sampled negatives a token, in place of the whole catalog.

    sampled_bce      -log sigma(s+) - sum_k log(1 - sigma(s_k))                         (Eq. 9)
    sampled_softmax  -log( e^(s+ - log q+) / (e^(s+ - log q+) + sum_k e^(s_k - log(K q_k))) )   (log-Q correction, Bengio & Senecal 2008)

s+ = h . E[positive], s_k = h . E[negative k]. Each loss takes the logits, so that the caller chooses how they are made.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["sampled_bce", "sampled_softmax"]


def sampled_bce(positive_logits: Tensor, negative_logits: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Mean over tokens of Eq. 9. positive_logits (T,), negative_logits (T, K), ignore bool (T, K): negatives to leave out."""
    negative = softplus(negative_logits)
    if ignore is not None:
        negative = negative.masked_fill(ignore, 0.0)
    return (softplus(-positive_logits) + negative.sum(-1)).mean()


def sampled_softmax(positive_logits: Tensor, negative_logits: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Mean over tokens of the cross entropy of the positive among itself and the negatives (logits already corrected)."""
    if ignore is not None:
        negative_logits = negative_logits.masked_fill(ignore, float("-inf"))
    logits = torch.cat([positive_logits[:, None], negative_logits], -1)
    return (logits.logsumexp(-1) - positive_logits).mean()
