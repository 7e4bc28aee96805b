# mypy: allow-untyped-defs
"""What the short and the long Triton kernels share: products, the distances of a tile, dropout's mask, the cases to compile.

Logits are kept in base 2: exp2 is one instruction on a GPU, exp is two. Loops say disable_licm where what the compiler would compute
before them, index by index, would fill the registers.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.backends import ONE_VENDOR, vendor_options
from cafe_kernels.launched import launched, types_of

LOG2_E = tl.constexpr(1.4426950408889634)
REDUCED = 16  # distances that one program of the last reduction sums
LAUNCH = {"num_warps": 4, "num_stages": 1}  # of the kernels that are not tuned

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# For compile_cases: head width, type, log_theta, dropout, causal. float16, whose code is bfloat16's or shorter, in one width only.
VARIANTS = [
    *(
        (*shape, extras, extras, True)
        for shape in itertools.product((16, 32, 64, 96, 128, 256), ("fp32", "bf16"))
        for extras in (False, True)
    ),
    *((64, "fp16", extras, extras, True) for extras in (False, True)),
    *(
        (*shape, mask, not mask, True)
        for shape in ((64, "fp32"), (64, "bf16"), (128, "fp32"), (128, "bf16"), (256, "bf16"))
        for mask in (False, True)
    ),
    *((*shape, True, True, False) for shape in itertools.product((16, 32, 64), ("fp32", "bf16"))),
    *((64, dtype, False, False, False) for dtype in ("fp32", "bf16")),
]
NUMBERS = {
    "i32": "total share heads distances window sequences programs width blocks shift",
    "i64": "threshold seed offset",
}
ARGUMENTS = NUMBERS | {
    "fp32": "scale keep_scale",
    "*i32": "cu_seqlens starts",
    "*fp32": "log_theta lse delta partial dlog_theta",
}


@triton.jit
def load(rows, count, column, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """BLOCK rows and the columns `column`, zero from row `count` and column HEAD_DIM on. `rows` points at the first."""
    i = tl.arange(0, BLOCK)[:, None]
    mask = (i < count) & (column < HEAD_DIM)[None, :]
    return tl.load(rows + (i * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store(rows, value, count, column, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None]
    mask = (i < count) & (column < HEAD_DIM)[None, :]
    tl.store(rows + (i * stride + column[None, :]), value.to(rows.dtype.element_ty), mask)


INTERPRETED = tl.constexpr(not isinstance(load, triton.JITFunction))  # TRITON_INTERPRET=1


@triton.jit
def dot(a, b, accumulator=None):
    if INTERPRETED and a.dtype == tl.bfloat16:  # which the interpreter multiplies as integers; float32 gives the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def product(a, b, a_count, b_count, stride, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """a b' of two blocks of rows, CHUNK columns at a time."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, HEAD_DIM, CHUNK):
        column = first + tl.arange(0, CHUNK)
        x = load(a, a_count, column, stride, BLOCK, HEAD_DIM)
        total = dot(x, tl.trans(load(b, b_count, column, stride, BLOCK, HEAD_DIM)), total)
    return total


@triton.jit
def skew(x, BLOCK: tl.constexpr):
    """Row i of x (BLOCK, BLOCK) moved so that what belongs to one distance stands in one column: in column u the number of
    i - j = BLOCK - 1 - u where i + u >= BLOCK - 1, and of i - j = -1 - u elsewhere."""
    i, u = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    return tl.gather(x, (i + u + 1) & (BLOCK - 1), 1)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """reference.philox. tl.philox does the same with all rounds written out, whose keys fill the registers of a loop around it."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.range(10, disable_licm=True):
        high, low = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c2, c3 = tl.umulhi(c0, 0xD2511F53) ^ c3 ^ k1, c0 * 0xD2511F53
        c0, c1 = high ^ c1 ^ k0, low
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def drop_bits(token, head, quad, seed, offset, threshold, BLOCK: tl.constexpr):
    """Dropout's mask (reference.dropout_keep) of query tokens `token` and the BLOCK <= 64 key positions from 4 * quad on:
    bit b of a token's word says whether the weight of position 4 * quad + b is dropped."""
    seed, offset, t = seed.to(tl.int64), offset.to(tl.int64), threshold.to(tl.uint32)
    step = tl.arange(0, 4)[None, :]
    zero = token.to(tl.uint32)[:, None] * 0 + step.to(tl.uint32) * 0
    bits = token.to(tl.uint64) * 0
    for position in tl.range(0, BLOCK, 16, disable_licm=True):  # and not one wide tile, for the sake of registers
        c0 = zero + (head * 65536 + quad + position // 4 + step).to(tl.uint32)
        c1 = zero + token[:, None].to(tl.uint32)
        w0, w1, w2, w3 = philox(c0, c1, zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32), seed)
        d0, d1, d2, d3 = (w0 < t).to(tl.int32), (w1 < t).to(tl.int32), (w2 < t).to(tl.int32), (w3 < t).to(tl.int32)
        four = d0 | d1 << 1 | d2 << 2 | d3 << 3
        bits |= tl.sum(four << (4 * step), 1).to(tl.uint64) << position
    return bits


@triton.jit
def from_column(first, BLOCK: tl.constexpr):
    """The mask j >= first[i], (BLOCK, BLOCK). In two steps, j = a + b: a is a constant for each register, which j is not."""
    a, b = 8 * tl.arange(0, BLOCK // 8)[None, :, None], tl.arange(0, 8)[None, None, :]
    return tl.reshape(a >= first[:, None, None] - b, BLOCK, BLOCK)


@triton.jit
def between_columns(first, last, BLOCK: tl.constexpr):
    """The mask first[i] <= j < last[i]; in two steps, as from_column. One comparison, since AMD's scalar registers hold one mask for
    each register, and not two: what is below 0 is a large unsigned number."""
    a, b = 8 * tl.arange(0, BLOCK // 8)[None, :, None], tl.arange(0, 8)[None, None, :]
    inside = (a + (b - first[:, None, None])).to(tl.uint32) < (last - first).to(tl.uint32)[:, None, None]
    return tl.reshape(inside, BLOCK, BLOCK)


@triton.jit
def mark_dropped(weights, bits, BLOCK: tl.constexpr):
    """`weights` (BLOCK, BLOCK) >= 0 with a minus sign where the bits of their row are 1; in two steps, as from_column. A sign needs no
    register of its own, unlike a mask."""
    a, b = 8 * tl.arange(0, BLOCK // 8)[None, :, None], tl.arange(0, 8)[None, None, :].to(tl.uint32)
    low, high = bits.to(tl.uint32)[:, None, None] >> b, (bits >> 32).to(tl.uint32)[:, None, None] >> b
    sign = tl.where(a < 32, low, high) << (31 - (a & 31)).to(tl.uint32)
    sign = tl.reshape(sign & 0x80000000, BLOCK, BLOCK)
    return (weights.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def zero_dropped(x, weights):
    """x, but 0 where `weights` bear a minus sign."""
    dropped = weights.to(tl.int32, bitcast=True) >> 31  # all bits, or none
    return (x.to(tl.int32, bitcast=True) & (dropped ^ -1)).to(tl.float32, bitcast=True)


@launched(**NUMBERS)
def reduce_kernel(partial, dlog_theta, programs, heads, width, shift, distances, REDUCED: tl.constexpr):
    """dlog_theta (heads, distances) = the sum of partial (programs, heads, width) over programs, always in the same order. Column t
    of dlog_theta is column t + shift of partial."""
    head, t = tl.program_id(1), tl.program_id(0) * REDUCED + tl.arange(0, REDUCED)
    column = t + shift
    total = tl.zeros((64, REDUCED), tl.float32)
    for first in range(0, programs, 64):
        p = first + tl.arange(0, 64)
        row = partial + (p[:, None].to(tl.int64) * heads + head) * width + column[None, :]
        there = (t < distances) & (column >= 0) & (column < width)
        total += tl.load(row, mask=(p < programs)[:, None] & there[None, :], other=0.0)
    tl.store(dlog_theta + head * distances + t, tl.sum(total, 0), mask=t < distances)


def reduce(partial: Tensor, dlog_theta: Tensor, causal: bool) -> Tensor:
    """partial (programs, heads, width): distance 0 is in its first column, or, not causal, in the middle one, width / 2."""
    (programs, heads, width), distances = partial.shape, dlog_theta.shape[1]
    shift = 0 if causal else width // 2 - distances // 2
    grid = triton.cdiv(distances, REDUCED), heads
    reduce_kernel[grid](partial, dlog_theta, programs, heads, width, shift, distances, REDUCED=REDUCED, **LAUNCH)
    return dlog_theta


def dropout(dropout_p: float) -> tuple[int, float]:
    """What a word must reach to be kept, and the factor of what is kept."""
    return min(round(dropout_p * 2**32), 2**32 - 1), 1 / (1 - dropout_p)


def case(name: str, kernel: Any, constants: dict[str, Any], dtype: str = "fp32") -> dict[str, Any]:
    """A line of compile_cases: what triton.compile needs to know of a kernel, as cafe_kernels.compile reads it."""
    types = types_of(ARGUMENTS)
    fixed = {key: value for key, value in constants.items() if key not in ("num_warps", "num_stages", *ONE_VENDOR)}
    if not fixed.get("HAS_BIAS", True):
        fixed |= {name: None for name in ("log_theta", "partial") if name in kernel.arg_names}
    signature = {x: "constexpr" if x in fixed else types.get(x, f"*{dtype}") for x in kernel.arg_names}
    made = {"name": name, "kernel": kernel, "signature": signature, "constexprs": fixed, "dtype": dtype}
    made["options"] = vendor_options(constants)
    return made | {key: constants.get(key, default) for key, default in LAUNCH.items()}
