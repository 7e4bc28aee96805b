"""Distance-mask attention in plain PyTorch: the truth that the fast backends are tested against.

    out_i = sum_j softmax_j(scale * q_i . k_j + log_theta[i - j]) v_j        over 0 <= i - j <= window

or, not causal, over |i - j| <= window, with a column of log_theta for each distance -(n_max - 1) ... n_max - 1. Attention with a
Toeplitz bias per head. Eq. 5-6 of CAFE reduce to it exactly: softmax over j is blind to what does
not depend on j, so Q_i . W_L and b_L cancel, K_j . W_L joins the query, and D . W_L is a function of i - j alone.
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 10


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words; four tensors in, four out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask = 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        # (a * b) of two 32-bit words overflows int64, so the high word comes from 16-bit halves.
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_keep(token: Tensor, heads: int, keys: int, p: float, seed: int, offset: int) -> Tensor:
    """Which attention weights dropout keeps: bool (len(token), heads, keys), the same on every backend.

    The weight of query token i (its row in the packed batch), head h and key j (position in its sequence) is kept when
    word j % 4 of philox(counter=(h * 2^16 + j // 4, i, offset), key=seed) is at least p * 2^32.
    """
    device = token.device
    blocks = torch.arange((keys + 3) // 4, device=device)
    c0 = (torch.arange(heads, device=device)[:, None] * 65536 + blocks).expand(len(token), -1, -1)
    c1 = token.long()[:, None, None].expand_as(c0)
    c2, c3 = torch.full_like(c0, offset & 0xFFFFFFFF), torch.full_like(c0, offset >> 32)
    words = torch.stack(philox([c0, c1, c2, c3], (seed & 0xFFFFFFFF, seed >> 32)), dim=-1)
    return words.flatten(2)[..., :keys] >= min(round(p * 2**32), 2**32 - 1)


def distance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """q, k, v (total, H, D); log_theta (H, n_max), not causal (H, 2 n_max - 1), or None; returns (total, H, D). Any float dtype, fp64 included."""
    weights = attention_weights(q, k, log_theta, cu_seqlens, max_seqlen, scale, causal, window, dropout_p, seed, offset)
    slot = _slots(cu_seqlens, len(q), max_seqlen)
    return (weights @ _pad(v, slot, len(weights), max_seqlen)).transpose(1, 2).flatten(0, 1)[slot]


def attention_weights(
    q: Tensor,
    k: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """What distance_attention multiplies v by, dropout included: (B, H, n, n), n = max_seqlen, each sequence from row 0 on.
    Rows beyond a sequence's end hold anything."""
    total, heads, _ = q.shape
    batch, slot = len(cu_seqlens) - 1, _slots(cu_seqlens, total, max_seqlen)
    position = torch.arange(max_seqlen, device=q.device)
    distance = position[:, None] - position
    logits = _pad(q, slot, batch, max_seqlen) @ _pad(k, slot, batch, max_seqlen).transpose(-1, -2) * scale
    if log_theta is not None:
        last = log_theta.shape[1] - 1
        column = distance + (0 if causal else last // 2)
        logits = logits + log_theta[:, column.clamp(0, last)].to(logits.dtype)
    hidden = distance.abs() > (max_seqlen if window is None else window)
    if causal:
        hidden = hidden | (distance < 0)
    else:  # what is after the end, too; the rows there see all, lest a NaN of theirs gets into a gradient
        token = position < cu_seqlens.diff()[:, None]
        hidden = ((hidden | ~token[:, None]) & token[:, :, None])[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    if dropout_p:
        keep = dropout_keep(torch.arange(total, device=q.device), heads, max_seqlen, dropout_p, seed, offset)
        weights = weights * _pad(keep.to(weights.dtype), slot, batch, max_seqlen) / (1 - dropout_p)
    return weights


def _slots(cu_seqlens: Tensor, total: int, max_seqlen: int) -> Tensor:
    """Where each token is in (B, n) rows padded at their end, as one number."""
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    return sequence * max_seqlen + torch.arange(total, device=lengths.device) - cu_seqlens.long()[sequence]


def _pad(x: Tensor, slot: Tensor, batch: int, n: int) -> Tensor:  # (total, H, D) -> (B, H, n, D)
    padded = x.new_zeros(batch * n, *x.shape[1:]).index_copy(0, slot, x)
    return padded.unflatten(0, (batch, n)).transpose(1, 2)
