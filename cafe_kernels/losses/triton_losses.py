"""The Triton backend of the sampled losses: the equations of csrc/losses.cpp, for tables of any float dtype, in float32.

    token_kernel      negatives a token: a token a program, its rows read in blocks of BLOCK_K; the softmax rescales as it goes
    shared_kernel     negatives that a range of tokens shares: loss, dh and the log-sum-exp, a block of tokens a program, by tl.dot
    columns_kernel    their gradient rows: a block of negatives of a range of tokens a program; makes the logits again
    segments_kernel   sums the rows of the sorted entries, a distinct id a program: no atomics, the same bits in every run

On the CPU it runs in Triton's interpreter, slowly and only to be tested: when TRITON_INTERPRET=1 is set before triton is imported.
Ids are not checked and nothing waits for the device. So a sparse gradient has a row for each entry, in the order of the ids: the sum at an
id's first, zeros at its others, since to know how many ids differ would be to wait.
"""

import itertools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.backends import launchable, vendor_options
from cafe_kernels.launched import launched, types_of
from cafe_kernels.losses.ops import parts_of

BLOCK_K, BLOCK_T, CHUNK = 16, 16, 16
# Three bfloat16 parts of a float32 and six products: float32's digits on the tensor cores of NVIDIA and AMD.
PRECISION = tl.constexpr(
    "ieee" if os.environ.get("TRITON_INTERPRET") == "1" else "bf16x6"
)  # the interpreter has float32's own product
LAUNCH = {"num_warps": 4, "num_stages": 1}
NUMBERS = {"i32": "tokens count stride", "i64": "entries factors"}
# For the kernels with products, whose registers are the limit; maxnreg and matrix_instr_nonkdim as in attention/triton_short.py. With two
# waves wanted, and not as many as fit, LLVM spills no scalar register.
PRODUCTS = LAUNCH | {"num_warps": 8, "maxnreg": 255, "matrix_instr_nonkdim": 16, "waves_per_eu": 2}


def unavailable(h: Tensor, table: Tensor) -> str | None:
    interpreted = not isinstance(token_kernel, triton.runtime.JITFunction)
    if h.device.type != ("cpu" if interpreted else "cuda"):
        return (
            f"it runs on a GPU, h is on {h.device}; TRITON_INTERPRET=1 in the environment interprets it there, slowly"
        )
    if table.dtype not in (torch.float32, torch.float16, torch.bfloat16) or h.dtype == torch.float64:
        return f"it computes in float32, got {h.dtype} and {table.dtype}; use backend='reference'"
    return None


@triton.jit
def _rows(table, intents, item_intent, ids, live, columns, DIM: tl.constexpr, COMPOSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """E of `ids` (n,), float32 (n, len(columns)); zeros where not live."""
    inside = live[:, None] & (columns < DIM)[None, :]
    rows = tl.load(table + ids[:, None] * DIM + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if COMPOSED:
        intent = tl.load(item_intent + ids, mask=live, other=0)
        rows += tl.load(intents + intent[:, None] * DIM + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return rows


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """max(x, 0) + log(1 + e^-|x|), with the digits of a small one: log(1 + e) = log(u) e / (u - 1) for the rounded u = 1 + e."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@launched(**NUMBERS)
def token_kernel(  # type: ignore[no-untyped-def]
    h, table, intents, item_intent, positives, negatives, ignore, positive_log_q, negative_log_q, weights,
    losses, dh, coefficients, tokens, count, positive_weight, negative_weight,
    SOFTMAX: tl.constexpr, COMPOSED: tl.constexpr, IGNORE: tl.constexpr, LOG_Q: tl.constexpr, WEIGHTS: tl.constexpr,
    GRADIENTS: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    token = tl.load(h + t * DIM + columns, mask=columns < DIM, other=0.0)
    positive_id = tl.load(positives + t)
    one = tl.zeros((1,), tl.int64)
    own = tl.sum(_rows(table, intents, item_intent, positive_id + one, one == 0, columns, DIM, COMPOSED), 0)
    positive = tl.sum(own * token)
    if LOG_Q:
        positive -= tl.load(positive_log_q + t)
    top = positive
    others = positive * 0.0
    gradient = tl.zeros((BLOCK_D,), tl.float32)
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights + t)
    for first in range(0, count, BLOCK_K):
        live = first + k < count
        at = t * count + first + k
        ids = tl.load(negatives + at, mask=live, other=0)
        rows = _rows(table, intents, item_intent, ids, live, columns, DIM, COMPOSED)
        logits = tl.sum(rows * token[None, :], 1)
        if LOG_Q:
            logits -= tl.load(negative_log_q + at, mask=live, other=0.0)
        hidden = (ids == positive_id) | (live == 0)
        if IGNORE:
            hidden = hidden | (tl.load(ignore + at, mask=live, other=1) != 0)
        logits = tl.where(hidden, float("-inf"), logits)
        if SOFTMAX:
            higher = tl.maximum(top, tl.max(logits, 0))
            shrink = tl.exp(top - higher)
            shares = tl.exp(logits - higher)
            others = others * shrink + tl.sum(shares, 0)
            gradient = gradient * shrink + tl.sum(shares[:, None] * rows, 0)
            top = higher
            if GRADIENTS:
                tl.store(coefficients + tokens + at, logits, mask=live)
        else:
            others += tl.sum(tl.where(hidden, 0.0, _softplus(logits)), 0)
            if GRADIENTS:
                slopes = weight * negative_weight * tl.where(hidden, 0.0, _sigmoid(logits))
                gradient += tl.sum(slopes[:, None] * rows, 0)
                tl.store(coefficients + tokens + at, slopes, mask=live)
    if SOFTMAX:
        total = others + tl.exp(positive - top)
        # log(total) where the positive is not the largest; else log(1 + others), whose digits softplus keeps
        loss = tl.where(top == positive, _softplus(tl.log(others)), top - positive + tl.log(total))
        slope = -weight * others / total
        gradient *= weight / total
        if GRADIENTS:
            for first in range(0, count, BLOCK_K):
                at = coefficients + tokens + t * count + first + k
                logits = tl.load(at, mask=first + k < count, other=0.0)
                tl.store(at, weight * tl.exp(logits - top) / total, mask=first + k < count)
    else:
        loss = positive_weight * _softplus(-positive) + negative_weight * others
        slope = -weight * positive_weight * _sigmoid(-positive)
    tl.store(losses + t, loss)
    if GRADIENTS:
        tl.store(dh + t * DIM + columns, gradient + slope * own, mask=columns < DIM)
        tl.store(coefficients + t, slope)


@triton.jit
def _shared_logits(  # type: ignore[no-untyped-def]
    h, live_tokens, t, positive_id, table, intents, item_intent, ids, live, k, sequence, ignore, negative_log_q,
    group, count,
    COMPOSED: tl.constexpr, IGNORE: tl.constexpr, SEQUENCE: tl.constexpr, LOG_Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The logits (tokens, BLOCK_K) of the negatives `ids`, k of a group, -inf where hidden. By CHUNK columns, for the registers."""
    logits = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for begin in range(0, DIM, CHUNK):
        columns = begin + tl.arange(0, CHUNK)
        inside = live_tokens[:, None] & (columns < DIM)[None, :]
        token = tl.load(h + t[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
        rows = _rows(table, intents, item_intent, ids, live, columns, DIM, COMPOSED)
        logits = tl.dot(token, tl.trans(rows), logits, input_precision=PRECISION)
    if LOG_Q:
        logits -= tl.load(negative_log_q + group * count + k, mask=live, other=0.0)[None, :]
    hidden = (ids[None, :] == positive_id[:, None]) | (live == 0)[None, :]
    if IGNORE:
        row = t
        if SEQUENCE:
            row = tl.load(sequence + t, mask=live_tokens, other=0)
        both = live_tokens[:, None] & live[None, :]
        hidden = hidden | (tl.load(ignore + row[:, None] * count + k[None, :], mask=both, other=1) != 0)
    penalty = tl.where(hidden, 1.0, 0.0)  # a mask of floats: AMD's compiler cannot keep one of bits in shared memory
    return tl.where(penalty > 0, float("-inf"), logits)


@launched(**NUMBERS)
def shared_kernel(  # type: ignore[no-untyped-def]
    h, table, intents, item_intent, positives, negatives, sequence, ignore, positive_log_q, negative_log_q, weights, starts,
    losses, dh, coefficients, lse, count, positive_weight, negative_weight,
    SOFTMAX: tl.constexpr, COMPOSED: tl.constexpr, IGNORE: tl.constexpr, SEQUENCE: tl.constexpr, LOG_Q: tl.constexpr,
    WEIGHTS: tl.constexpr, GRADIENTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """starts: the ranges of tokens; range r shares negatives row r (GROUPS), or all share the only row."""
    r = tl.program_id(0).to(tl.int64)
    group = r if GROUPS else r * 0
    columns = tl.arange(0, BLOCK_D)
    end = tl.load(starts + r + 1)
    for begin in range(tl.load(starts + r), end, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        live = t < end
        inside = live[:, None] & (columns < DIM)[None, :]
        token = tl.load(h + t[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
        positive_id = tl.load(positives + t, mask=live, other=0)
        own = _rows(table, intents, item_intent, positive_id, live, columns, DIM, COMPOSED)
        positive = tl.sum(own * token, 1)
        if LOG_Q:
            positive -= tl.load(positive_log_q + t, mask=live, other=0.0)
        top = positive
        others = positive * 0.0
        gradient = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for first in tl.range(0, count, BLOCK_K, disable_licm=True):
            k = first + tl.arange(0, BLOCK_K)
            there = k < count
            ids = tl.load(negatives + group * count + k, mask=there, other=0)
            logits = _shared_logits(
                h, live, t, positive_id, table, intents, item_intent, ids, there, k, sequence, ignore, negative_log_q,
                group, count, COMPOSED, IGNORE, SEQUENCE, LOG_Q, BLOCK_T, BLOCK_K, DIM, CHUNK,
            )  # fmt: skip
            if SOFTMAX:
                higher = tl.maximum(top, tl.max(logits, 1))
                shrink = tl.exp(top - higher)
                shares = tl.exp(logits - higher[:, None])
                others = others * shrink + tl.sum(shares, 1)
                gradient *= shrink[:, None]
                top = higher
            else:
                hidden = logits == float("-inf")
                others += tl.sum(tl.where(hidden, 0.0, _softplus(logits)), 1)
                shares = tl.where(hidden, 0.0, _sigmoid(logits))
            if GRADIENTS:
                rows = _rows(table, intents, item_intent, ids, there, columns, DIM, COMPOSED)
                gradient += tl.dot(shares, rows, input_precision=PRECISION)
        weight = tl.zeros((BLOCK_T,), tl.float32) + 1.0  # after the loop: for the registers
        if WEIGHTS:
            weight = tl.load(weights + t, mask=live, other=0.0)
        if SOFTMAX:
            total = others + tl.exp(positive - top)
            loss = tl.where(top == positive, _softplus(tl.log(others)), top - positive + tl.log(total))
            slope = -weight * others / total
            gradient *= (weight / total)[:, None]
            tl.store(lse + t, top + tl.log(total), mask=live)
        else:
            loss = positive_weight * _softplus(-positive) + negative_weight * others
            slope = -weight * positive_weight * _sigmoid(-positive)
            gradient *= (weight * negative_weight)[:, None]
        tl.store(losses + t, loss, mask=live)
        if GRADIENTS:
            own = _rows(
                table, intents, item_intent, positive_id, live, columns, DIM, COMPOSED
            )  # again: for the registers
            out = dh + t[:, None] * DIM + columns[None, :]
            tl.store(out, gradient + slope[:, None] * own, mask=inside)
            tl.store(coefficients + t, slope, mask=live)


@launched(**NUMBERS)
def columns_kernel(  # type: ignore[no-untyped-def]
    h, table, intents, item_intent, positives, negatives, sequence, ignore, negative_log_q, weights, starts, lse,
    negative_rows, count, stride, negative_weight,
    SOFTMAX: tl.constexpr, COMPOSED: tl.constexpr, IGNORE: tl.constexpr, SEQUENCE: tl.constexpr, LOG_Q: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    group = r if GROUPS else r * 0
    columns = tl.arange(0, BLOCK_D)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    there = k < count
    ids = tl.load(negatives + group * count + k, mask=there, other=0)
    gradient = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    end = tl.load(starts + r + 1)
    for begin in tl.range(tl.load(starts + r), end, BLOCK_T, disable_licm=True):
        t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        live = t < end
        positive_id = tl.load(positives + t, mask=live, other=0)
        logits = _shared_logits(
            h, live, t, positive_id, table, intents, item_intent, ids, there, k, sequence, ignore, negative_log_q,
            group, count, COMPOSED, IGNORE, SEQUENCE, LOG_Q, BLOCK_T, BLOCK_K, DIM, CHUNK,
        )  # fmt: skip
        if SOFTMAX:
            slopes = tl.exp(logits - tl.load(lse + t, mask=live, other=0.0)[:, None])
        else:
            slopes = negative_weight * tl.where(logits == float("-inf"), 0.0, _sigmoid(logits))
        if WEIGHTS:
            slopes *= tl.load(weights + t, mask=live, other=0.0)[:, None]
        slopes = tl.where(live[:, None], slopes, 0.0)
        token = tl.load(
            h + t[:, None] * DIM + columns[None, :], mask=live[:, None] & (columns < DIM)[None, :], other=0.0
        )
        gradient += tl.dot(tl.trans(slopes), token, input_precision=PRECISION)
    out = negative_rows + (r * count + k)[:, None] * stride + columns[None, :]
    tl.store(out, gradient, mask=there[:, None] & (columns < DIM)[None, :])


@launched(**NUMBERS)
def segments_kernel(  # type: ignore[no-untyped-def]
    order, starts, targets, h, coefficients, rows, scale, out, entries, factors, tokens, count, stride,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Segments that are not there start at `entries`."""
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + segment)
    if begin < entries:
        columns = tl.arange(0, BLOCK_D)
        inside = columns < DIM
        total = tl.zeros((BLOCK_D,), tl.float32)
        for place in range(begin, tl.load(starts + segment + 1)):
            e = tl.load(order + place)
            if e < factors:
                t = e
                if e >= tokens:
                    t = (e - tokens) // count
                total += tl.load(coefficients + e) * tl.load(h + t * DIM + columns, mask=inside, other=0.0)
            else:
                total += tl.load(rows + (e - factors) * stride + columns, mask=inside, other=0.0)
        row = tl.load(targets + segment)
        tl.store(out + row * DIM + columns, total * tl.load(scale), mask=inside)


def forward(
    h: Tensor,
    table: Tensor,
    intents: Tensor | None,
    item_intent: Tensor | None,
    positives: Tensor,
    negatives: Tensor,
    sequence: Tensor | None,
    ignore: Tensor | None,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    weights: Tensor | None,
    kind: str,
    positive_weight: float,
    negative_weight: float,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    tokens, dim = h.shape
    count = negatives.shape[-1]
    losses = h.new_empty(tokens)
    if tokens == 0:
        if gradients:
            gradients[2].zero_()
        return losses, losses.sum()
    dh, coefficients, negative_rows = gradients or (losses, losses, losses)
    ignore = None if ignore is None else ignore.view(torch.uint8)
    common: dict[str, Any] = {
        "SOFTMAX": kind == "softmax", "COMPOSED": intents is not None, "IGNORE": ignore is not None,
        "LOG_Q": positive_log_q is not None, "WEIGHTS": weights is not None, "DIM": dim, "BLOCK_D": _block(dim),
    }  # fmt: skip
    inputs = h, table, intents, item_intent, positives, negatives
    if negatives.dim() == 2 and sequence is None:
        token_kernel[(tokens,)](
            *inputs, ignore, positive_log_q, negative_log_q, weights, losses, dh, coefficients, tokens, count,
            positive_weight, negative_weight, GRADIENTS=gradients is not None, BLOCK_K=BLOCK_K, **common, **LAUNCH,
        )  # fmt: skip
        return losses, losses.sum()
    groups = negatives.dim() == 2
    ranges = parts_of(h, negatives, sequence)
    rows = torch.arange(ranges + 1, device=h.device)
    starts = torch.searchsorted(sequence, rows) if groups and sequence is not None else rows * tokens // ranges
    blocks = -(-tokens // BLOCK_T)
    fine = starts if groups else (torch.arange(blocks + 1, device=h.device) * BLOCK_T).clamp(max=tokens)
    common |= {"SEQUENCE": sequence is not None, "GROUPS": groups, "BLOCK_T": BLOCK_T, "BLOCK_K": BLOCK_K}
    common |= {"CHUNK": min(CHUNK, _block(dim)), **launchable(PRODUCTS)}
    lse = torch.empty_like(losses)
    shared_kernel[(len(fine) - 1,)](
        *inputs, sequence, ignore, positive_log_q, negative_log_q, weights, fine, losses, dh, coefficients, lse, count,
        positive_weight, negative_weight, GRADIENTS=gradients is not None, **common,
    )  # fmt: skip
    if gradients:
        columns_kernel[(ranges, triton.cdiv(count, BLOCK_K))](
            *inputs, sequence, ignore, negative_log_q, weights, starts, lse, negative_rows, count,
            negative_rows.shape[1], negative_weight, **common,
        )  # fmt: skip
    return losses, losses.sum()


def table_gradient(
    scale: Tensor,
    h: Tensor,
    shape: torch.Size,
    ids: Tensor,
    coefficients: Tensor,
    negative_rows: Tensor,
    dense: bool,
    item_intent: Tensor | None,
    intents_shape: torch.Size | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    order, starts, distinct = _sorted(ids)
    entries = h, coefficients, negative_rows
    if dense:
        rows, places = _sum(order, starts, distinct, *entries, scale, h.new_zeros(shape)), item_intent
    else:
        ids = ids[order]
        rows = _sum(order, starts, starts, *entries, scale, h.new_zeros(len(ids), shape[1]))
        places = None if item_intent is None else item_intent[ids]
    dintents = None
    if places is not None and intents_shape is not None:
        none = h[:0], coefficients[:0], rows
        order, starts, intents = _sorted(places)
        dintents = _sum(order, starts, intents, *none, torch.ones_like(scale), h.new_zeros(intents_shape))
    return ids[:0] if dense else ids, rows, dintents


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts ids stably; where each distinct id begins in it, followed by len(ids) to the end; and the distinct ids.
    Without a wait for the device, so nobody knows how many are distinct."""
    ascending, order = torch.sort(ids, stable=True)
    place = torch.arange(len(ids), device=ids.device)
    first = torch.ones_like(ascending, dtype=torch.bool)
    first[1:] = ascending[1:] != ascending[:-1]
    starts = torch.where(first, place, len(ids)).sort().values
    starts = torch.cat([starts, starts.new_full((1,), len(ids))])
    return order, starts, ascending[starts[:-1].clamp(max=max(0, len(ids) - 1))]


def _sum(
    order: Tensor,
    starts: Tensor,
    targets: Tensor,
    h: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    scale: Tensor,
    out: Tensor,
) -> Tensor:
    """Row targets[s] of `out` is the sum of segment s."""
    segments = len(starts) - 1
    if segments:
        count = max(1, (len(coefficients) - len(h)) // max(1, len(h)))
        segments_kernel[(segments,)](
            order, starts, targets, h, coefficients, rows, scale, out, len(order), len(coefficients), len(h), count,
            rows.shape[1], DIM=out.shape[1], BLOCK_D=_block(out.shape[1]), **LAUNCH,
        )  # fmt: skip
    return out


def _block(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def compile_cases() -> list[dict[str, Any]]:
    """What training launches at d = 64 and 128: Eq. 9; the sampled softmax of items, where shared negatives are corrected by log-Q and
    hidden from the sequences that hold them, and that of all intents; tables that are composed, or bfloat16."""
    ids, real = "*i64", "*fp32"
    types = {
        "item_intent": ids, "positives": ids, "negatives": ids, "sequence": ids, "ignore": "*u8", "starts": ids, "order": ids,
        "targets": ids, "positive_weight": "fp32", "negative_weight": "fp32", **types_of(NUMBERS),
    }  # fmt: skip
    eq9, items, intents = "bce", "softmax of items", "softmax of intents"
    asked = [(kernel, kind) for kind in (items, intents) for kernel in (shared_kernel, columns_kernel)]
    asked += [(token_kernel, eq9), (token_kernel, items), (segments_kernel, "sums")]
    cases = []
    for dim, dtype, composed, (kernel, kind) in itertools.product((64, 128), ("fp32", "bf16"), (False, True), asked):
        plain = dtype == "fp32" and not composed
        if (not plain and kind in (intents, "sums")) or (dtype == "bf16" and (dim, composed) != (128, True)):
            continue
        absent = ["intents", "item_intent"] * (not composed) + ["positive_log_q", "negative_log_q", "ignore"] * (
            kind != items
        )
        absent += ["sequence"] * (kind != items)
        fixed: dict[str, Any] = {
            **dict.fromkeys(absent), "SOFTMAX": kind != eq9, "COMPOSED": composed, "IGNORE": kind == items,
            "SEQUENCE": kind == items, "LOG_Q": kind == items, "WEIGHTS": True, "GRADIENTS": True, "GROUPS": False,
            "BLOCK_K": BLOCK_K, "BLOCK_T": BLOCK_T, "DIM": dim, "BLOCK_D": dim, "CHUNK": CHUNK,
        }  # fmt: skip
        fixed = {n: value for n, value in fixed.items() if n in kernel.arg_names}
        tables = dict.fromkeys(("table", "intents"), f"*{dtype}")
        launch = PRODUCTS if "BLOCK_T" in kernel.arg_names else LAUNCH
        cases.append({
            "name": f"{kernel.__name__}, {kind}, d={dim}, {dtype} table" + ", composed" * composed, "kernel": kernel,
            "signature": {n: "constexpr" if n in fixed else (types | tables).get(n, real) for n in kernel.arg_names},
            "constexprs": fixed, **LAUNCH, "num_warps": launch["num_warps"], "options": vendor_options(launch), "dtype": "fp32",
        })  # fmt: skip
    return cases
