"""The fast backends as PyTorch operators: shapes for torch.compile, autograd, and the checks that must see values.

A backend is a module with `unavailable(q) -> str | None` (why it cannot run), `forward` and `backward`, with the arguments of the
operators below. Its tensors are contiguous, `log_theta` is float32 or None, `window` is -1 for none, `max_seqlen` is known.
"""

from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ["cpu", "triton"]


def backend_module(name: str) -> ModuleType:
    """Imported when needed, by a statement, which torch.compile can trace."""
    if name == "cpu":
        from cafe_kernels.attention import cpu

        return cpu
    from cafe_kernels.attention import triton_backend

    return triton_backend


def longest_sequence(cu_seqlens: Tensor, total: int, max_seqlen: int, log_theta: Tensor | None) -> int:
    """The longest sequence, after checks of the values. max_seqlen 0: not given. On a GPU, looking at values waits for all work
    before them, so a given max_seqlen is believed there."""
    if cu_seqlens.is_cuda and max_seqlen:
        return max_seqlen
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0 to the {total} tokens of q, got {cu_seqlens.tolist()[:8]}...")
    longest = int(lengths.max()) if len(lengths) else 0
    if max_seqlen and max_seqlen < longest:
        raise ValueError(f"max_seqlen={max_seqlen} but a sequence has {longest} tokens")
    if log_theta is not None and log_theta.shape[1] < longest:
        raise ValueError(f"a sequence has {longest} tokens but log_theta covers distances below {log_theta.shape[1]}")
    return max_seqlen or longest


@torch.library.custom_op("cafe_kernels::distance_attention", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    dropout_p: float,
    seed: int,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the output, as q, and the log-sum-exp of every row of logits, (H, total) float32."""
    longest = longest_sequence(cu_seqlens, len(q), max_seqlen, log_theta)
    if len(q) == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    log_theta = None if log_theta is None else log_theta.contiguous()
    out, lse = backend_module(backend).forward(
        q, k, v, log_theta, cu_seqlens.contiguous(), longest, scale, window, dropout_p, seed, offset
    )
    return out, lse


@forward_op.register_fake
def _(q, k, v, log_theta, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[1], q.shape[0], dtype=torch.float32
    )


@torch.library.custom_op("cafe_kernels::distance_attention_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    dropout_p: float,
    seed: int,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and log_theta; the last is empty where log_theta is None."""
    empty = q.new_zeros(log_theta.shape if log_theta is not None else 0, dtype=torch.float32)
    if len(q) == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), empty
    longest = longest_sequence(cu_seqlens, len(q), max_seqlen, log_theta)
    tensors = [x.contiguous() for x in (grad_out, q, k, v)]
    log_theta = None if log_theta is None else log_theta.contiguous()
    dq, dk, dv, dlog_theta = backend_module(backend).backward(
        *tensors, log_theta, cu_seqlens.contiguous(), out, lse, longest, scale, window, dropout_p, seed, offset
    )
    return dq, dk, dv, empty if dlog_theta is None else dlog_theta


@backward_op.register_fake
def _(grad_out, q, k, v, log_theta, *rest):  # type: ignore[no-untyped-def]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *gradients, q.new_empty(0 if log_theta is None else log_theta.shape, dtype=torch.float32)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_theta, cu_seqlens, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, log_theta, cu_seqlens, out, lse)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    *gradients, dlog_theta = backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, None if ctx.saved_tensors[3] is None else dlog_theta, *[None] * 8


forward_op.register_autograd(_differentiate, setup_context=_save)


def _refuse(ctx, *gradients):  # type: ignore[no-untyped-def]
    raise RuntimeError("distance_attention has no second derivative here: use backend='reference' for it")


backward_op.register_autograd(_refuse)
