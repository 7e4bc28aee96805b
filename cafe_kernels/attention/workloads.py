"""Small packed batches on which cafe_kernels.compile counts what the Triton kernels of distance_attention move and compute."""

from itertools import accumulate
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

# 32 quantiles of the lengths in Amazon Beauty's training histories (two left out, 50 kept), shuffled once.
BEAUTY = [3, 3, 14, 6, 5, 3, 3, 4, 4, 9, 5, 6, 10, 7, 3, 6, 3, 8, 3, 5, 4, 19, 3, 4, 4, 5, 3, 3, 4, 12, 34, 7]
SHORT = {"8 x 50": [50] * 8, "Beauty": BEAUTY}
LONG = {"2 x 200": [200] * 2}
HEADS = 2
# Each program keeps partial sums of log_theta's gradient, and their number is bounded: in a large batch they weigh nothing. So that they
# do not in a small one either, few programs work on it.
PROGRAMS = 2 * HEADS


def workloads(
    backend: ModuleType,
    lengths: dict[str, list[int]],
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    causal: bool = True,
    *,
    backward: bool,
    tensors: int,
    bound: str = "issued",
) -> list[dict[str, Any]]:
    """For a case of `compile_cases()`: runs of the backend's forward or backward, on zeros, since no value changes a count.

    tensors: how many of the size of q the kernel must read or write once. Forward: q, k, v, out. Backward in one pass: q, k, v,
        grad_out, dq, dk, dv; in two passes without dq, or without dk and dv. They are the floor.
    bound: "distinct" where a kernel must read keys again for every block of queries.
    """

    def run(sizes: list[int]) -> None:
        total = sum(sizes)
        q, k, v, out, grad_out = (torch.zeros(total, HEADS, head_dim, dtype=dtype) for _ in range(5))
        distances = max(sizes) if causal else 2 * max(sizes) - 1
        log_theta, lse = torch.zeros(HEADS, distances), torch.zeros(HEADS, total)
        cu_seqlens = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        options = max(sizes), head_dim**-0.5, causal, -1, dropout_p, 0, 0
        with patch.object(backend, "PROGRAMS", PROGRAMS, create=True):  # the C++ backend has no programs
            if backward:
                backend.backward(grad_out, q, k, v, log_theta, cu_seqlens, out, lse, *options)
            else:
                backend.forward(q, k, v, log_theta, cu_seqlens, *options)

    return [
        {
            "name": name,
            "run": lambda sizes=sizes: run(sizes),
            "floor": tensors * sum(sizes) * HEADS * head_dim * dtype.itemsize,
            "bound": bound,
        }
        for name, sizes in lengths.items()
    ]
