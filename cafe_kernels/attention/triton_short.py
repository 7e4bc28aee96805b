"""Distance-mask attention on a GPU for sequences of at most 64 tokens (Eq. 5-6, as reference.py), forward and backward.

A program owns the sequences that begin in its share of the packed tokens, and walks them in blocks of whole sequences with at most
64 tokens together. A block's logits are one 64 x 64 tile on the chip, so the softmax needs no second look, and the backward pass
finds dq, dk, dv in one go, from q, k, v and grad_out alone. A block ends where the sequence begins that does not fit any more,
which one number tells: `starts[token]`, where the token's sequence begins. So nobody plans, and nothing waits for the CPU.

log_theta depends on i - j alone, inside a block as well as in a sequence: its tile is spread once a program, and its gradient is the
sum of all tiles' gradients, whose diagonals are summed once a program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.attention.triton_common import (
    LOG2_E,
    diagonal_sums,
    dot,
    dropout,
    from_column,
    keep_bits,
    kept,
    load,
    reduce,
    store,
    toeplitz,
)

BLOCK = 64  # tokens of a block, and the longest sequence
PROGRAMS = 1024  # at most so many work on all heads together: a few times what runs at once on a large GPU


def config(head_dim: int, itemsize: int, backward: bool) -> dict[str, int]:
    """How the kernels are compiled. CHUNK: how many columns of q, k, v are worked on at a time."""
    columns = max(16, triton.next_power_of_2(head_dim))
    chunk = min(columns, 32 if itemsize == 4 else 128)
    return {"CHUNK": chunk, "num_warps": 4, "num_stages": 1}


@triton.jit
def _sequence_starts(cu_seqlens, starts, sequences, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(cu_seqlens + s, mask=s < sequences, other=0)[:, None]
    end = tl.load(cu_seqlens + s + 1, mask=s < sequences, other=0)[:, None]
    token = begin + tl.arange(0, BLOCK)[None, :]
    tl.store(starts + token, begin + 0 * token, mask=(token < end) & (token < total))


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
def _bias(log_theta, head, distances, window, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """log_theta[i - j] in base 2, and -inf for what is in the future or beyond the window."""
    distance = tl.arange(0, BLOCK)[:, None] - tl.arange(0, BLOCK)[None, :]
    if HAS_BIAS:
        t = tl.arange(0, BLOCK)
        row = tl.load(log_theta + head * distances + t, mask=t < distances, other=0.0) * LOG2_E
        bias = tl.gather(tl.broadcast_to(row[None, :], BLOCK, BLOCK), distance & (BLOCK - 1), 1)
    else:
        bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    return tl.where((distance >= 0) & (distance <= window), bias, float("-inf"))


@triton.jit
def _product(a, b, count, stride, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """a b' over all columns, chunk by chunk."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, HEAD_DIM, CHUNK):
        column = first + tl.arange(0, CHUNK)
        x = load(a, count, column, stride, BLOCK, HEAD_DIM)
        total = dot(x, tl.trans(load(b, count, column, stride, BLOCK, HEAD_DIM)), total)
    return total


@triton.jit
def _weights(logits, bias, first, scale, BLOCK: tl.constexpr):
    """Softmax of scale * logits + bias over the keys from `first` on, before its division by the sum; the maximum, the sum."""
    visible = from_column(first, BLOCK)
    s = tl.where(visible, logits * (scale * LOG2_E) + bias, float("-inf"))
    largest = tl.max(s, 1)
    p = tl.where(s != float("-inf"), tl.exp2(s - largest[:, None]), 0.0)
    return p, largest, tl.sum(p, 1)


@triton.jit(do_not_specialize=["total", "share", "window", "threshold", "seed", "offset"])
def _forward(
    q, k, v, log_theta, starts, out, lse,
    total, share, heads, distances, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    program, head, stride = tl.program_id(0), tl.program_id(1), heads * HEAD_DIM
    q, k, v, out = q + head * HEAD_DIM, k + head * HEAD_DIM, v + head * HEAD_DIM, out + head * HEAD_DIM
    begin = _first_start(starts, program * share, total, BLOCK)
    last = _first_start(starts, (program + 1) * share, total, BLOCK)
    bias = _bias(log_theta, head, distances, window, HAS_BIAS, BLOCK)
    while begin < last:
        end = _block_end(starts, begin, last, BLOCK)
        token, count = begin + tl.arange(0, BLOCK), end - begin
        base = begin.to(tl.int64) * stride
        # Rows of no token look at themselves, so that they stay finite.
        first = tl.load(starts + token, mask=token < end, other=token) - begin
        if DROPOUT:  # the mask's bits begin where the sequence does
            bits = keep_bits(token, head, 0, seed, offset, threshold, BLOCK) << first
        p, largest, weight = _weights(
            _product(q + base, k + base, count, stride, HEAD_DIM, CHUNK, BLOCK), bias, first, scale, BLOCK
        )
        tl.store(lse + head.to(tl.int64) * total + token, (largest + tl.log2(weight)) / LOG2_E, mask=token < end)
        p *= (1 / weight)[:, None]
        if DROPOUT:
            p = tl.where(kept(bits, BLOCK), p * keep_scale, 0.0)
        p = p.to(q.dtype.element_ty)
        for c in range(0, HEAD_DIM, CHUNK):
            column = c + tl.arange(0, CHUNK)
            store(out + base, dot(p, load(v + base, count, column, stride, BLOCK, HEAD_DIM)), count, column, stride, BLOCK, HEAD_DIM)
        begin = end


@triton.jit(do_not_specialize=["total", "share", "window", "threshold", "seed", "offset"])
def _backward(
    grad_out, q, k, v, log_theta, starts, dq, dk, dv, partial,
    total, share, heads, distances, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    program, head, stride = tl.program_id(0), tl.program_id(1), heads * HEAD_DIM
    q, k, v, grad_out = q + head * HEAD_DIM, k + head * HEAD_DIM, v + head * HEAD_DIM, grad_out + head * HEAD_DIM
    dq, dk, dv = dq + head * HEAD_DIM, dk + head * HEAD_DIM, dv + head * HEAD_DIM
    begin = _first_start(starts, program * share, total, BLOCK)
    last = _first_start(starts, (program + 1) * share, total, BLOCK)
    bias = _bias(log_theta, head, distances, window, HAS_BIAS, BLOCK)
    dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
    while begin < last:
        end = _block_end(starts, begin, last, BLOCK)
        token, count = begin + tl.arange(0, BLOCK), end - begin
        base = begin.to(tl.int64) * stride
        first = tl.load(starts + token, mask=token < end, other=token) - begin
        if DROPOUT:  # the mask's bits begin where the sequence does
            bits = keep_bits(token, head, 0, seed, offset, threshold, BLOCK) << first
        if CHUNK >= HEAD_DIM:  # everything is loaded once
            column = tl.arange(0, CHUNK)
            xq = load(q + base, count, column, stride, BLOCK, HEAD_DIM)
            xk = load(k + base, count, column, stride, BLOCK, HEAD_DIM)
            logits = dot(xq, tl.trans(xk))
        else:
            logits = _product(q + base, k + base, count, stride, HEAD_DIM, CHUNK, BLOCK)
        p, _, weight = _weights(logits, bias, first, scale, BLOCK)
        p *= tl.where(weight == 0, 0.0, 1 / weight)[:, None]
        if DROPOUT:  # what is dropped is marked by its sign
            p = tl.where(kept(bits, BLOCK), p, -p)
            dropped = tl.trans((tl.maximum(p, 0.0) * keep_scale).to(q.dtype.element_ty))
        else:
            dropped = tl.trans(p.to(q.dtype.element_ty))
        dp = tl.zeros((BLOCK, BLOCK), tl.float32)
        for c in range(0, HEAD_DIM, CHUNK):
            column = c + tl.arange(0, CHUNK)
            xo = load(grad_out + base, count, column, stride, BLOCK, HEAD_DIM)
            store(dv + base, dot(dropped, xo), count, column, stride, BLOCK, HEAD_DIM)
            dp = dot(xo, tl.trans(load(v + base, count, column, stride, BLOCK, HEAD_DIM)), dp)
        if DROPOUT:
            dp = tl.where(p > 0, dp * keep_scale, 0.0)
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
        sums, _ = diagonal_sums(dbias, BLOCK)
        tl.store(partial + (program * tl.num_programs(1) + head) * BLOCK + tl.arange(0, BLOCK), sums)
