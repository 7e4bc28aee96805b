"""Row-sparse Adam in plain PyTorch: one skipped step after the other, as dense Adam makes them. The truth, in fp64 for fp64 tables.

It runs on any device and dtype. Its only approximation: momentum that is older than history.window steps is taken as zero.
"""

import math

import torch
from torch import Tensor

from cafe_kernels.attention.reference import philox
from cafe_kernels.optim import history as past

STREAM = 2  # csrc/philox.h: kOptimizerStream


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
    """Updates the first four in place.

    Args:
        table: (V, d). exp_avg, exp_avg_sq: (V, d) of any float dtype. last_step: (V) int32, each row's last step; None: lazy.
        history: the exact mode's table of past steps (history.py), whose row 0 is step `first`; None: lazy.
        rows: (n) int64 with repeats; None: all.
        values: (n, d), the gradient: step number `step` is made. None: the rows only make up for the steps up to `step`.
        seed: of the stochastic rounding of bfloat16; None rounds to nearest.
    """
    if rows is not None and values is not None:
        rows, group = torch.unique(rows, return_inverse=True)
        values = values.new_zeros(len(rows), table.shape[1], dtype=_precision(table)).index_add_(
            0, group, values.to(_precision(table))
        )
    rows = torch.arange(len(table), device=table.device) if rows is None else rows.unique()
    if len(rows) and not (rows[0] >= 0 and rows[-1] < len(table)):
        bad = int(rows[0] if rows[0] < 0 else rows[-1])
        raise ValueError(f"the gradient has row {bad}, but the table has rows 0 ... {len(table) - 1}")
    p, m, v = (x[rows].to(_precision(table)) for x in (table, exp_avg, exp_avg_sq))
    if history is not None and last_step is not None:
        now = step if values is None else step - 1
        last = last_step[rows].long()
        p, m, v = _skipped(p, m, v, last, now, history, first, beta1, beta2, eps)
        if values is None:
            stale = last < now
            rows, p, m, v = rows[stale], p[stale], m[stale], v[stale]
        last_step[rows] = step
    if values is not None:
        root = math.sqrt(1 - beta2**step)
        m = beta1 * m + (1 - beta1) * values
        v = beta2 * v + (1 - beta2) * values**2
        p = p * (1 - lr * weight_decay)
        p = p - lr * root / (1 - beta1**step) * m / (v.sqrt() + (eps if history is None else root * eps))
    for which, (x, new) in enumerate(((table, p), (exp_avg, m), (exp_avg_sq, v))):
        x[rows] = _round(new, x.dtype, rows, which, step, seed)


def _precision(table: Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def _skipped(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    last: Tensor,
    now: int,
    history: Tensor,
    first: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The steps last + 1 ... now of rows whose gradient was zero in them."""
    gap = (now - last)[:, None]
    log_decay = history[:, past.LOG_DECAY]
    longest = min(int(gap.max()) if len(gap) else 0, past.window(beta1, beta2))
    moved = torch.zeros_like(p)
    for k in range(1, longest + 1):
        j = (last + k).clamp(max=now)
        lr = history[j - first, past.LR][:, None]
        after = (log_decay[now - first] - log_decay[j - first]).exp()[:, None]
        corrected = (v * beta2**k / (1 - beta2 ** j[:, None].double())).sqrt() + eps
        term = lr * after / (1 - beta1 ** j[:, None].double()) * (m * beta1**k) / corrected
        moved += torch.where(k <= gap, term, 0).to(p.dtype)
    decay = (log_decay[now - first] - log_decay[last - first]).exp()[:, None]
    gap = gap.double()
    return (p * decay).to(p.dtype) - moved, (m * beta1**gap).to(p.dtype), (v * beta2**gap).to(p.dtype)


def _round(x: Tensor, dtype: torch.dtype, rows: Tensor, which: int, step: int, seed: int | None) -> Tensor:
    """x as `dtype`. To bfloat16 with a seed: up with the probability that makes the expectation x, by 16 bits of Philox at position
    (3 row + which) quads + column // 4 of attempt `step`."""
    if dtype != torch.bfloat16 or seed is None:
        return x.to(dtype)
    dim = x.shape[1]
    quads = (dim + 15) // 16 * 4
    column = torch.arange(dim, device=x.device)
    position = (rows[:, None] * 3 + which) * quads + column // 4
    counter = [
        position & 0xFFFFFFFF,
        position >> 32,
        torch.full_like(position, step),
        torch.full_like(position, STREAM),
    ]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    word = torch.where(column % 4 < 2, words[0], words[1])
    bits = x.float().view(torch.int32).long() & 0xFFFFFFFF
    random = (word >> 16 * (column % 2)) & 0xFFFF
    rounded = (bits + random) >> 16
    rounded = torch.where(rounded >= 2**15, rounded - 2**16, rounded).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(dtype), rounded)
