"""`distance_attention`: causal attention with a learned per-head log-theta distance bias on packed sequences (Eq. 5-6)."""

import torch
from torch import Tensor

from cafe_kernels.attention import reference
from cafe_kernels.attention.module import DistanceMaskedAttention

__all__ = ["DistanceMaskedAttention", "distance_attention"]


def distance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor:
    """Causal attention whose weights are softmax_j(scale * q_i . k_j + log_theta[i - j]), per sequence and head.

    Args:
        q, k, v: (total, H, D) packed tokens with `cu_seqlens`, or (B, H, N, D) padded to one length without.
        log_theta: (H, n_max), the bias by distance i - j, n_max at least the longest sequence; None means zero (plain attention).
        cu_seqlens: int32 (B + 1), where each sequence begins; from 0 to total. Sequences may be empty.
        max_seqlen: the longest sequence, to spare its computation.
        scale: factor of q . k; default 1 / sqrt(D).
        dropout_p: share of the attention weights dropped, by Philox keyed with (seed, offset).
        seed: needed with dropout; the same seed and offset give the same mask.

    Returns:
        A tensor of q's shape and dtype.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit each other.

    Source: CAFE, Eq. 5-6; the cancelled terms are derived in docs/method.md.

    Example:
        >>> q = k = v = torch.randn(5, 2, 16)
        >>> log_theta = torch.zeros(2, 50)
        >>> distance_attention(q, k, v, log_theta, torch.tensor([0, 2, 5], dtype=torch.int32)).shape
        torch.Size([5, 2, 16])
    """
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            "q, k and v must agree in shape, dtype and device, got "
            + ", ".join(f"{n} {tuple(t.shape)} {t.dtype} on {t.device}" for n, t in (("q", q), ("k", k), ("v", v)))
        )
    if cu_seqlens is None:
        if q.dim() != 4:
            raise ValueError(
                f"without cu_seqlens q must be (B, H, N, D), got {tuple(q.shape)}; packed tokens need cu_seqlens"
            )
        batch, _, length, _ = q.shape
        packed_q, packed_k, packed_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        out = distance_attention(
            packed_q,
            packed_k,
            packed_v,
            log_theta,
            cu_seqlens,
            max_seqlen=length,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            offset=offset,
        )
        return out.unflatten(0, (batch, length)).transpose(1, 2)

    if q.dim() != 3:
        raise ValueError(f"with cu_seqlens q must be (total, H, D), got {tuple(q.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be int32 (B + 1), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(q) or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0 to the {len(q)} tokens of q, got {cu_seqlens.tolist()[:8]}...")
    longest = int(lengths.max()) if len(lengths) else 0
    if max_seqlen is None:
        max_seqlen = longest
    elif max_seqlen < longest:
        raise ValueError(f"max_seqlen={max_seqlen} but a sequence has {longest} tokens")
    if log_theta is not None:
        if log_theta.dim() != 2 or log_theta.shape[0] != q.shape[1]:
            raise ValueError(f"log_theta must be (H={q.shape[1]}, n_max), got {tuple(log_theta.shape)}")
        if log_theta.shape[1] < longest:
            raise ValueError(
                f"a sequence has {longest} tokens but log_theta covers distances below {log_theta.shape[1]}"
            )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p and seed is None:
        raise ValueError("dropout needs a seed: the same (seed, offset) draws the same mask on every backend")
    if len(q) == 0:
        return torch.zeros_like(v)
    return reference.distance_attention(
        q,
        k,
        v,
        log_theta,
        cu_seqlens,
        max_seqlen,
        q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p,
        seed or 0,
        offset,
    )
