"""Random draws from p ∝ weights^alpha in O(1) each, also outside a user's history, the same on any number of threads.

The alias method (A. J. Walker, "An efficient method for generating discrete random variables with general
distributions", ACM TOMS 3(3), 1977; linear-time table: M. D. Vose, IEEE TSE 17(9), 1991) on the counter-based generator
Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

What is drawn at position q = offset + index depends on (seed, q) alone, and on the row's history where there is one: on
no other draw, no thread, no instruction set. (In the distinct mode it also depends on the earlier draws of its row.) A
rejected draw is repeated with the next `attempt` in the counter, never with the number of another position. So a call
uses up exactly as many positions as its result has elements: advance `offset` by `result.size` between calls.

The environment variable CAFE_KERNELS_ISA (auto, portable, avx2 or avx512), read when a sampler is made, forces a code
path. All give the same numbers.
"""

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cafe_kernels import _C
from cafe_kernels.sampling.device import DeviceSampler

__all__ = ["AliasSampler", "DeviceSampler"]

Ids = npt.NDArray[np.int32]


class AliasSampler:
    """Draws ids 0 ... V-1 with p ∝ weights^alpha; items of zero weight are never drawn, whatever alpha.

    Args:
        weights: (V,) numpy array or CPU tensor of integers or floats, finite, none negative, some positive;
            1 <= V <= 2^31. Often the number of times that each item was seen.
        alpha: finite, >= 0. 1 draws by popularity, 0 uniformly among the items of positive weight.
        num_threads: most threads that a call may use, by default all that this process may run on. Calls of fewer than
            65,536 draws use one. The numbers do not depend on it.

    Calls release the GIL and change nothing in the sampler, so that several threads may share one. A sampler can be
    pickled (for spawned worker processes) and gives the same numbers there.

    Raises:
        TypeError, ValueError: for bad weights, alpha or num_threads.

    >>> import numpy as np
    >>> sampler = AliasSampler(np.array([5, 0, 3, 2]))
    >>> len(sampler), sampler.probabilities.tolist()
    (4, [0.5, 0.0, 0.3, 0.2])
    >>> sampler.sample((2, 3), seed=1)
    array([[3, 3, 2],
           [0, 2, 0]], dtype=int32)
    """

    def __init__(self, weights: Any, alpha: float = 1.0, num_threads: int | None = None) -> None:
        if num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if operator.index(num_threads) < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self.num_threads = num_threads
        self._set_probabilities(_probabilities(weights, alpha))

    def _set_probabilities(self, p: npt.NDArray[np.float64]) -> None:
        p.flags.writeable = False
        self._p = p
        self._table = _C.AliasTable(p, os.environ.get("CAFE_KERNELS_ISA", "auto"))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: all but the table, which is made anew from p, to the bit the same (dividing again would round)."""
        return {name: value for name, value in vars(self).items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_probabilities(self._p)

    def to(self, device: torch.device | str, backend: str | None = None) -> DeviceSampler:
        """The same draws as int32 tensors on `device`: the same numbers for the same (seed, offset), to the bit.

        Args:
            backend: "reference" (numpy, copied), "cpu" (C++), "triton"; None chooses, as for the other ops.

        Raises:
            ValueError: the backend cannot run there.

        >>> AliasSampler([1, 1, 2]).to("cpu").sample(8, seed=3)
        tensor([0, 1, 2, 0, 1, 0, 1, 0], dtype=torch.int32)
        """
        return DeviceSampler(self, device, backend)

    def __len__(self) -> int:
        """V, the number of items, drawable or not."""
        return len(self._p)

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """p, (V,) float64, read-only."""
        return self._p

    def log_prob(self, ids: Any) -> npt.NDArray[np.float64]:
        """ln p of `ids` (integers of any shape), float64 of that shape; -inf where p is zero.

        Raises:
            TypeError: `ids` are not integers. ValueError: an id is not in 0 ... V-1.

        >>> AliasSampler([1, 1, 2]).log_prob([2])
        array([-0.69314718])
        """
        ids = _array(ids, "ids")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise ValueError(f"ids must be in 0 ... {len(self) - 1}, got {ids.min()} ... {ids.max()}")
        with np.errstate(divide="ignore"):
            return np.log(self._p[ids])

    def sample(self, shape: int | Sequence[int], seed: int, offset: int = 0, out: Ids | None = None) -> Ids:
        """Independent draws.

        Args:
            shape: of the result; () draws one.
            seed: 0 <= seed < 2^64.
            offset: position of the first draw, >= 0; offset + size <= 2^63. `sample(10, s, 5)` is `sample(15, s)[5:]`.
            out: array to write into and return: int32, of that shape, C-contiguous, writable (of a tensor: t.numpy()),
                sharing no memory with the other arguments.

        Returns:
            int32 array of `shape`.

        Raises:
            TypeError, ValueError: an argument is not as above.

        >>> AliasSampler([1, 1, 2]).sample(8, seed=3)
        array([0, 1, 2, 0, 1, 0, 1, 0], dtype=int32)
        """
        out = _output(shape, out)
        self._table.sample(seed, offset, out, self.num_threads)
        return out

    def sample_excluding(
        self, indptr: Any, indices: Any, rows: Any, k: int, seed: int, offset: int = 0, out: Ids | None = None
    ) -> Ids:
        """For each row of `rows`, k independent draws from the items that are not in that row's history.

        Args:
            indptr, indices: the histories as a CSR matrix has them: row r's is indices[indptr[r]:indptr[r + 1]], sorted
                ascending (repeats are allowed). int64 of (number of rows + 1,) and int32, C-contiguous. Only the rows
                that are used are checked, since to check all would cost more than the draws.
            rows: (n,) integers, in any order, repeats allowed.
            k: draws a row, >= 0.
            seed, offset, out: as in `sample`; position of draw j of rows[i] is offset + i * k + j.

        Returns:
            (n, k) int32 array.

        Rejected draws are repeated, at most 255 times; then an exact search over what is left to the row decides, in
        O(V). So histories that leave next to nothing are slow, never endless.

        Raises:
            TypeError, ValueError: an argument is not as above; or a row that is used is not sorted, has ids outside
                0 ... V-1 or holds every item of positive weight: the message names the first such one in `rows`, and
                what is then in `out` is undefined.

        >>> import numpy as np
        >>> indptr, indices = np.array([0, 2, 3]), np.array([0, 2, 1], dtype=np.int32)
        >>> AliasSampler([5, 1, 1]).sample_excluding(indptr, indices, rows=[0, 1], k=4, seed=0)
        array([[1, 1, 1, 1],
               [2, 0, 2, 0]], dtype=int32)
        """
        return self._sample_rows(indptr, indices, rows, k, False, seed, offset, out)

    def sample_distinct(
        self, indptr: Any, indices: Any, rows: Any, k: int, seed: int, offset: int = 0, out: Ids | None = None
    ) -> Ids:
        """For each row of `rows`, k different items outside that row's history: draws without replacement.

        Each draw follows p restricted to the items that are neither in the history nor drawn before in the row: the law
        of sequential sampling without replacement. Arguments, result and errors as in `sample_excluding`; a row with
        fewer than k items of positive weight outside its history is a ValueError too.

        >>> import numpy as np
        >>> indptr, indices = np.array([0, 2, 3]), np.array([0, 2, 1], dtype=np.int32)
        >>> np.sort(AliasSampler([5, 1, 1, 9]).sample_distinct(indptr, indices, rows=[0, 1], k=2, seed=0))
        array([[1, 3],
               [0, 3]], dtype=int32)
        """
        return self._sample_rows(indptr, indices, rows, k, True, seed, offset, out)

    def _sample_rows(
        self, indptr: Any, indices: Any, rows: Any, k: int, distinct: bool, seed: int, offset: int, out: Ids | None
    ) -> Ids:
        rows = _array(rows, "rows")
        if rows.dtype.kind not in "iu" and rows.size:
            raise TypeError(f"rows must be integers, got {rows.dtype}")
        rows = np.ascontiguousarray(rows, np.int64)
        out = _output((len(rows), k), out)
        indptr, indices = _array(indptr, "indptr"), _array(indices, "indices")
        self._table.sample_rows(indptr, indices, rows, distinct, seed, offset, out, self.num_threads)
        return out


def _probabilities(weights: Any, alpha: float) -> npt.NDArray[np.float64]:
    w = _array(weights, "weights")
    if w.dtype.kind not in "iuf":
        raise TypeError(f"weights must be integers or floats, got {w.dtype}")
    if w.ndim != 1 or not 1 <= w.size <= 1 << 31:
        raise ValueError(f"weights must be 1-D with 1 ... 2^31 items, got shape {w.shape}")
    if not isinstance(alpha, int | float | np.floating | np.integer) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
    w = w.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(w) & (w >= 0)))
    if bad.size:
        raise ValueError(
            f"weights must be finite and at least 0, but {bad.size} are not; the first: weights[{bad[0]}] = {w[bad[0]]}"
        )
    if not w.any():
        raise ValueError("weights are all zero: at least one item must have a positive weight")
    positive = w > 0
    w /= w.max()  # so that neither the power nor the sum overflows
    if alpha != 1:
        w = np.where(positive, w**alpha, 0.0)
    w /= w.sum()
    return w


def _output(shape: int | Sequence[int], out: Ids | None) -> Ids:
    """A new array for the result, or `out` if it has that shape; csrc/sampler.cpp checks the rest."""
    try:
        if out is None:
            return np.empty(shape, np.int32)
        wanted = np.broadcast_to(np.int32(0), shape).shape
    except (TypeError, ValueError) as error:
        raise type(error)(f"the result cannot have shape {shape}: {error}") from None
    if isinstance(out, np.ndarray) and out.shape != wanted:
        raise ValueError(f"out must have shape {wanted}, got {out.shape}")
    return out


def _array(value: Any, name: str) -> npt.NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # e.g. a tensor on a GPU or one that requires grad
        raise TypeError(f"{name} must be a numpy array or a CPU tensor: {error}") from None
