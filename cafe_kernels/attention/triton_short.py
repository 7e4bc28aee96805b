# mypy: allow-untyped-defs
"""Distance-mask attention on a GPU for sequences of at most 64 tokens (Eq. 5-6, as reference.py), forward and backward.

A program owns the sequences that begin in its share of the packed tokens, and walks them in blocks of whole sequences with at most
64 tokens together. A block's logits are one 64 x 64 tile on the chip, so the softmax needs no second look, and the backward pass
finds dq, dk, dv in one go, from q, k, v and grad_out alone. A block ends where the sequence begins that does not fit any more,
which one number tells: `starts[token]`, where the token's sequence begins. So nobody plans, and nothing waits for the CPU. (A NaN or
an infinity may spoil the other sequences of its block, since 0 * NaN is NaN.)

Where tokens see what is after them, too (CAUSAL = False), `starts` also tells where each token's sequence ends.

log_theta depends on i - j alone, inside a block as well as in a sequence: its tile is spread once a program, and its gradient is the
sum of all tiles' gradients, whose diagonals are summed once a program, in a row of the program's own. A last kernel sums the rows,
always in the same order: there are no atomics.
"""

import itertools
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.attention.triton_common import (
    LAUNCH,
    LOG2_E,
    NUMBERS,
    TYPES,
    VARIANTS,
    between_columns,
    case,
    dot,
    drop_bits,
    dropout,
    from_column,
    load,
    mark_dropped,
    product,
    reduce,
    skew,
    store,
    zero_dropped,
)
from cafe_kernels.attention.workloads import SHORT, workloads
from cafe_kernels.backends import launchable
from cafe_kernels.launched import launched

BLOCK = 64  # tokens of a block, and the longest sequence
PROGRAMS = 1024  # at most so many work on all heads together: a few times what runs at once on a large GPU


def config(head_dim: int, itemsize: int, backward: bool, causal: bool = True) -> dict[str, int]:
    """How the kernels are compiled. CHUNK: columns of q, k, v worked on at a time; where it is less than all, the backward pass reads q,
    k and grad_out twice. No registers are spilled on sm_80, sm_90, sm_100 and gfx942, as far as compile_cases tell; maxnreg keeps
    NVIDIA's compiler from spilling a few registers for the sake of more programs at a time, and AMD's products of 16 rows have fewer
    masks for its scalar registers to hold than those of 32."""
    columns = max(16, triton.next_power_of_2(head_dim))
    common = {"num_stages": 1, "maxnreg": 255, "matrix_instr_nonkdim": 16}
    if itemsize == 4:
        return common | {"CHUNK": 16, "num_warps": 8}
    if backward and columns > 64:
        return common | {"CHUNK": 32, "num_warps": 8}
    wide = backward and (columns == 32 or not causal)
    return common | {"CHUNK": min(columns, 64), "num_warps": 8 if wide else 4}


@launched(**NUMBERS)
def sequence_starts(
    cu_seqlens, starts, sequences, total, ROWS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """starts (total), or, not causal, (2, total), with the ends in the second row."""
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(cu_seqlens + s, mask=s < sequences, other=0)[:, None]
    end = tl.load(cu_seqlens + s + 1, mask=s < sequences, other=0)[:, None]
    token = begin + tl.arange(0, BLOCK)[None, :]
    tl.store(starts + token, begin + 0 * token, mask=(token < end) & (token < total))
    if not CAUSAL:
        ends = starts + tl.cast(total, tl.int64)
        tl.store(ends + token, end + 0 * token, mask=(token < end) & (token < total))


@triton.jit
def _first_start(starts, token, total, BLOCK: tl.constexpr):
    """The first token from `token` on that begins a sequence, or total."""
    t = token + tl.arange(0, BLOCK)
    return tl.min(tl.where(tl.load(starts + t, mask=t < total, other=-1) == t, t, total), 0)


@triton.jit
def _block_end(starts, begin, end, BLOCK: tl.constexpr):
    """Where the last sequence that fits ends. Clamped, so that a wrong max_seqlen gives wrong numbers but no endless loop."""
    cut = tl.load(starts + begin + BLOCK, mask=begin + BLOCK < end, other=end)
    return tl.minimum(tl.maximum(cut, begin + 1), begin + BLOCK)


@triton.jit
def _bias(log_theta, head, distances, window, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """log_theta[i - j] in base 2, and -inf for what is in the future, if causal, or beyond the window."""
    t = tl.arange(0, BLOCK)
    distance = t[:, None] - t[None, :]
    bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    if HAS_BIAS and CAUSAL:
        row = tl.load(log_theta + head * distances + t, mask=t < distances, other=0.0) * LOG2_E
        bias = tl.gather(tl.broadcast_to(row[None, :], BLOCK, BLOCK), distance & (BLOCK - 1), 1)
    elif HAS_BIAS:
        middle = distances // 2
        column = tl.minimum(tl.maximum(middle + distance, 0), distances - 1)  # beyond the table, no sequence is so long
        bias = tl.load(log_theta + head * distances + column) * LOG2_E
    seen = distance >= 0 if CAUSAL else distance >= -window
    return tl.where(seen & (distance <= window), bias, float("-inf"))


@triton.jit
def _own(starts, token, first, begin, end, total, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Which keys are of a token's own sequence, less those after it that the bias hides."""
    if CAUSAL:
        return from_column(first, BLOCK)
    last = tl.load(starts + tl.cast(total, tl.int64) + token, mask=token < end, other=token + 1) - begin
    return between_columns(first, last, BLOCK)


@triton.jit
def _weights(logits, bias, own, scale):
    """Softmax of scale * logits + bias over the keys that are `own`, before its division by the sum; the maximum, the sum."""
    s = tl.where(own, logits * (scale * LOG2_E) + bias, float("-inf"))
    largest = tl.max(s, 1)
    p = tl.exp2(s - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    return p, largest, tl.sum(p, 1)


@launched(**NUMBERS)
def short_forward(
    q, k, v, log_theta, starts, out, lse,
    total, share, heads, distances, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    program, head, stride = tl.program_id(0), tl.program_id(1), heads * HEAD_DIM
    begin = _first_start(starts, program * share, total, BLOCK)
    last = _first_start(starts, (program + 1) * share, total, BLOCK)
    bias = _bias(log_theta, head, distances, window, HAS_BIAS, BLOCK, CAUSAL)
    while begin < last:
        end = _block_end(starts, begin, last, BLOCK)
        token, count = begin + tl.arange(0, BLOCK), end - begin
        base = begin.to(tl.int64) * stride + head * HEAD_DIM
        # Rows of no token look at themselves, so that they stay finite.
        first = tl.load(starts + token, mask=token < end, other=token) - begin
        if DROPOUT:  # the bits begin where the sequence does
            bits = drop_bits(token, head, 0, seed, offset, threshold, BLOCK) << first
        logits = product(q + base, k + base, count, count, stride, HEAD_DIM, CHUNK, BLOCK)
        own = _own(starts, token, first, begin, end, total, BLOCK, CAUSAL)
        p, largest, weight = _weights(logits, bias, own, scale)
        tl.store(lse + head.to(tl.int64) * total + token, (largest + tl.log2(weight)) / LOG2_E, mask=token < end)
        p *= (1 / weight)[:, None]
        if DROPOUT:
            p = mark_dropped(p, bits, BLOCK)
            p = zero_dropped(p, p) * keep_scale
        p = p.to(q.dtype.element_ty)
        for c in range(0, HEAD_DIM, CHUNK):
            column = c + tl.arange(0, CHUNK)
            x = dot(p, load(v + base, count, column, stride, BLOCK, HEAD_DIM))
            store(out + base, x, count, column, stride, BLOCK, HEAD_DIM)
        begin = end


@launched(**NUMBERS)
def short_backward(
    grad_out, q, k, v, log_theta, starts, dq, dk, dv, partial,
    total, share, heads, distances, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    program, head, stride = tl.program_id(0), tl.program_id(1), heads * HEAD_DIM
    begin = _first_start(starts, program * share, total, BLOCK)
    last = _first_start(starts, (program + 1) * share, total, BLOCK)
    bias = _bias(log_theta, head, distances, window, HAS_BIAS, BLOCK, CAUSAL)
    dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
    while begin < last:
        end = _block_end(starts, begin, last, BLOCK)
        token, count = begin + tl.arange(0, BLOCK), end - begin
        base = begin.to(tl.int64) * stride + head * HEAD_DIM
        first = tl.load(starts + token, mask=token < end, other=token) - begin
        if DROPOUT:
            bits = drop_bits(token, head, 0, seed, offset, threshold, BLOCK) << first
        if CHUNK >= HEAD_DIM:  # everything is loaded once
            column = tl.arange(0, CHUNK)
            xq = load(q + base, count, column, stride, BLOCK, HEAD_DIM)
            xk = load(k + base, count, column, stride, BLOCK, HEAD_DIM)
            logits = dot(xq, tl.trans(xk))
        else:
            logits = product(q + base, k + base, count, count, stride, HEAD_DIM, CHUNK, BLOCK)
        own = _own(starts, token, first, begin, end, total, BLOCK, CAUSAL)
        p, _, weight = _weights(logits, bias, own, scale)
        p *= tl.where(weight == 0, 0.0, 1 / weight)[:, None]
        if DROPOUT:
            p = mark_dropped(p, bits, BLOCK)
            dropped = tl.trans((zero_dropped(p, p) * keep_scale).to(q.dtype.element_ty))
        else:
            dropped = tl.trans(p.to(q.dtype.element_ty))
        if CHUNK >= HEAD_DIM:
            xo = load(grad_out + base, count, column, stride, BLOCK, HEAD_DIM)
            store(dv + base, dot(dropped, xo), count, column, stride, BLOCK, HEAD_DIM)
            dp = dot(xo, tl.trans(load(v + base, count, column, stride, BLOCK, HEAD_DIM)))
        else:
            for c in range(0, HEAD_DIM, CHUNK):
                column = c + tl.arange(0, CHUNK)
                xo = load(grad_out + base, count, column, stride, BLOCK, HEAD_DIM)
                store(dv + base, dot(dropped, xo), count, column, stride, BLOCK, HEAD_DIM)
            dp = product(grad_out + base, v + base, count, count, stride, HEAD_DIM, CHUNK, BLOCK)
        if DROPOUT:
            dp = zero_dropped(dp, p) * keep_scale
            p = tl.abs(p)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        dbias += ds
        ds = (ds * scale).to(q.dtype.element_ty)
        for c in range(0, HEAD_DIM, CHUNK):
            column = c + tl.arange(0, CHUNK)
            if CHUNK < HEAD_DIM:
                xk = load(k + base, count, column, stride, BLOCK, HEAD_DIM)
            store(dq + base, dot(ds, xk), count, column, stride, BLOCK, HEAD_DIM)
            if CHUNK < HEAD_DIM:
                xq = load(q + base, count, column, stride, BLOCK, HEAD_DIM)
            store(dk + base, dot(tl.trans(ds), xq), count, column, stride, BLOCK, HEAD_DIM)
        begin = end
    if HAS_BIAS:
        t, row = tl.arange(0, BLOCK), program * tl.num_programs(1) + head
        if CAUSAL:  # what is in the future is 0
            tl.store(partial + row * BLOCK + BLOCK - 1 - t, tl.sum(skew(dbias, BLOCK), 0))
        else:
            skewed, past = skew(dbias, BLOCK), t[:, None] + t[None, :] >= BLOCK - 1
            tl.store(partial + row * (2 * BLOCK) + 2 * BLOCK - 1 - t, tl.sum(tl.where(past, skewed, 0.0), 0))
            tl.store(partial + row * (2 * BLOCK) + BLOCK - 1 - t, tl.sum(tl.where(past, 0.0, skewed), 0))


def _starts(cu_seqlens: Tensor, total: int, causal: bool) -> Tensor:
    starts = torch.empty(total if causal else 2 * total, dtype=torch.int32, device=cu_seqlens.device)
    sequences, constants = len(cu_seqlens) - 1, {"ROWS": 16, "BLOCK": BLOCK, "CAUSAL": causal}
    sequence_starts[(triton.cdiv(sequences, 16),)](cu_seqlens, starts, sequences, total, **constants, **LAUNCH)
    return starts


def _arguments(q: Tensor, log_theta: Tensor | None, options: tuple[Any, ...], backward: bool) -> tuple[Any, ...]:
    """The grid; total ... offset of the kernels' parameters; the constants."""
    (total, heads, head_dim), (scale, causal, window, dropout_p, seed, offset) = q.shape, options
    programs = min(triton.cdiv(total, BLOCK), max(1, PROGRAMS // heads))
    distances = 0 if log_theta is None else log_theta.shape[1]
    numbers = total, triton.cdiv(total, programs), heads, distances, scale, window if 0 <= window < BLOCK else BLOCK
    constants = {"HEAD_DIM": head_dim, "BLOCK": BLOCK, "HAS_BIAS": log_theta is not None, "DROPOUT": dropout_p > 0}
    constants |= {"CAUSAL": causal}
    constants |= launchable(config(head_dim, q.itemsize, backward, causal))
    return (programs, heads), (*numbers, *dropout(dropout_p), seed, offset), constants


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, *options: Any
) -> tuple[Tensor, Tensor]:
    """`options`: scale, causal, window (-1 for none), dropout_p, seed, offset."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    grid, numbers, constants = _arguments(q, log_theta, options, backward=False)
    starts = _starts(cu_seqlens, len(q), constants["CAUSAL"])
    short_forward[grid](q, k, v, log_theta, starts, out, lse, *numbers, **constants)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor | None, cu_seqlens: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`rest`: out, lse, max_seqlen, which are not needed, and `options`."""
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    grid, numbers, constants = _arguments(q, log_theta, rest[3:], backward=True)
    causal = constants["CAUSAL"]
    partial = None if log_theta is None else q.new_empty(*grid, BLOCK if causal else 2 * BLOCK, dtype=torch.float32)
    starts = _starts(cu_seqlens, len(q), causal)
    short_backward[grid](grad_out, q, k, v, log_theta, starts, dq, dk, dv, partial, *numbers, **constants)
    if log_theta is None or partial is None:
        return dq, dk, dv, None
    return dq, dk, dv, reduce(partial, torch.empty_like(log_theta), causal)


def compile_cases() -> list[dict[str, Any]]:
    """What is compiled by default, for compilation without a GPU."""
    found = [
        case("short_starts" + suffix, sequence_starts, {"ROWS": 16, "BLOCK": BLOCK, "CAUSAL": not suffix})
        for suffix in ("", " two-sided")
    ]
    for (head_dim, dtype, mask, drop, causal), backward in itertools.product(VARIANTS, (False, True)):
        kernel = short_backward if backward else short_forward
        constants = config(head_dim, TYPES[dtype].itemsize, backward, causal)
        name = f"{kernel.fn.__name__} d{head_dim} {dtype}" + " mask" * mask + " dropout" * drop
        name += " two-sided" * (not causal)
        again = backward and constants["CHUNK"] < head_dim  # q, k and grad_out, for the lack of registers
        constants |= {"HEAD_DIM": head_dim, "BLOCK": BLOCK, "HAS_BIAS": mask, "DROPOUT": drop, "CAUSAL": causal}
        counted = workloads(
            sys.modules[__name__], SHORT, head_dim, TYPES[dtype], 0.1 if drop else 0.0, causal,
            backward=backward, tensors=7 if backward else 4, bound="distinct" if again else "issued",
        )  # fmt: skip
        found.append(
            case(name, kernel, constants, dtype)
            | {"workloads": counted if head_dim == 64 and mask and drop and dtype != "fp16" else []}
        )
    return found
