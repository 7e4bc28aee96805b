"""The alias sampler on a GPU: the numbers of csrc/sampler.cpp to the bit, since both compute with the same integers.

    draws_kernel      a block of positions a program; those whose draw is in their row's history repeat it together
    distinct_kernel   a row a program: each draw looks at a block of attempts at once and takes the first that is free

The exact search, after 256 rejections, adds the weights up in float64 in the order of the ids as csrc/sampler.cpp does, one by one:
O(V) in one thread, for rows that leave next to nothing to draw. Nothing waits for the device, so no value is checked: -1 is drawn
where nothing is left.

On the CPU it runs in Triton's interpreter, slowly and only to be tested: when TRITON_INTERPRET=1 is set before triton is imported.
"""

# mypy: allow-untyped-defs
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cafe_kernels.attention.triton_common import philox
from cafe_kernels.backends import launchable, vendor_options
from cafe_kernels.launched import launched, types_of

ATTEMPTS = tl.constexpr(256)  # csrc/sampler.cpp: kAttempts
STREAM = tl.constexpr(0)  # csrc/philox.h: kSamplerStream
CHUNK = 32  # drawn items of a row that are looked at together
# maxnreg: ptxas otherwise spills a few registers to get down to 32 of them
FLAT = {"BLOCK": 128, "CHUNK": CHUNK, "num_warps": 4, "num_stages": 1, "maxnreg": 128}
ROW = {"BLOCK": 32, "CHUNK": CHUNK, "num_warps": 1, "num_stages": 1}
NUMBERS = {"i32": "k", "i64": "items total seed offset"}


@triton.jit
def _bits(position, attempt, seed):
    """Two uint64: words 0 and 1 of Philox at `position` (int64) and `attempt` (int32)."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    c2 = low * 0 + attempt.to(tl.uint32)
    word0, word1, _, _ = philox(low, high, c2, low * 0 + STREAM, seed)
    return word0.to(tl.uint64), word1.to(tl.uint64)


@triton.jit
def _draw(entries, items, position, attempt, seed, live):
    """The item that the table gives at each position: int32."""
    word0, word1 = _bits(position, attempt, seed)
    place = word1 * items.to(tl.uint64) + (word0 * items.to(tl.uint64) >> 32)
    column = (place >> 32).to(tl.int64)
    threshold = tl.load(entries + 2 * column, mask=live, other=0).to(tl.uint32, bitcast=True)
    alias = tl.load(entries + 2 * column + 1, mask=live, other=0)
    return tl.where((place & 0xFFFFFFFF).to(tl.uint32) < threshold, column.to(tl.int32), alias)


@triton.jit
def _uniform(position, attempt, seed):
    """In [0, 1), float64 of 53 bits."""
    word0, word1 = _bits(position, attempt, seed)
    return ((word1 << 32 | word0) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _contains(indices, begin, end, ids):
    """Whether indices[begin:end], ascending, has each of `ids`."""
    low, high = begin, end
    while tl.max(high - low, 0) > 0:
        open = low < high
        middle = (low + high) // 2
        less = open & (tl.load(indices + middle, mask=open, other=0) < ids)
        high = tl.where(open & (less == 0), middle, high)
        low = tl.where(less, middle + 1, low)
    return tl.load(indices + low, mask=low < end, other=-1) == ids


@triton.jit
def _least_above(drawn, count, item, CHUNK: tl.constexpr):
    """The least of drawn[:count] that is above `item`, or 2^31 - 1."""
    least = item * 0 + 2147483647
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        ids = tl.load(drawn + i, mask=i < count, other=-1)
        least = tl.minimum(least, tl.min(tl.where(ids > item, ids, 2147483647), 0))
    return least


@triton.jit
def _scan(p, items, indices, begin, end, drawn, count, targets, CHUNK: tl.constexpr):
    """Adds up p over the items outside indices[begin:end] and drawn[:count]. Returns the sum, the last item with p > 0 or -1, and for
    each of `targets` the first item at which the sum exceeds it, or that last one."""
    total = tl.load(p) * 0
    last = (end * 0).to(tl.int32) - 1
    found = tl.zeros_like(targets).to(tl.int32) - 1
    at = begin
    drawn_next = _least_above(drawn, count, last, CHUNK)
    for item in range(0, items):
        seen = tl.load(indices + at, mask=at < end, other=-1) == item
        while tl.load(indices + at, mask=at < end, other=2147483647) <= item:
            at += 1
        if drawn_next == item:
            seen = item >= 0
            drawn_next = _least_above(drawn, count, drawn_next, CHUNK)
        weight = tl.load(p + item)
        if (weight > 0) & (seen == 0):
            total += weight
            last = (last * 0 + item).to(tl.int32)
            found = tl.where((found < 0) & (total > targets), last, found)
    return total, last, tl.where(found < 0, last, found)


@launched(**NUMBERS)
def draws_kernel(
    entries, p, items, indptr, indices, rows, out, total, k, seed, offset,
    EXCLUDE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    seed, offset = seed.to(tl.int64), offset.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    position = offset + at
    drawn = _draw(entries, items, position, tl.zeros_like(at).to(tl.int32), seed, live)
    if EXCLUDE:
        row = tl.load(rows + at // k, mask=live, other=0)
        begin = tl.load(indptr + row, mask=live, other=0)
        end = tl.load(indptr + row + 1, mask=live, other=0)
        pending = live & _contains(indices, begin, end, drawn)
        attempt = 1
        while (attempt < ATTEMPTS) & (tl.max(pending.to(tl.int32), 0) > 0):
            again = _draw(entries, items, position, tl.zeros_like(drawn) + attempt, seed, pending)
            drawn = tl.where(pending, again, drawn)
            pending = pending & _contains(indices, begin, end, drawn)
            attempt += 1
        while tl.max(pending.to(tl.int32), 0) > 0:  # a row at a time
            own = tl.max(tl.where(pending, row, -1), 0)
            mine = pending & (row == own)
            first, after = tl.load(indptr + own), tl.load(indptr + own + 1)
            u = _uniform(position, tl.zeros_like(drawn) + ATTEMPTS, seed)
            whole, _, _ = _scan(p, items, indices, first, after, out, 0, u, CHUNK)
            _, _, found = _scan(p, items, indices, first, after, out, 0, u * whole, CHUNK)
            drawn = tl.where(mine, found, drawn)
            pending = pending & (mine == 0)
    tl.store(out + at, drawn, mask=live)


@triton.jit
def _free(indices, begin, end, drawn, count, ids, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Which of `ids` are neither in the history nor among drawn[:count]."""
    taken = _contains(indices, begin + tl.zeros_like(ids), end + tl.zeros_like(ids), ids).to(tl.int32)
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        former = tl.load(drawn + i, mask=i < count, other=-1)
        taken |= tl.max((ids[:, None] == former[None, :]).to(tl.int32), 1)
    return taken == 0


@triton.jit
def _first(free, ids, BLOCK: tl.constexpr):
    """The first of `ids` that is free, or -1."""
    lane = tl.arange(0, BLOCK)
    place = tl.min(tl.where(free, lane, BLOCK), 0)
    return tl.max(tl.where(lane == place, ids, -1), 0)


@launched(**NUMBERS)
def distinct_kernel(
    entries, p, items, indptr, indices, rows, out, k, seed, offset, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    seed = seed.to(tl.int64)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    drawn = out + i * k
    lane = tl.arange(0, BLOCK)
    zero = lane.to(tl.int64) * 0
    listed = tl.full((), -1, tl.int32)  # how many draws there were when the list of what is left was made
    whole = tl.load(p) * 0
    left = tl.full((), 1, tl.int32)
    for j in range(0, k):
        position = zero + offset.to(tl.int64) + i * k + j
        chosen = tl.full((), -1, tl.int32)
        attempt = tl.full((), 0, tl.int32)
        while (chosen < 0) & (attempt < ATTEMPTS) & (left > 0):
            ids = _draw(entries, items, position, attempt + lane, seed, lane >= 0)
            chosen = _first(_free(indices, begin, end, drawn, j, ids, BLOCK, CHUNK), ids, BLOCK)
            attempt += BLOCK
        # The list may be out of date; a new one, for the last attempt, cannot be.
        while (chosen < 0) & (left > 0):
            u = _uniform(position, attempt + lane, seed)
            if (listed < 0) | (attempt >= 2 * ATTEMPTS):
                listed = (listed * 0 + j).to(tl.int32)
                whole, last, _ = _scan(p, items, indices, begin, end, drawn, listed, u, CHUNK)
                left = (last >= 0).to(tl.int32)
            _, _, ids = _scan(p, items, indices, begin, end, drawn, listed, u * whole, CHUNK)
            chosen = _first(_free(indices, begin, end, drawn, j, ids, BLOCK, CHUNK), ids, BLOCK)
            attempt += BLOCK
        tl.store(drawn + j, chosen)
        tl.debug_barrier()  # the next draws read it


def unavailable(x: Tensor) -> str | None:
    interpreted = not isinstance(draws_kernel, triton.JITFunction)
    if x.is_cuda or interpreted:
        return None
    return f"it runs on a GPU, asked for {x.device}; TRITON_INTERPRET=1 in the environment interprets it there, slowly"


class Table:
    """The alias table and the law on a device."""

    def __init__(self, sampler: Any, device: torch.device) -> None:
        self.entries = torch.from_numpy(sampler._table.entries.view("int32").copy()).to(device)
        self.p = torch.from_numpy(sampler.probabilities.copy()).to(device)

    def sample(self, seed: int, offset: int, out: Tensor) -> None:
        if out.numel():
            draws_kernel[(triton.cdiv(out.numel(), FLAT["BLOCK"]),)](
                self.entries, self.p, len(self.p), None, None, None, out, out.numel(), 1, _signed(seed), offset,
                EXCLUDE=False, **launchable(FLAT),
            )  # fmt: skip

    def sample_rows(
        self, indptr: Tensor, indices: Tensor, rows: Tensor, distinct: bool, seed: int, offset: int, out: Tensor
    ) -> None:
        if not out.numel():
            return
        arguments = self.entries, self.p, len(self.p), indptr, indices, rows, out
        k = out.shape[1]
        if distinct:
            distinct_kernel[(len(out),)](*arguments, k, _signed(seed), offset, **ROW)
        else:
            grid = (triton.cdiv(out.numel(), FLAT["BLOCK"]),)
            draws_kernel[grid](*arguments, out.numel(), k, _signed(seed), offset, EXCLUDE=True, **launchable(FLAT))


def _signed(seed: int) -> int:
    """The int64 of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def compile_cases() -> list[dict[str, Any]]:
    """What the offline compiler builds: the three ways to draw."""
    types = {"entries": "*i32", "p": "*fp64", "indptr": "*i64", "indices": "*i32", "rows": "*i64", "out": "*i32",
             **types_of(NUMBERS)}  # fmt: skip
    absent = dict.fromkeys(("indptr", "indices", "rows"))
    cases = []
    for name, kernel, constants in (
        ("sample", draws_kernel, {"EXCLUDE": False, **absent, **FLAT}),
        ("sample_excluding", draws_kernel, {"EXCLUDE": True, **FLAT}),
        ("sample_distinct", distinct_kernel, ROW),
    ):
        fixed = {x: value for x, value in constants.items() if x in kernel.arg_names}
        cases.append({
            "name": name, "kernel": kernel, "constexprs": fixed, "dtype": "fp64",
            "signature": {x: "constexpr" if x in fixed else types[x] for x in kernel.arg_names},
            "num_warps": constants["num_warps"], "num_stages": constants["num_stages"],
            "options": vendor_options(constants),
        })  # fmt: skip
    return cases
