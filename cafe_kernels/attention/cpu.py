"""The C++ backend of distance_attention (csrc/attention.cpp): float32 and bfloat16 on the CPU.

It uses up to torch.get_num_threads() threads, fewer for little work; the numbers do not depend on how many.
The environment variable CAFE_KERNELS_ISA (auto, portable, avx2 or avx512) forces a code path.
"""

from typing import Any

import torch
from torch import Tensor

from cafe_kernels import _C
from cafe_kernels.backends import array, machine


def unavailable(q: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"it runs on the CPU, q is on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, got {q.dtype}; use backend='reference'"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *options: Any,  # scale, causal, window, dropout_p, seed, offset
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    arrays = [array(x) for x in (q, k, v, log_theta, cu_seqlens, out, lse)]
    _C.attention_forward(*arrays, *options, **machine())
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    *options: Any,  # as above
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    dlog_theta = None if log_theta is None else torch.empty_like(log_theta)
    arrays = [array(x) for x in (grad_out, q, k, v, log_theta, cu_seqlens, out, lse, dq, dk, dv, dlog_theta)]
    _C.attention_backward(*arrays, *options, **machine())
    return dq, dk, dv, dlog_theta
