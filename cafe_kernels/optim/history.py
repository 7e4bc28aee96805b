"""What the exact mode remembers of past steps: one table for all rows, 64 bytes a step, so that a row makes up for any number
of skipped steps at once.

A row last updated at step s, with moments m and v, meets a zero gradient in the steps j > s. Dense Adam then subtracts, with
k = j - s, c_j = sqrt(1 - beta2^j), rho = beta1 / sqrt(beta2),

    lr_j c_j / (1 - beta1^j) * rho^k m / (sqrt(v) + eps q_j),      q_j = c_j beta2^(-k/2),

and the decays (1 - lr_i wd) of the steps i > j shrink what it subtracted. Row s of the table holds the moments of q,

    M_i = sum_j w_j rho^k q_j^i,  i = 0 ... 4,      w_j = lr_j c_j / (1 - beta1^j) * product of (1 - lr_i wd) over i > j,

over the steps j = s + 1, s + 2 ... of its block. A block ends when q has grown by the factor SPREAD, or at the first step whose
weight no longer counts; the sum goes on with the row of the block's last step, whose moments only need scaling. From the moments a
backend has the sum of a block as a series about the mean E of eps q, with central moments (csrc/optim.cpp has the formula).

Error. In a block q is within a factor SPREAD = 1.15, so |q / mean - 1| <= 0.14 and, about the middle, 0.07. The series is exact for
polynomials of degree 4 in q and leaves a remainder of at most the sixth moment (0.07^6 = 1e-7 of the block's sum; a fifth, where
weights are skewed), and less as sqrt(v) outgrows eps. Terms with rho^k < NEGLIGIBLE (beta1 = 0.9: k > 198) are dropped: together
2^-30 of the first ones. The decay is exact but for rounding. So the errors are those of float32, which dense Adam makes too.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from cafe_kernels import _C

SPREAD = 1.15
NEGLIGIBLE = 2.0**-30  # csrc/optim.cpp: kNegligible
MOMENTS, LOG_DECAY, NEXT, LR = (
    5,
    5,
    6,
    7,
)  # columns: M_0 ... M_4, log of all decays up to s, last step of the block, lr_s


def window(beta1: float, beta2: float) -> int:
    """The number of steps after which a row's momentum no longer counts."""
    return math.ceil(math.log(NEGLIGIBLE) / math.log(beta1 / math.sqrt(beta2))) if beta1 else 1


def new(device: torch.device, rows: int = 256) -> Tensor:
    """A table that begins at the present step: its row 0."""
    history = torch.zeros(rows, 8, dtype=torch.float64, device=device)
    history[:, NEXT].fill_(torch.inf)
    return history


def append(
    history: Tensor, first: int, block: int, step: int, lr: float, weight_decay: float, beta1: float, beta2: float
) -> tuple[Tensor, int]:
    """Adds `step` to the table whose row 0 is step `first` and whose open block begins at `block`: in place, without looking at a
    value on the device. Returns the table, which was replaced by a larger one if it was full, and the open block's beginning."""
    if step - first >= len(history):
        history = torch.cat([history, new(history.device, len(history))])
    length = window(beta1, beta2)
    if step - block > length or _log_q(step, beta2) - _log_q(block + 1, beta2) > math.log(SPREAD):
        history[block - first : step - 1 - first, NEXT].fill_(step - 1)
        block = step - 1
    decay = 1 - lr * weight_decay
    c = math.sqrt(-math.expm1(step * math.log(beta2)))
    weight = lr * c / (1 - beta1**step)
    powers = _powers(beta1, beta2, length, history.device)
    if history.device.type == "cpu":
        _C.append_step(history.numpy(), powers.numpy(), first, block, step, c, weight, decay, lr)
    else:
        append_step(history, powers, first, block, step, c, weight, decay, lr)
    return history, block


def append_step(
    history: Tensor, powers: Tensor, first: int, block: int, step: int, c: float, weight: float, decay: float, lr: float
) -> None:
    """What csrc/optim.cpp's append_step does, on any device."""
    moments = history[block - first : step - first, :MOMENTS]
    moments *= decay
    powers = powers[len(powers) - (step - block) :]
    for i in range(MOMENTS):
        moments[:, i].add_(powers[:, i], alpha=weight * c**i)
    torch.add(history[step - 1 - first, LOG_DECAY], math.log(decay), out=history[step - first, LOG_DECAY])
    history[step - first, LR].fill_(lr)  # history[...] = lr would copy a number from the CPU and wait for it


def _log_q(j: int, beta2: float) -> float:
    """log q_j for a fixed s, but for a constant."""
    return 0.5 * math.log(-math.expm1(j * math.log(beta2))) - 0.5 * j * math.log(beta2)


@lru_cache(maxsize=16)
def _powers(beta1: float, beta2: float, length: int, device: torch.device) -> Tensor:
    """(length, 5): rho^k beta2^(-i k / 2) for k = length ... 1."""
    k = torch.arange(length, 0, -1, dtype=torch.float64)[:, None]
    rho, root = beta1 / math.sqrt(beta2), math.sqrt(beta2)
    return (rho**k * root ** (-k * torch.arange(MOMENTS))).to(device)
