"""The Triton backend of RowSparseAdam: one program a row; the equations are in csrc/optim.cpp and history.py.

The gradient's rows are sorted on the device (a stable sort, so that repeats are summed in the order of their appearance: no atomics,
bit-identical from run to run), and the program of a row's first place sums its repeats. Nothing waits for the device: how many
different rows there are is never asked. Scalars of the exact mode are computed in float64, a few dozen a row.

On the CPU it runs in Triton's interpreter, slowly and only to be tested: when TRITON_INTERPRET=1 is set before triton is imported.
"""

# mypy: allow-untyped-defs
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.launched import launched, types_of
from cafe_kernels.optim import history as past

NUMBERS = {"i32": "n first step", "i64": "seed"}


@triton.jit
def _store(x, at, value, mask, position, step, seed, STOCHASTIC: tl.constexpr):
    """To bfloat16 up with the probability that makes the expectation `value`: reference.py's _round."""
    if STOCHASTIC and x.dtype.element_ty == tl.bfloat16:
        column = tl.arange(0, value.shape[0])
        place = position + column // 4
        low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
        zero = low * 0
        word0, word1, _, _ = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + 2)
        word = tl.where(column % 4 < 2, word0, word1)
        random = (word >> (16 * (column % 2)).to(tl.uint32)) & 0xFFFF
        bits = (value.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
        rounded = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
        tl.store(x + at, rounded.to(tl.bfloat16), mask=mask)
    else:
        tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _skipped(p, m, v, s, now, first, history, log_beta1, log_beta2, eps, NEGLIGIBLE: tl.constexpr):
    """The steps s + 1 ... now of a row whose gradient was zero in them."""
    root = tl.sqrt(v)
    log_decay = tl.load(history + (now - first) * 8 + 5)
    at = s
    rho = tl.exp(0.0 * log_decay)  # 1, in float64
    while (at < now) & (s > 0) & (rho > NEGLIGIBLE):
        h = history + (at - first) * 8
        end = tl.minimum(tl.load(h + 6), now.to(tl.float64)).to(tl.int64)
        k = (at - s).to(tl.float64)
        half = tl.exp(0.5 * k * log_beta2)
        rho = tl.exp(k * log_beta1) / half
        m0 = tl.load(h)
        if (m0 > 0) & (rho > NEGLIGIBLE):
            mean = tl.load(h + 1) / m0
            a2 = tl.load(h + 2) / (m0 * mean * mean)
            a3 = tl.load(h + 3) / (m0 * mean * mean * mean)
            a4 = tl.load(h + 4) / (m0 * mean * mean * mean * mean)
            weight = m0 * rho * tl.exp(log_decay - tl.load(history + (end - first) * 8 + 5))
            c2 = (a2 - 1).to(tl.float32)
            c3 = (a3 - 3 * a2 + 2).to(tl.float32)
            c4 = (a4 - 4 * a3 + 6 * a2 - 3).to(tl.float32)
            e = (eps * mean / half).to(tl.float32)
            inverse = 1 / (root + e)
            z = e * inverse
            p -= weight.to(tl.float32) * m * inverse * (1 + z * z * (c2 - z * (c3 - z * c4)))
        at = end
    return p, at


@launched(**NUMBERS)
def adam_rows(
    table, exp_avg, exp_avg_sq, last_step, history, rows, order, values, n, first, step,
    beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, decay, size, step_eps, seed,
    dim: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, EXACT: tl.constexpr, STOCHASTIC: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    step = step.to(tl.int64)
    now = step - 1 if GRADIENT else step
    before = tl.load(rows + i - 1, mask=i > 0, other=-1)
    s = now
    if EXACT:
        s = tl.load(last_step + row).to(tl.int64)
    if (row != before) & (GRADIENT | (s < now)):
        column = tl.arange(0, BLOCK)
        mask = column < dim
        at = row * dim + column
        p = tl.load(table + at, mask=mask, other=0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=mask, other=0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0).to(tl.float32)
        if EXACT:
            gap = (now - s).to(tl.float64)
            log_decay = tl.load(history + (now - first) * 8 + 5) - tl.load(history + (s - first) * 8 + 5)
            p *= tl.exp(log_decay).to(tl.float32)
            p, _ = _skipped(p, m, v, s, now, first, history, log_beta1, log_beta2, eps, NEGLIGIBLE)
            power = tl.exp(gap * log_beta1)
            m *= tl.where(power < 1e-20, 0.0, power).to(tl.float32)
            v *= tl.exp(gap * log_beta2).to(tl.float32)
        if GRADIENT:
            g = tl.zeros([BLOCK], tl.float32)
            j = i
            other = row
            while other == row:
                g += tl.load(values + tl.load(order + j) * dim + column, mask=mask, other=0).to(tl.float32)
                j += 1
                other = tl.load(rows + j, mask=j < n, other=-1)
            m += (g - m) * one_minus_beta1
            v = v * beta2 + g * g * one_minus_beta2
            p = p * decay - size * m / (tl.sqrt(v) + step_eps)
        quads = (dim + 15) // 16 * 4
        _store(table, at, p, mask, row * 3 * quads, step, seed, STOCHASTIC)
        _store(exp_avg, at, m, mask, row * 3 * quads + quads, step, seed, STOCHASTIC)
        _store(exp_avg_sq, at, v, mask, row * 3 * quads + 2 * quads, step, seed, STOCHASTIC)
        if EXACT:
            tl.store(last_step + row, step.to(tl.int32))


def unavailable(table: Tensor) -> str | None:
    interpreted = not isinstance(adam_rows, triton.JITFunction)
    if not (table.is_cuda or interpreted):
        return f"it runs on a GPU, the table is on {table.device}"
    if table.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, got {table.dtype}; use backend='reference'"
    return None


def update(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor | None,
    history: Tensor | None,
    rows: Tensor | None,
    values: Tensor | None,
    first: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    """See reference.update."""
    exact, stochastic = history is not None, seed is not None and torch.bfloat16 in (table.dtype, exp_avg.dtype)
    if rows is None:
        rows = order = torch.arange(len(table), device=table.device)
    else:
        rows, order = torch.sort(rows, stable=True)
    if not len(rows):
        return
    root = math.sqrt(1 - beta2**step)
    dim = table.shape[1]
    block = triton.next_power_of_2(dim)
    adam_rows[(len(rows),)](
        table.detach(), exp_avg, exp_avg_sq, last_step, history, rows, order, values, len(rows), first, step,
        beta1, beta2, 1 - beta1, 1 - beta2, math.log(beta1) if beta1 else -1e30, math.log(beta2) if exact else 0.0, eps,
        1 - lr * weight_decay, lr * root / (1 - beta1**step), root * eps if exact else eps, seed or 0,
        dim=dim, BLOCK=block, GRADIENT=values is not None, EXACT=exact, STOCHASTIC=stochastic,
        NEGLIGIBLE=past.NEGLIGIBLE, num_warps=min(4, max(1, block // 128)), num_stages=1,
    )  # fmt: skip


def compile_cases() -> list[dict[str, Any]]:
    """What the offline compiler builds: lazy and exact steps, and the flush, at the widths and dtypes in use."""
    cases = []
    for dim in (64, 128):
        for dtype, moments in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            for name, gradient, exact in (("lazy", True, False), ("exact", True, True), ("flush", False, True)):
                pointers = dict.fromkeys(("table", "values"), f"*{dtype}")
                pointers |= dict.fromkeys(("exp_avg", "exp_avg_sq"), f"*{moments}")
                pointers |= {"last_step": "*i32", "history": "*fp64", "rows": "*i64", "order": "*i64"}
                types = pointers | types_of(NUMBERS)
                constexprs = {"dim": dim, "BLOCK": dim, "GRADIENT": gradient, "EXACT": exact, "STOCHASTIC": dtype == "bf16",
                              "NEGLIGIBLE": past.NEGLIGIBLE, **dict.fromkeys([] if gradient else ["values"]),
                              **dict.fromkeys([] if exact else ["last_step", "history"])}  # fmt: skip
                cases.append(
                    {
                        "name": f"adam_rows {name} {dtype}, moments {moments}, dim {dim}",
                        "kernel": adam_rows,
                        "signature": {
                            x: "constexpr" if x in constexprs else types.get(x, "fp32") for x in adam_rows.arg_names
                        },
                        "constexprs": constexprs,
                        "num_warps": 1,
                        "num_stages": 1,
                        "dtype": dtype,
                        "matrix": False,  # no products
                    }
                )
    return cases
