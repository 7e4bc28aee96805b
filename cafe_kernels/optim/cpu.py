"""The C++ backend of RowSparseAdam (csrc/optim.cpp): float32 and bfloat16 tables on the CPU.

It uses up to torch.get_num_threads() threads, fewer for few rows; the numbers do not depend on how many.
The environment variable CAFE_KERNELS_ISA (auto, portable, avx2 or avx512) forces a code path.
"""

from typing import Any

import torch
from torch import Tensor

from cafe_kernels import _C
from cafe_kernels.backends import array, machine


def unavailable(table: Tensor) -> str | None:
    if table.device.type != "cpu":
        return f"it runs on the CPU, the table is on {table.device}"
    if table.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, got {table.dtype}; use backend='reference'"
    return None


def update(*arguments: Any) -> None:
    """See reference.update."""
    arrays = [array(x) for x in arguments[:7]]
    _C.adam_rows(*arrays, *arguments[7:], **machine())
