"""The fast backends of the sampled losses as PyTorch operators: shapes for torch.compile, and autograd.

The forward pass makes, with the loss, its derivatives by h and by the logits; the backward pass scales them, which a factor of 1
spares, and sums the table's rows. Without reduction each token's gradient has its own factor, so the backward pass runs the kernel
again with it.

A backend is a module with `unavailable(h, table) -> str | None` (why it cannot run) and
    forward(*inputs, weights, kind, positive_weight, negative_weight, gradients) -> losses (T,), their sum
        `inputs` are those of the operator, contiguous, h and log q float32; weights (T,) or None: a factor of each token's gradient;
        gradients: None, or the tensors to fill, see `_gradients`
    table_gradient(scale, h, shape, ids, coefficients, negative_rows, dense, item_intent, intents_shape) -> ids, rows, dintents
        entry i of ids has the gradient coefficients[i] * h[token of i], and those after the coefficients the next of negative_rows.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INPUTS = (
    "Tensor h, Tensor table, Tensor? intents, Tensor? item_intent, Tensor positives, Tensor negatives, Tensor? sequence, "
    "Tensor? ignore, Tensor? positive_log_q, Tensor? negative_log_q"
)
OPTIONS = "str kind, float positive_weight, float negative_weight, str reduction, bool gradients, bool sparse_grad, str backend"

library = torch.library.Library("cafe_kernels", "FRAGMENT")  # what it registers lives as long as it does
library.define(f"sampled_loss({INPUTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    f"sampled_loss_backward(Tensor grad_loss, {INPUTS}, Tensor dh, Tensor coefficients, Tensor negative_rows, {OPTIONS}, "
    "bool want_h, bool want_table, bool want_intents) -> (Tensor, Tensor, Tensor, Tensor)"
)
forward_op = torch.ops.cafe_kernels.sampled_loss.default
backward_op = torch.ops.cafe_kernels.sampled_loss_backward.default
NUM_INPUTS, NUM_OPTIONS = 10, 7


def backend_module(name: str) -> ModuleType:
    """Imported when needed, by a statement, which torch.compile can trace."""
    if name == "cpu":
        from cafe_kernels.losses import cpu

        return cpu
    from cafe_kernels.losses import triton_losses

    return triton_losses


def parts_of(h: Tensor, negatives: Tensor, sequence: Tensor | None) -> int:
    """How many sums of gradient rows are kept for each shared negative: fixed, so that no number depends on the threads."""
    if negatives.dim() == 1:
        return max(1, min(16, len(h) // 512))
    return 0 if sequence is None else len(negatives)


def _spread(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with a row of negatives for each token, where sequences are so short that their shared negatives' gradient rows
    would take more memory: 4 * width + 44 bytes for each negative of a sequence, against 56 for each of a token, what sorts them
    included. So no more is kept than for negatives a token, never (tokens, K, d)."""
    h, negatives, sequence, ignore, log_q = inputs[0], *inputs[5:8], inputs[9]
    if sequence is None or negatives.dim() == 1 or 56 * len(h) >= len(negatives) * (4 * _width(h) + 44):
        return inputs
    negatives, ignore, log_q = (x if x is None else x.index_select(0, sequence) for x in (negatives, ignore, log_q))
    return (*inputs[:5], negatives, None, ignore, inputs[8], log_q)


def _check_sequence(sequence: Tensor, rows: int) -> None:
    """As csrc/losses.cpp does, which sees none where `_spread` has used it."""
    if len(bad := sequence[(sequence < 0) | (sequence >= rows)]):
        raise IndexError(f"sequence must be in 0 ... {rows - 1}, the rows of negatives or ignore, got {int(bad[0])}")
    if bool((sequence.diff() < 0).any()):
        raise ValueError("sequence must ascend, as packed tokens do")


def _width(h: Tensor) -> int:
    """Of gradient rows: a multiple of 16."""
    return (h.shape[1] + 15) // 16 * 16


def _gradients(h: Tensor, negatives: Tensor, sequence: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dh (T, d), the derivatives by the logits (T,) or (T + T * K,), and the gradient rows of shared negatives."""
    tokens = len(h)
    if not wanted:
        return h.new_empty(0), h.new_empty(0), h.new_empty(0)
    per_token = negatives.dim() == 2 and sequence is None
    rows = h.new_empty(parts_of(h, negatives, sequence) * negatives.shape[-1], _width(h))
    rows[:, h.shape[1] :] = 0  # no backend writes these columns, and an output holds no memory of others
    return (
        torch.empty_like(h, memory_format=torch.contiguous_format),
        h.new_empty(tokens * (1 + negatives.shape[1]) if per_token else tokens),
        rows,
    )


def _run(
    inputs: tuple[Any, ...], weights: Tensor | None, options: tuple[Any, ...], wanted: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    kind, positive_weight, negative_weight, *_, backend = options
    inputs = tuple(x if x is None else x.contiguous() for x in inputs)
    h, negatives, sequence = inputs[0], inputs[5], inputs[6]
    gradients = _gradients(h, negatives, sequence, wanted)
    losses, total = backend_module(backend).forward(
        *inputs, weights, kind, positive_weight, negative_weight, gradients if wanted else None
    )  # fmt: skip
    return losses, total, gradients


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss, and what the backward pass needs, which is empty without `gradients`."""
    inputs, options = arguments[:NUM_INPUTS], arguments[NUM_INPUTS:]
    reduction, wanted = options[3:5]
    h, negatives, sequence = inputs[0], inputs[5], inputs[6]
    if sequence is not None and negatives.dim() == 2 and sequence.device.type == "cpu":
        _check_sequence(sequence, len(negatives))
    inputs = _spread(inputs)
    weights = h.new_full((len(h),), 1 / max(1, len(h))) if reduction == "mean" else None
    losses, total, gradients = _run(inputs, weights, options, wanted and reduction != "none")
    loss = losses if reduction == "none" else total / len(losses) if reduction == "mean" else total
    return loss, *gradients


def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradient of h, that of the table as ids and rows (or no ids, and all rows), and that of the intents' table."""
    inputs, gradients = _spread(arguments[:NUM_INPUTS]), arguments[NUM_INPUTS : NUM_INPUTS + 3]
    *options, want_h, want_table, want_intents = arguments[NUM_INPUTS + 3 :]
    reduction, sparse_grad, backend = options[3], options[5], options[6]
    h, table, intents, item_intent, positives, negatives, sequence = inputs[:7]
    if reduction == "none":
        _, _, gradients = _run(inputs, grad_loss.contiguous(), tuple(options), wanted=True)
        scale, dh = grad_loss.new_ones(()), gradients[0] if want_h else h.new_empty(0)
    else:
        scale, dh = grad_loss, gradients[0] * grad_loss if want_h else h.new_empty(0)
    nothing = positives.new_empty(0), h.new_empty(0), h.new_empty(0)
    if not (want_table or want_intents):
        return dh, *nothing
    drawn = negatives.expand(parts_of(h, negatives, sequence), -1) if negatives.dim() == 1 else negatives
    ids, rows, dintents = backend_module(backend).table_gradient(
        scale,
        h.contiguous(),
        table.shape,
        torch.cat([positives, drawn.flatten()]),
        *gradients[1:],
        dense=want_table and not sparse_grad,
        item_intent=item_intent if want_intents else None,
        intents_shape=intents.shape if want_intents else None,
    )
    dintents = nothing[2] if dintents is None else dintents.to(intents.dtype)
    return (dh, ids, rows.to(table.dtype), dintents) if want_table else (dh, *nothing[:2], dintents)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _spread(arguments[:NUM_INPUTS])
    h, negatives, sequence = inputs[0], inputs[5], inputs[6]
    reduction, wanted = arguments[NUM_INPUTS + 3 : NUM_INPUTS + 5]
    loss = h.new_empty(len(h) if reduction == "none" else ())
    return loss, *_gradients(h, negatives, sequence, wanted and reduction != "none")


def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, table, intents, _, positives = arguments[:5]
    sparse_grad, _, want_h, want_table, want_intents = arguments[-5:]
    ids, rows = positives.new_empty(0), h.new_empty(0)
    if want_table and sparse_grad:
        count = torch.library.get_ctx().new_dynamic_size()
        ids, rows = positives.new_empty(count), table.new_empty(count, h.shape[1])
    elif want_table:
        rows = torch.empty_like(table, memory_format=torch.contiguous_format)
    dintents = torch.empty_like(intents, memory_format=torch.contiguous_format) if want_intents else h.new_empty(0)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if want_h else h.new_empty(0)
    return dh, ids, rows, dintents


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            loss, *gradients = forward_op(*arguments)
        ctx.save_for_backward(*arguments[:NUM_INPUTS], *gradients)
        ctx.options = arguments[NUM_INPUTS:]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        return loss, *gradients

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        nothing = [None] * (NUM_INPUTS + NUM_OPTIONS - 3)
        if grad_loss is None:
            return None, None, None, *nothing
        saved, (want_h, want_table, want_intents) = ctx.saved_tensors, ctx.needs_input_grad[:3]
        reduction = ctx.options[3]
        # A factor of 1 leaves dh as it is: not under torch.compile, where no value is known, nor where a second derivative, which
        # the operator refuses, is asked for.
        known = type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and not torch.is_grad_enabled()
        ready = want_h and reduction != "none" and known and grad_loss.item() == 1
        scale_h = want_h and not ready
        dh, ids, rows, dintents = backward_op(grad_loss, *saved, *ctx.options, scale_h, want_table, want_intents)
        if ready:
            dh = saved[NUM_INPUTS]
        sparse_grad, distinct = ctx.options[5], ctx.options[6] != "triton"
        if want_table and sparse_grad:
            rows = torch.sparse_coo_tensor(
                ids[None], rows, saved[1].shape, is_coalesced=distinct, check_invariants=False
            )
        return dh if want_h else None, rows if want_table else None, dintents if want_intents else None, *nothing


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return backward_op(*inputs)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        raise RuntimeError("the sampled losses have no second derivative here: use backend='reference' for it")


for name, function, fake, autograd in (
    ("sampled_loss", forward, _forward_fake, _Forward.apply),
    ("sampled_loss_backward", backward, _backward_fake, _Backward.apply),
):
    library.impl(name, function, "CompositeExplicitAutograd")
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"cafe_kernels::{name}", fake, lib=library)
