"""`DeviceSampler`: AliasSampler's draws as tensors on a device, the same numbers as on the CPU for the same (seed, offset)."""

import importlib
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cafe_kernels.backends import choose_backend

MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_sampler"}


def backend_module(name: str) -> ModuleType:
    """Its `Table(sampler, device)` draws into a tensor."""
    return importlib.import_module(f"cafe_kernels.sampling.{MODULES[name]}")


class DeviceSampler:
    """What AliasSampler.to(device) returns: its three ways to draw, with tensors of that device in and out.

    On a GPU nothing waits for the device, so no value is checked there: the histories must be right, and a draw of a row that has
    nothing left to draw is -1, where the CPU raises. The table takes 16 bytes an item.
    """

    def __init__(self, sampler: Any, device: torch.device | str, backend: str | None = None) -> None:
        probe = torch.empty(0, device=device)
        self.device = probe.device
        self.backend = choose_backend(backend, backend_module, probe)
        self._table = backend_module(self.backend).Table(sampler, self.device)

    def sample(self, shape: int | Sequence[int], seed: int, offset: int = 0) -> Tensor:
        """int32 of `shape`: AliasSampler.sample."""
        out = torch.empty(shape, dtype=torch.int32, device=self.device)
        self._table.sample(*_checked(seed, offset, out.numel()), out)
        return out

    def sample_excluding(
        self, indptr: Tensor, indices: Tensor, rows: Tensor, k: int, seed: int, offset: int = 0
    ) -> Tensor:
        """int32 (len(rows), k): AliasSampler.sample_excluding. indptr and rows are int64, indices is int32, all on the device."""
        return self._sample_rows(indptr, indices, rows, k, False, seed, offset)

    def sample_distinct(
        self, indptr: Tensor, indices: Tensor, rows: Tensor, k: int, seed: int, offset: int = 0
    ) -> Tensor:
        """int32 (len(rows), k): AliasSampler.sample_distinct. The arguments are as in `sample_excluding`."""
        return self._sample_rows(indptr, indices, rows, k, True, seed, offset)

    def _sample_rows(
        self, indptr: Tensor, indices: Tensor, rows: Tensor, k: int, distinct: bool, seed: int, offset: int
    ) -> Tensor:
        for name, x, dtype in (
            ("indptr", indptr, torch.int64),
            ("indices", indices, torch.int32),
            ("rows", rows, torch.int64),
        ):
            if not isinstance(x, Tensor) or x.dim() != 1 or x.dtype != dtype or x.device != self.device:
                got = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be a 1-D {dtype} tensor on {self.device}, got {got}")
        out = torch.empty(len(rows), k, dtype=torch.int32, device=self.device)
        arrays = (x.contiguous() for x in (indptr, indices, rows))
        self._table.sample_rows(*arrays, distinct, *_checked(seed, offset, out.numel()), out)
        return out


def _checked(seed: int, offset: int, size: int) -> tuple[int, int]:
    seed, offset = operator.index(seed), operator.index(offset)
    for name, value, high in (("seed", seed, 2**64 - 1), ("offset", offset, 2**63 - size)):
        if not 0 <= value <= high:
            raise ValueError(f"{name} must be in 0 ... {high}, got {value}")
    return seed, offset
