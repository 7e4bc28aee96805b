# mypy: allow-untyped-defs
"""Distance-mask attention on a GPU for sequences of any length (Eq. 5-6, as reference.py), forward and backward.

Forward: a program owns one block of a sequence's queries and streams the keys past it with an online softmax (FlashAttention-2,
Dao 2023), and keeps the log-sum-exp. Backward in two passes: `_backward_queries` goes as the forward and finds dq, delta and the
partial sums of dlog_theta; `_backward_keys` owns a block of keys and streams the queries that see it for dk and dv.

The gradient of log_theta has no atomics: a fixed number of programs share the blocks of queries, each adds up a row of its own,
and a last kernel sums the rows, always in the same order. Blocks with the most work come first in every grid.
"""

import itertools
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.attention.triton_common import (
    LOG2_E,
    NUMBERS,
    REDUCED,
    TYPES,
    VARIANTS,
    case,
    dot,
    drop_bits,
    dropout,
    load,
    mark_dropped,
    product,
    reduce,
    reduce_kernel,
    skew,
    store,
    zero_dropped,
)
from cafe_kernels.attention.workloads import LONG, workloads
from cafe_kernels.backends import launchable
from cafe_kernels.launched import launched

PROGRAMS = 512  # at most so many share the blocks of queries of all heads in the backward pass


def config(head_dim: int, itemsize: int, backward: bool) -> dict[str, int]:
    """How the kernels are compiled. BLOCK: queries or keys of a block. CHUNK: columns of q k' and grad_out v' at a time; where it is
    less than all, blocks are read again. No registers spilled on sm_80, sm_90, sm_100
    and gfx942; maxnreg as in triton_short.py."""
    columns = max(16, triton.next_power_of_2(head_dim))
    if itemsize == 4:
        block, num_warps, chunk = {128: (16, 8, 64), 256: (16, 8, 16)}.get(columns, (32, 8, min(columns, 32)))
    elif backward:
        block, num_warps, chunk = {128: (32, 8, 128), 256: (16, 4, 256)}.get(columns, (32, 4, columns))
    else:
        block, num_warps, chunk = {256: (32, 4, 256)}.get(columns, (64, 4, columns))
    found = {"BLOCK_D": columns, "CHUNK": chunk, "BLOCK": block, "num_warps": num_warps, "num_stages": 1}
    return found | {"maxnreg": 255, "matrix_instr_nonkdim": 16}


@triton.jit
def _bias(log_theta, i, j, head, distances, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """log_theta in base 2 of the queries from i on and the keys from j on. The 2 BLOCK - 1 numbers come out of the L1 cache, which
    takes fewer registers than to spread a vector of them. Called before the blocks' product, whose layout the compiler then keeps."""
    bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    if HAS_BIAS:
        first = i - j if CAUSAL else i - j + distances // 2
        column = first + tl.arange(0, BLOCK)[:, None] - tl.arange(0, BLOCK)[None, :]
        bias = tl.load(log_theta + head * distances + tl.minimum(tl.maximum(column, 0), distances - 1)) * LOG2_E
    return bias


@triton.jit
def _logits(logits, bias, i, j, length, scale, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """In base 2; -inf where a key is not seen: of a distance below 0, which is a large unsigned number, or beyond the window; or, not
    causal, beyond the window on either side or the sequence's end."""
    row, key = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    if CAUSAL:
        seen = (i - j + row[:, None] - key[None, :]).to(tl.uint32) <= window.to(tl.uint32)
    else:  # one mask, as between_columns: keys past the end are far away
        key = tl.where(key < length - j, key, 1 << 30)
        seen = tl.abs(i - j + row[:, None] - key[None, :]) <= window
    return tl.where(seen, logits * (scale * LOG2_E) + bias, float("-inf"))


@triton.jit
def _keys_end(i, length, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Before which key the last block of keys begins that the queries from i on see."""
    return i + BLOCK if CAUSAL else tl.minimum(length, i + BLOCK + window)


@triton.jit
def _mark_dropped(p, token, i, j, head, seed, offset, threshold, BLOCK: tl.constexpr):
    bits = drop_bits(token + i + tl.arange(0, BLOCK), head, j // 4, seed, offset, threshold, BLOCK)
    return mark_dropped(p, bits, BLOCK)


@launched(**NUMBERS)
def long_forward(
    q, k, v, log_theta, cu_seqlens, out, lse,
    total, sequences, blocks, heads, distances, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    sequence, head, stride = tl.program_id(0) % sequences, tl.program_id(1), heads * HEAD_DIM
    i = (blocks - 1 - tl.program_id(0) // sequences) * BLOCK
    begin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    if i < length:
        row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        at = (begin + i).to(tl.int64) * stride + head * HEAD_DIM
        if CHUNK >= HEAD_DIM:
            xq = load(q + at, length - i, column, stride, BLOCK, HEAD_DIM)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK,), tl.float32)
        x = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        keys_end = _keys_end(i, length, window, BLOCK, CAUSAL)
        for j in tl.range(tl.maximum(i - window, 0) // BLOCK * BLOCK, keys_end, BLOCK, disable_licm=True):
            there = (begin + j).to(tl.int64) * stride + head * HEAD_DIM
            bias = _bias(log_theta, i, j, head, distances, HAS_BIAS, BLOCK, CAUSAL)
            if CHUNK >= HEAD_DIM:
                s = dot(xq, tl.trans(load(k + there, length - j, column, stride, BLOCK, HEAD_DIM)))
            else:
                s = product(q + at, k + there, length - i, length - j, stride, HEAD_DIM, CHUNK, BLOCK)
            s = _logits(s, bias, i, j, length, scale, window, BLOCK, CAUSAL)
            higher = tl.maximum(largest, tl.max(s, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # where nothing was seen yet
            p = tl.exp2(s - finite[:, None])
            shrink = tl.exp2(largest - finite)
            weight = weight * shrink + tl.sum(p, 1)
            if DROPOUT:
                p = _mark_dropped(p, begin, i, j, head, seed, offset, threshold, BLOCK)
                p = zero_dropped(p, p) * keep_scale
            xv = load(v + there, length - j, column, stride, BLOCK, HEAD_DIM)
            x = dot(p.to(xv.dtype), xv, x * shrink[:, None])
            largest = higher
        store(out + at, x * (1 / weight)[:, None], length - i, column, stride, BLOCK, HEAD_DIM)
        rows = lse + head.to(tl.int64) * total + begin + i + row
        tl.store(rows, (largest + tl.log2(weight)) / LOG2_E, mask=i + row < length)


@triton.jit
def _gradients(
    s, dp, lse, delta, token, i, j, head, threshold, keep_scale, seed, offset, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weights after dropout and the gradient of the logits s; dp: the products of grad_out and v."""
    # Rows past the end have a log-sum-exp of +inf, rows that see nothing -inf: weights of 0 both.
    p = tl.exp2(s - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    if DROPOUT:
        p = _mark_dropped(p, token, i, j, head, seed, offset, threshold, BLOCK)
        dropped = zero_dropped(p, p) * keep_scale
        dp = zero_dropped(dp, p) * keep_scale
        p = tl.abs(p)
    else:
        dropped = p
    return dropped, p * (dp - delta[:, None])


@triton.jit
def _own(partial, program, heads, head, width, distance, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Where a program sums up the gradient of the distances distance + BLOCK - 1, ... distance."""
    first = distance if CAUSAL else distance + width // 2
    return partial + (program.to(tl.int64) * heads + head) * width + (first + BLOCK - 1 - tl.arange(0, BLOCK))


@launched(**NUMBERS)
def long_backward_queries(
    grad_out, q, k, v, log_theta, cu_seqlens, out, lse, dq, delta, partial,
    total, sequences, blocks, heads, distances, width, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    program, programs, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    stride, row, column = heads * HEAD_DIM, tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    for turn in tl.range(tl.cdiv(blocks * sequences, programs), disable_licm=True):
        # Blocks are dealt to and fro, so that everybody gets as much.
        item = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
        sequence, i = item % sequences, (blocks - 1 - item // sequences) * BLOCK
        begin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - begin
        if (i >= 0) & (i < length):
            at = (begin + i).to(tl.int64) * stride + head * HEAD_DIM
            rows = head.to(tl.int64) * total + begin + i + row
            xq = load(q + at, length - i, column, stride, BLOCK, HEAD_DIM)
            xo = load(grad_out + at, length - i, column, stride, BLOCK, HEAD_DIM)
            y = load(out + at, length - i, column, stride, BLOCK, HEAD_DIM)
            xdelta = tl.sum(xo.to(tl.float32) * y.to(tl.float32), 1)
            tl.store(delta + rows, xdelta, mask=i + row < length)
            xlse = tl.load(lse + rows, mask=i + row < length, other=float("inf")) * LOG2_E
            x = tl.zeros((BLOCK, BLOCK_D), tl.float32)
            carried = tl.zeros((BLOCK,), tl.float32)
            keys_end = _keys_end(i, length, window, BLOCK, CAUSAL)
            for j in tl.range(tl.maximum(i - window, 0) // BLOCK * BLOCK, keys_end, BLOCK, disable_licm=True):
                there = (begin + j).to(tl.int64) * stride + head * HEAD_DIM
                bias = _bias(log_theta, i, j, head, distances, HAS_BIAS, BLOCK, CAUSAL)
                xk = load(k + there, length - j, column, stride, BLOCK, HEAD_DIM)
                if CHUNK >= HEAD_DIM:
                    s = dot(xq, tl.trans(xk))
                    dp = dot(xo, tl.trans(load(v + there, length - j, column, stride, BLOCK, HEAD_DIM)))
                else:
                    s = product(q + at, k + there, length - i, length - j, stride, HEAD_DIM, CHUNK, BLOCK)
                    dp = product(grad_out + at, v + there, length - i, length - j, stride, HEAD_DIM, CHUNK, BLOCK)
                s = _logits(s, bias, i, j, length, scale, window, BLOCK, CAUSAL)
                _, ds = _gradients(
                    s, dp, xlse, xdelta, begin, i, j, head, threshold, keep_scale, seed, offset, DROPOUT, BLOCK
                )
                x = dot((ds * scale).to(xk.dtype), xk, x)
                if HAS_BIAS:
                    # The distances from i - j on come from this block and, what is beyond them, from the block before.
                    skewed, here = skew(ds, BLOCK), row[:, None] + row[None, :] >= BLOCK - 1
                    own = _own(partial, program, heads, head, width, i - j, BLOCK, CAUSAL)
                    tl.store(own, tl.load(own) + carried + tl.sum(tl.where(here, skewed, 0.0), 0))
                    carried = tl.sum(tl.where(here, 0.0, skewed), 0)
            if HAS_BIAS and not CAUSAL:  # causal: nothing comes after the last block
                beyond = i - tl.cdiv(keys_end, BLOCK) * BLOCK
                own = _own(partial, program, heads, head, width, beyond, BLOCK, CAUSAL)
                tl.store(own, tl.load(own) + carried)
            store(dq + at, x, length - i, column, stride, BLOCK, HEAD_DIM)
            tl.debug_barrier()  # before another thread reads what this one wrote to `partial`


@launched(**NUMBERS)
def long_backward_keys(
    grad_out, q, k, v, log_theta, cu_seqlens, lse, delta, dk, dv,
    total, sequences, blocks, heads, distances, scale, window, threshold, keep_scale, seed, offset,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    sequence, j, head = tl.program_id(0) % sequences, tl.program_id(0) // sequences * BLOCK, tl.program_id(1)
    stride, row, column = heads * HEAD_DIM, tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    begin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    if j < length:
        at = (begin + j).to(tl.int64) * stride + head * HEAD_DIM
        if CHUNK >= HEAD_DIM:
            xk = load(k + at, length - j, column, stride, BLOCK, HEAD_DIM)
            xv = load(v + at, length - j, column, stride, BLOCK, HEAD_DIM)
        ydk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        ydv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        first = j if CAUSAL else tl.maximum(j - window, 0) // BLOCK * BLOCK
        for i in tl.range(first, tl.minimum(length, j + BLOCK + window), BLOCK, disable_licm=True):
            there = (begin + i).to(tl.int64) * stride + head * HEAD_DIM
            rows = head.to(tl.int64) * total + begin + i + row
            xlse = tl.load(lse + rows, mask=i + row < length, other=float("inf")) * LOG2_E
            xdelta = tl.load(delta + rows, mask=i + row < length, other=0.0)
            bias = _bias(log_theta, i, j, head, distances, HAS_BIAS, BLOCK, CAUSAL)
            xq = load(q + there, length - i, column, stride, BLOCK, HEAD_DIM)
            xo = load(grad_out + there, length - i, column, stride, BLOCK, HEAD_DIM)
            if CHUNK >= HEAD_DIM:
                s, dp = dot(xq, tl.trans(xk)), dot(xo, tl.trans(xv))
            else:
                s = product(q + there, k + at, length - i, length - j, stride, HEAD_DIM, CHUNK, BLOCK)
                dp = product(grad_out + there, v + at, length - i, length - j, stride, HEAD_DIM, CHUNK, BLOCK)
            s = _logits(s, bias, i, j, length, scale, window, BLOCK, CAUSAL)
            dropped, ds = _gradients(
                s, dp, xlse, xdelta, begin, i, j, head, threshold, keep_scale, seed, offset, DROPOUT, BLOCK
            )
            ydv = dot(tl.trans(dropped.to(xo.dtype)), xo, ydv)
            ydk = dot(tl.trans((ds * scale).to(xq.dtype)), xq, ydk)
        store(dk + at, ydk, length - j, column, stride, BLOCK, HEAD_DIM)
        store(dv + at, ydv, length - j, column, stride, BLOCK, HEAD_DIM)


def _arguments(
    q: Tensor, log_theta: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, options: tuple[Any, ...], backward: bool
) -> tuple[tuple[int, int], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """The grid, the kernels' parameters total ... distances and scale ... offset, the constants."""
    (total, heads, head_dim), (scale, causal, window, dropout_p, seed, offset) = q.shape, options
    constants = {"HEAD_DIM": head_dim, "HAS_BIAS": log_theta is not None, "DROPOUT": dropout_p > 0, "CAUSAL": causal}
    constants |= launchable(config(head_dim, q.itemsize, backward))
    sequences, blocks = len(cu_seqlens) - 1, triton.cdiv(max_seqlen, constants["BLOCK"])
    shape = total, sequences, blocks, heads, 0 if log_theta is None else log_theta.shape[1]
    window = min(window, max_seqlen) if window >= 0 else max_seqlen
    return (sequences * blocks, heads), shape, (scale, window, *dropout(dropout_p), seed, offset), constants


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, *options: Any
) -> tuple[Tensor, Tensor]:
    """`options`: scale, causal, window (-1 for none), dropout_p, seed, offset."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    grid, shape, numbers, constants = _arguments(q, log_theta, cu_seqlens, max_seqlen, options, backward=False)
    long_forward[grid](q, k, v, log_theta, cu_seqlens, out, lse, *shape, *numbers, **constants)
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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dq, dk, dv, delta = *(torch.empty_like(q) for _ in range(3)), torch.empty_like(lse)
    inputs = grad_out, q, k, v, log_theta, cu_seqlens
    (items, heads), shape, numbers, constants = _arguments(q, log_theta, cu_seqlens, max_seqlen, options, backward=True)
    causal = constants["CAUSAL"]
    programs, width = min(items, max(1, PROGRAMS // heads)), shape[2] * constants["BLOCK"] * (1 if causal else 2)
    partial = None if log_theta is None else q.new_zeros(programs, heads, width, dtype=torch.float32)
    long_backward_queries[programs, heads](*inputs, out, lse, dq, delta, partial, *shape, width, *numbers, **constants)
    long_backward_keys[items, heads](*inputs, lse, delta, dk, dv, *shape, *numbers, **constants)
    if log_theta is None or partial is None:
        return dq, dk, dv, None
    return dq, dk, dv, reduce(partial, torch.empty_like(log_theta), causal)


def compile_cases() -> list[dict[str, Any]]:
    """What is compiled by default, for compilation without a GPU."""
    found = [case("reduce", reduce_kernel, {"REDUCED": REDUCED})]
    tensors = {long_forward: 4, long_backward_queries: 6, long_backward_keys: 6}  # the floor; out is read for delta
    for (head_dim, dtype, mask, drop, causal), kernel in itertools.product(VARIANTS, tensors):
        backward = kernel is not long_forward
        constants = {"HEAD_DIM": head_dim, "HAS_BIAS": mask, "DROPOUT": drop, "CAUSAL": causal}
        constants |= config(head_dim, TYPES[dtype].itemsize, backward)
        name = f"{kernel.fn.__name__} d{head_dim} {dtype}" + " mask" * mask + " dropout" * drop
        name += " two-sided" * (not causal)
        counted = workloads(
            sys.modules[__name__], LONG, head_dim, TYPES[dtype], 0.1 if drop else 0.0, causal,
            backward=backward, tensors=tensors[kernel], bound="distinct",
        )  # fmt: skip
        found.append(
            case(name, kernel, constants, dtype)
            | {"workloads": counted if head_dim == 64 and mask and drop and dtype != "fp16" else []}
        )
    return found
