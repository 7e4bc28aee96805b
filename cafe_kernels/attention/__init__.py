"""`distance_attention`: attention with a learned per-head log-theta distance bias on packed sequences (Eq. 5-6)."""

import numpy as np
import torch
from torch import Tensor

from cafe_kernels.attention import ops, reference
from cafe_kernels.attention.module import DistanceMaskedAttention
from cafe_kernels.backends import choose_backend

__all__ = ["DistanceMaskedAttention", "distance_attention"]

INTEGERS = (int, torch.SymInt, np.integer)
NUMBERS = (*INTEGERS, float, torch.SymFloat, np.floating)


def distance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attention whose weights are softmax_j(scale * q_i . k_j + log_theta[i - j]), per sequence and head.

    Args:
        q, k, v: (total, H, D) packed tokens with `cu_seqlens`, or (B, H, N, D) padded to one length without.
        log_theta: (H, n_max) float32 (or q's dtype), the bias by distance i - j, n_max at least the longest sequence; without
            `causal` (H, 2 n_max - 1), with distance 0 in the middle, column n_max - 1, and the past to the right of it.
            None means zero (plain attention). -inf hides a distance; float32 sums carry an error of 6e-8 times its size.
        cu_seqlens: int32 (B + 1), where each sequence begins; from 0 to total. Sequences may be empty.
        max_seqlen: the longest sequence, to spare its computation. On a GPU, where looking at values waits for all work before
            them, cu_seqlens is checked only without it; in a compiled reference, which cannot look at values, too.
        scale: factor of q . k; default 1 / sqrt(D).
        causal: each token sees itself and what is before it; False: all tokens of its sequence.
        window: each token sees itself and at most so many tokens before it; without `causal` those with |i - j| < window, so
            itself alone for 1. None means all.
        dropout_p: share of the attention weights dropped, by Philox keyed with (seed, offset).
        seed: needed with dropout; the same seed and offset give the same mask on every backend.
        backend: "reference" (PyTorch, any dtype), "cpu" (C++), "triton" (sequences to 8,192 tokens, D to 256; a NaN may spread to
            sequences beside its own); None chooses. Second derivatives need "reference"; of
            torch.func's transforms grad and jvp are not supported.

    Returns:
        A tensor of q's shape and dtype.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit each other, options of another type.

    Source: CAFE, Eq. 5-6; the cancelled terms are derived in docs/method.md.

    Example:
        >>> q = k = v = torch.randn(5, 2, 16)
        >>> log_theta = torch.zeros(2, 50)
        >>> distance_attention(q, k, v, log_theta, torch.tensor([0, 2, 5], dtype=torch.int32)).shape
        torch.Size([5, 2, 16])
    """
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
        device
    ):  # as PyTorch's attention, which leaves float64 alone
        low = torch.get_autocast_dtype(device)
        q, k, v = (x.to(low) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q, k and v must agree in shape, dtype and device, got q {tuple(q.shape)} {q.dtype} on {q.device}, "
            f"k {tuple(k.shape)} {k.dtype} on {k.device}, v {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    for name, value in (("max_seqlen", max_seqlen), ("window", window), ("seed", seed), ("offset", offset)):
        if value is not None and not isinstance(value, INTEGERS):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if scale is not None and not isinstance(scale, NUMBERS):
        raise ValueError(f"scale must be a number, got {scale!r}; one that is learned belongs into q")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r}")
    if not q.is_floating_point():
        raise ValueError(f"q, k and v must be floating point, got {q.dtype}")
    if cu_seqlens is None:
        if q.dim() != 4:
            raise ValueError(
                f"without cu_seqlens q must be (B, H, N, D), got {tuple(q.shape)}; packed tokens need cu_seqlens"
            )
        batch, _, length, _ = q.shape
        if max_seqlen is not None and max_seqlen != length:
            raise ValueError(f"max_seqlen={max_seqlen} but without cu_seqlens all sequences have {length} tokens")
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        out = distance_attention(
            q, k, v, log_theta, cu_seqlens, max_seqlen=length, scale=scale, causal=causal, window=window,
            dropout_p=dropout_p, seed=seed, offset=offset, backend=backend,
        )  # fmt: skip
        return out.unflatten(0, (batch, length)).transpose(1, 2)

    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"with cu_seqlens q must be (total, H >= 1, D >= 1), got {tuple(q.shape)}")
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be an int32 tensor (B + 1), got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be int32 (B + 1) on {q.device}, "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
    if log_theta is not None:
        if log_theta.dim() != 2 or log_theta.shape[0] != q.shape[1] or not log_theta.is_floating_point():
            raise ValueError(
                f"log_theta must be (H={q.shape[1]}, {'n_max' if causal else '2 n_max - 1'}) of floats, "
                f"got {log_theta.dtype} {tuple(log_theta.shape)}"
            )
        if not causal and log_theta.shape[1] % 2 == 0:
            raise ValueError(
                f"causal=False needs a log_theta of 2 n_max - 1 columns, distance 0 in the middle, got {log_theta.shape[1]}: "
                "a table of n_max columns is for causal=True"
            )
        if log_theta.device != q.device:
            raise ValueError(f"log_theta is on {log_theta.device}, q on {q.device}")
        if max_seqlen is not None and ops.covered(log_theta, causal) < max_seqlen:
            raise ValueError(f"max_seqlen={max_seqlen} but {ops.too_short(log_theta, causal)}")
    if window is not None and window < (not causal):
        least = "must not be negative" if causal else "must be at least 1 without causal, a token itself"
        raise ValueError(f"window {least}, got {window}; None sees all")
    if window is not None and not causal:
        window -= 1  # from here on the largest distance that is seen
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p and seed is None:
        raise ValueError("dropout needs a seed: the same (seed, offset) draws the same mask on every backend")
    seed = seed or 0
    if not (0 <= seed < 2**63 and 0 <= offset < 2**63):
        raise ValueError(f"seed and offset must be in [0, 2^63), got {seed} and {offset}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend(backend, ops.backend_module, q)
    if chosen == "reference" and not q.is_meta:  # of a tensor without values the operator knows the shape
        longest = ops.longest_to_pad_to(cu_seqlens, len(q), max_seqlen or 0, log_theta, causal)
        return reference.distance_attention(
            q, k, v, log_theta, cu_seqlens, longest, scale, causal, window, dropout_p, seed, offset
        )
    out, _ = ops.distance_attention(
        q, k, v, None if log_theta is None else log_theta.float(), cu_seqlens, max_seqlen or 0,
        scale, causal, -1 if window is None else window, dropout_p, seed, offset, chosen,
    )  # fmt: skip
    return out
