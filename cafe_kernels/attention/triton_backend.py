"""The Triton backend of distance_attention: NVIDIA and AMD GPUs, by triton_short.py up to 64 tokens and by triton_long.py beyond.

On the CPU it runs in Triton's interpreter, slowly and only to be tested: when TRITON_INTERPRET=1 is set before triton is imported.
"""

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cafe_kernels.backends import missing

MISSING, INTERPRETED = "", False
try:
    from cafe_kernels.attention import triton_common, triton_long, triton_short

    INTERPRETED = bool(triton_common.INTERPRETED)
except ImportError as error:  # triton is too old, or has no wheels for the platform
    MISSING = missing(error)

HEAD_DIM, LONGEST = 256, 8192  # the largest head width and the longest sequence


def unavailable(q: Tensor) -> str | None:
    if MISSING:
        return MISSING
    if not (q.is_cuda or INTERPRETED):
        return (
            f"it runs on a GPU, q is on {q.device}; TRITON_INTERPRET=1 in the environment interprets it there, slowly"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, got {q.dtype}; use backend='reference'"
    if q.shape[-1] > HEAD_DIM:
        return f"it takes heads of at most {HEAD_DIM} columns, got {q.shape[-1]}; use backend='reference'"
    return None


def _kernels(max_seqlen: int) -> ModuleType:
    if max_seqlen > LONGEST:
        raise ValueError(
            f"backend 'triton' takes sequences of at most {LONGEST} tokens, got {max_seqlen}; use backend='reference'"
        )
    return triton_short if max_seqlen <= triton_short.BLOCK else triton_long


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *options: Any,  # scale, causal, window, dropout_p, seed, offset
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        return _kernels(max_seqlen).forward(q, k, v, log_theta, cu_seqlens, max_seqlen, *options)


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
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        return _kernels(max_seqlen).backward(grad_out, q, k, v, log_theta, cu_seqlens, out, lse, max_seqlen, *options)
