"""The fast backends as PyTorch operators: shapes for torch.compile, autograd, and the checks that must see values.

A backend is a module with `unavailable(q) -> str | None` (why it cannot run), `forward` and `backward`, with the arguments of the
operators below. Its tensors are contiguous, `log_theta` is float32 or None, `window` is the largest distance that is seen or -1 for
all, `max_seqlen` is known, but in the backward of "cpu", which looks for itself.

The operators are registered with torch.library.Library rather than custom_op, whose wrappers take 0.1 ms of a step on a CPU, and
autograd goes past the dispatcher where it can: short sequences take less time than that.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPTIONS = (
    "SymInt max_seqlen, float scale, bool causal, SymInt window, float dropout_p, SymInt seed, SymInt offset, str backend"
)
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_theta, Tensor cu_seqlens"

library = torch.library.Library("cafe_kernels", "DEF")  # what it registers lives as long as it does
library.define(f"distance_attention({INPUTS}, {OPTIONS}) -> (Tensor, Tensor)")
library.define(
    f"distance_attention_backward(Tensor grad_out, {INPUTS}, Tensor out, Tensor lse, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
forward_op = torch.ops.cafe_kernels.distance_attention.default
backward_op = torch.ops.cafe_kernels.distance_attention_backward.default


def backend_module(name: str) -> ModuleType:
    """Imported when needed, by a statement, which torch.compile can trace."""
    if name == "cpu":
        from cafe_kernels.attention import cpu

        return cpu
    from cafe_kernels.attention import triton_backend

    return triton_backend


def covered(log_theta: Tensor, causal: bool) -> int:
    """n_max, the longest sequence that log_theta has columns for: all of them, or 2 n_max - 1."""
    return log_theta.shape[1] if causal else (log_theta.shape[1] + 1) // 2


def longest_sequence(
    cu_seqlens: Tensor, total: int, max_seqlen: int, log_theta: Tensor | None, causal: bool
) -> int:
    """The longest sequence, after checks of the values. max_seqlen 0: not given. On a GPU, looking at values waits for all work
    before them, so a given max_seqlen is believed there."""
    if cu_seqlens.device.type != "cpu" and max_seqlen:
        return max_seqlen
    borders = cu_seqlens.cpu().numpy().astype("int64")  # int32 differences may overflow
    lengths = borders[1:] - borders[:-1]
    if borders[0] != 0 or borders[-1] != total or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0 to the {total} tokens of q, got {cu_seqlens.tolist()[:8]}...")
    longest = int(lengths.max()) if len(lengths) else 0
    if max_seqlen and max_seqlen < longest:
        raise ValueError(f"max_seqlen={max_seqlen} but a sequence has {longest} tokens")
    if log_theta is not None and covered(log_theta, causal) < longest:
        raise ValueError(f"a sequence has {longest} tokens but {too_short(log_theta, causal)}")
    return longest


def too_short(log_theta: Tensor, causal: bool) -> str:
    n_max, columns = covered(log_theta, causal), log_theta.shape[1]
    two_sided = "" if causal else f": causal=False needs 2 n_max - 1 columns, distance 0 in the middle, and it has {columns}"
    return f"log_theta covers distances below {n_max}{two_sided}"


def longest_to_pad_to(
    cu_seqlens: Tensor, total: int, max_seqlen: int, log_theta: Tensor | None, causal: bool
) -> int:
    """longest_sequence of the reference, which torch.compile traces: there a given max_seqlen is believed."""
    if torch.compiler.is_compiling():
        return max_seqlen or _longest_since_max_seqlen_is_not_given(cu_seqlens, total, log_theta, causal)
    return longest_sequence(cu_seqlens, total, max_seqlen, log_theta, causal)


@torch.compiler.disable  # it looks at values; fullgraph=True names this function in its error
def _longest_since_max_seqlen_is_not_given(
    cu_seqlens: Tensor, total: int, log_theta: Tensor | None, causal: bool
) -> int:
    return longest_sequence(cu_seqlens, total, 0, log_theta, causal)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_theta: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *options: Any,  # scale, causal, window, dropout_p, seed, offset, backend
) -> tuple[Tensor, Tensor]:
    """Returns the output, as q, and the log-sum-exp of every row of logits, (H, total) float32."""
    longest = max(longest_sequence(cu_seqlens, len(q), max_seqlen, log_theta, options[1]), max_seqlen)
    if len(q) == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    log_theta = None if log_theta is None else log_theta.contiguous()
    return backend_module(options[-1]).forward(q, k, v, log_theta, cu_seqlens.contiguous(), longest, *options[:-1])


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and log_theta; the last is empty where log_theta is None."""
    if len(q) == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _dlog_theta(q, log_theta)
    longest = max_seqlen  # a given one was checked in forward
    if not longest and options[-1] != "cpu":
        longest = longest_sequence(cu_seqlens, len(q), 0, log_theta, options[1])
    tensors = [x.contiguous() for x in (grad_out, q, k, v)]
    log_theta = None if log_theta is None else log_theta.contiguous()
    dq, dk, dv, dlog_theta = backend_module(options[-1]).backward(
        *tensors, log_theta, cu_seqlens.contiguous(), out, lse, longest, *options[:-1]
    )
    return dq, dk, dv, _dlog_theta(q, None) if dlog_theta is None else dlog_theta


def _dlog_theta(q: Tensor, log_theta: Tensor | None) -> Tensor:
    return q.new_zeros(0 if log_theta is None else log_theta.shape, dtype=torch.float32)


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor | None, *rest: Any) -> Any:
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *gradients, _dlog_theta(q, log_theta)


def _nobody_waits(q: Tensor) -> bool:
    """Whether the dispatcher would only pass q on: no tracer, mode, transform, subclass of Tensor or device "meta"."""
    return (
        type(q) is Tensor
        and not q.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def distance_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """forward_op(*inputs), without the dispatcher where nobody waits there."""
    if not torch.compiler.is_compiling() and _nobody_waits(inputs[0]):
        return _Forward.apply(*inputs)
    return forward_op(*inputs)


def _below_autograd(op: Any, function: Any, inputs: Any) -> Any:
    """op(*inputs) from within autograd; by its Python function, without the dispatcher, where nobody waits there."""
    if _nobody_waits(inputs[0]):
        return function(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        out, lse = _below_autograd(forward_op, forward, inputs)
        ctx.save_for_backward(*inputs[:5], out, lse)
        ctx.options = inputs[5:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        inputs = (grad_out, *saved, *ctx.options)
        if torch.is_grad_enabled():  # create_graph=True: through what refuses a second derivative
            *gradients, dlog_theta = backward_op(*inputs)
        else:
            *gradients, dlog_theta = _below_autograd(backward_op, backward, inputs)
        return *gradients, None if saved[3] is None else dlog_theta, *[None] * 9


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        return _below_autograd(backward_op, backward, inputs)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        raise RuntimeError("distance_attention has no second derivative here: use backend='reference' for it")


for name, function, fake, autograd in (
    ("distance_attention", forward, _forward_fake, _Forward.apply),
    ("distance_attention_backward", backward, _backward_fake, _Backward.apply),
):
    library.impl(name, function, "CompositeExplicitAutograd")
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"cafe_kernels::{name}", fake, lib=library)
