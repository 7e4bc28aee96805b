"""The C++ backend of DeviceSampler (csrc/sampler.cpp): tensors on the CPU, written in place."""

from typing import Any

import torch
from torch import Tensor


def unavailable(x: Tensor) -> str | None:
    return None if x.device.type == "cpu" else f"it runs on the CPU, asked for {x.device}"


class Table:
    def __init__(self, sampler: Any, device: torch.device) -> None:
        self.table, self.threads = sampler._table, sampler.num_threads

    def sample(self, seed: int, offset: int, out: Tensor) -> None:
        self.table.sample(seed, offset, out.numpy(), self.threads)

    def sample_rows(
        self, indptr: Tensor, indices: Tensor, rows: Tensor, distinct: bool, seed: int, offset: int, out: Tensor
    ) -> None:
        arrays = indptr.numpy(), indices.numpy(), rows.numpy()
        self.table.sample_rows(*arrays, distinct, seed, offset, out.numpy(), self.threads)
