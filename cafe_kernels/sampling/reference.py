"""The sampler's numbers in plain numpy: what csrc/sampler.cpp must reproduce bit for bit. Sources: see __init__.py."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

U32 = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
STREAM = 0  # csrc/philox.h: kSamplerStream
ATTEMPTS = 256  # csrc/sampler.cpp: kAttempts


def philox(seed: int, position: Any, attempt: Any = 0, stream: Any = 0) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 with key (seed) and counter (position low, high, attempt, stream): (..., 4) words."""
    position, attempt, stream = np.broadcast_arrays(*(np.asarray(x, np.uint64) for x in (position, attempt, stream)))
    c0, c1, c2, c3 = position & U32, position >> HALF, attempt, stream
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ np.uint64(k0), b & U32, (a >> HALF) ^ c3 ^ np.uint64(k1), a & U32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def alias_table(p: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Thresholds (times 2^-32) and aliases. A large item (p V >= 1) fills up the small ones, in the order of their ids,
    until it is small itself and the next large one fills it up."""
    n = len(p)
    scaled = (p * n).tolist()
    threshold, alias = [2**32 - 1] * n, list(range(n))
    small = iter([i for i in range(n) if scaled[i] < 1])
    large = iter([i for i in range(n) if scaled[i] >= 1])

    def put(i: int, probability: float, other: int) -> None:
        threshold[i] = min(max(int(probability * 2**32 + 0.5), 1), 2**32 - 1) if probability > 0 else 0
        alias[i] = other

    i, j = next(small, None), next(large, None)
    rest = scaled[j] if j is not None else 0.0
    while j is not None:
        if rest < 1:
            filler = next(large, None)
            if filler is None:
                break
            put(j, rest, filler)
            rest = (rest + scaled[filler]) - 1
            j = filler
        elif i is not None:
            put(i, scaled[i], j)
            rest -= 1 - scaled[i]
            i = next(small, None)
        else:
            break
    while i is not None:  # full but for rounding
        if p[i] == 0:
            put(i, 0.0, int(np.argmax(p)))
        i = next(small, None)
    return np.array(threshold, np.uint64), np.array(alias, np.int32)


class ReferenceSampler:
    """AliasSampler's three ways to draw, for probabilities p."""

    def __init__(self, p: npt.NDArray[np.float64]) -> None:
        self.p = p
        self.threshold, self.alias = alias_table(p)

    def draw(self, seed: int, position: Any, attempt: Any = 0) -> npt.NDArray[np.int32]:
        word = philox(seed, position, attempt, STREAM)
        n = np.uint64(len(self.p))
        place = word[..., 1] * n + (word[..., 0] * n >> HALF)  # floor(x V / 2^32) of the 64-bit number x
        column = (place >> HALF).astype(np.int64)
        return np.where(place & U32 < self.threshold[column], column, self.alias[column]).astype(np.int32)

    def sample(self, n: int, seed: int, offset: int) -> npt.NDArray[np.int32]:
        return self.draw(seed, offset + np.arange(n, dtype=np.uint64))

    def sample_rows(
        self, indptr: Any, indices: Any, rows: Any, k: int, distinct: bool, seed: int, offset: int
    ) -> npt.NDArray[np.int32]:
        out = np.empty((len(rows), k), np.int32)
        for i, row in enumerate(rows):
            taken = np.zeros(len(self.p), bool)
            taken[indices[indptr[row] : indptr[row + 1]]] = True
            left: npt.NDArray[np.intp] | None = None
            for j in range(k):
                position = offset + i * k + j
                found = [v for v in self.draw(seed, position, np.arange(ATTEMPTS)) if not taken[v]]
                if not found:  # search the exact list of what is left, which may be out of date, then a new one
                    for stale in (True, False):
                        if left is None or not stale:
                            left = np.flatnonzero(~taken & (self.p > 0))
                            if not left.size:
                                raise ValueError(f"rows[{i}] = {row}: {j} items are outside its history, k = {k}")
                            cumulative = np.cumsum(self.p[left])
                        attempts = np.arange(ATTEMPTS, 2 * ATTEMPTS) if stale else np.array([2 * ATTEMPTS])
                        word = philox(seed, position, attempts, STREAM)
                        u = ((word[:, 0] | word[:, 1] << HALF) >> np.uint64(11)).astype(np.float64) * 2.0**-53
                        at = np.searchsorted(cumulative, u * cumulative[-1], side="right")
                        found = [v for v in left[np.minimum(at, len(left) - 1)] if not taken[v]]
                        if found:
                            break
                out[i, j] = found[0]
                taken[out[i, j]] = distinct or taken[out[i, j]]
        return out


class Table:
    """ReferenceSampler for DeviceSampler: it draws on the CPU and copies."""

    def __init__(self, sampler: Any, device: torch.device) -> None:
        self.sampler = ReferenceSampler(sampler.probabilities)

    def sample(self, seed: int, offset: int, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(self.sampler.sample(out.numel(), seed, offset)).view(out.shape))

    def sample_rows(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        rows: torch.Tensor,
        distinct: bool,
        seed: int,
        offset: int,
        out: torch.Tensor,
    ) -> None:
        starts, ids, which = (x.numpy(force=True) for x in (indptr, indices, rows))
        drawn = self.sampler.sample_rows(starts, ids, which, out.shape[1], distinct, seed, offset)
        out.copy_(torch.from_numpy(drawn))
